"""A stock of RSA keys, made beside the vault's loop.

Making an RSA-3072 key takes from a tenth of a second to seconds and holds the interpreter lock, so
that every other VM would wait for it. A child process, with the vault's own rights and sandbox,
makes keys before they are asked for; they come back through a pipe as PKCS#8 and belong to nobody
until a request takes one. An empty stock is `overloaded`: the caller tries again. On the way it is in no
buffer that cannot be wiped.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Final

from guestlib.errors import OverloadedError
from hostd.core.keys import Algorithm
from hostd.platform import confine, program
from hostd.platform.secretmem import wipe
from hostd.vault import primitives

if TYPE_CHECKING:
    from hostd.ipc.loop import Loop

STOCK: Final = 2
MAX_KEY_BYTES: Final = 8192
DEADLINE_S: Final = 120.0
"""For one key; a slow emulated machine needs some ten seconds."""


class Mint:
    """Keeps `STOCK` RSA keys ready while started."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._ready: list[bytearray] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray(MAX_KEY_BYTES + 1)
        self._received = 0
        self._running = False

    def start(self) -> None:
        self._running = True
        self._refill()

    def stop(self) -> None:
        """Ends the child and wipes the stock (on lock and at exit)."""
        self._running = False
        while self._ready:
            wipe(self._ready.pop())
        self._end_child()

    def generate(self, algorithm: Algorithm) -> bytearray:
        """Fresh key material, as `primitives.generate`; the caller wipes it.

        Raises:
            OverloadedError: no RSA key is ready.
        """
        if algorithm is not Algorithm.RSA_3072:
            return primitives.generate(algorithm)
        if not self._ready:
            raise OverloadedError("no RSA key is ready; try again in a moment")
        material = self._ready.pop()
        self._refill()
        return material

    def _refill(self) -> None:
        if not self._running or self._child is not None or len(self._ready) >= STOCK:
            return
        self._child = subprocess.Popen(
            program.command("mint"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._child.stdout is not None
        self._timer = self._loop.call_after(DEADLINE_S, self._give_up)
        self._loop.watch(self._child.stdout, self._on_output)

    def _on_output(self, _events: int) -> None:
        child = self._child
        assert child is not None
        assert child.stdout is not None
        with memoryview(self._buffer) as whole, whole[self._received :] as rest:
            count = child.stdout.readinto(rest)  # type: ignore[attr-defined]
        self._received += count
        if count and self._received < len(self._buffer):
            return
        key = self._buffer[: self._received]
        self._end_child()
        if not count and _whole(key):
            self._ready.append(key)
            self._refill()
        else:
            wipe(key)
            if self._running:
                self._loop.call_after(1.0, self._refill)

    def _give_up(self) -> None:
        self._end_child()
        self._loop.call_after(1.0, self._refill)

    def _end_child(self) -> None:
        child, self._child = self._child, None
        self._received = 0
        wipe(self._buffer)
        if child is None:
            return
        self._timer.cancel()
        assert child.stdout is not None
        self._loop.forget(child.stdout)
        child.stdout.close()
        child.kill()
        child.wait()


def _whole(key: bytearray) -> bool:
    """Whether the child said all of it: it may have been killed in the middle."""
    try:
        primitives.load_private(Algorithm.RSA_3072, key)
    except primitives.IntegrityError:
        return False
    return True


def main() -> None:
    """The child: one RSA-3072 key, PKCS#8 DER, to standard output."""
    confine.undumpable()
    sys.stdout.buffer.write(primitives.generate(Algorithm.RSA_3072))
