"""The stock of RSA keys, with real children."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from guestlib.errors import OverloadedError
from hostd.core.keys import Algorithm
from hostd.ipc.loop import Loop, Timer
from hostd.platform import program
from hostd.vault import mint as module
from hostd.vault import primitives
from hostd.vault.mint import STOCK, Mint


@pytest.fixture
def mint(loop: Loop) -> Iterator[Mint]:
    made = Mint(loop)
    yield made
    made.stop()


def until(loop: Loop, true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        loop.run_once(0.05)


def child_says(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(program, "command", lambda *_: [sys.executable, "-I", "-c", code])


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_other_keys_are_made_at_once(mint: Mint) -> None:
    for algorithm in set(Algorithm) - {Algorithm.RSA_3072}:
        assert mint.generate(algorithm)
    assert mint._child is None


def test_keeps_a_stock_and_gives_each_key_once(mint: Mint, loop: Loop) -> None:
    before = descriptors()
    with pytest.raises(OverloadedError):
        mint.generate(Algorithm.RSA_3072)
    mint.start()
    until(loop, lambda: len(mint._ready) == STOCK)
    assert mint._child is None
    keys = {bytes(mint.generate(Algorithm.RSA_3072)) for _ in range(STOCK)}
    assert len(keys) == STOCK
    for key in keys:
        private = primitives.load_private(Algorithm.RSA_3072, key)
        assert primitives.signature_matches(
            private, "rsa-pss-sha256", b"m", primitives.sign(private, "rsa-pss-sha256", b"m")
        )
    assert mint._child is not None
    mint.stop()
    assert mint._child is None
    assert descriptors() == before


def test_stop_drops_the_stock_and_ends_the_child(
    mint: Mint, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_says(monkeypatch, "import time; time.sleep(600)")
    key = bytearray(b"a key")
    mint._ready.append(key)
    mint.start()
    child = mint._child
    assert child is not None
    mint._buffer[:4] = b"half"
    mint.stop()
    assert not any(key)
    assert not any(mint._buffer)
    assert child.returncode is not None
    assert mint._ready == []
    mint.stop()
    loop.run_once(0.0)
    assert mint._child is None


@pytest.mark.parametrize(
    "code",
    [
        "",
        "raise SystemExit(1)",
        "print('no key')",
        "import sys; sys.stdout.buffer.write(bytes(100_000))",
        "import sys; sys.stdout.buffer.write(b'\\x30\\x82\\x06\\xff' + bytes(900))",
    ],
)
def test_a_child_that_fails_gives_no_key_and_is_tried_again_later(
    mint: Mint, loop: Loop, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    delays: list[float] = []
    call_after = loop.call_after
    child_says(monkeypatch, code)
    mint.start()

    def noted(seconds: float, call: Callable[[], None]) -> Timer:
        delays.append(seconds)
        return call_after(seconds, call)

    monkeypatch.setattr(loop, "call_after", noted)
    until(loop, lambda: mint._child is None)
    assert mint._ready == []
    assert delays == [1.0]
    with pytest.raises(OverloadedError):
        mint.generate(Algorithm.RSA_3072)


def test_a_child_that_hangs_is_given_up(mint: Mint, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 0.05)
    child_says(monkeypatch, "import time; time.sleep(600)")
    mint.start()
    child = mint._child
    assert child is not None
    until(loop, lambda: mint._child is not child)
    assert child.returncode is not None
