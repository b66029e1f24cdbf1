"""Promise: a disk that is full or slow means refusals and never silence, and what was acknowledged stays."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from guestlib.errors import HostdError
from hostd.ipc import operating as adm
from tests.e2e.harness import Host, alive, directory, until
from tests.e2e.load import HONEST, Load, keys_work
from tests.e2e.traced import SLOW, traced

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import qemu

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
SLOW_S = 0.3
"""Of one fdatasync; the vault's thread waits for it."""
SIZE = "24m"
"""Of the file system that holds the state."""


@contextlib.contextmanager
def on_a_small_disk(binary: Path) -> Iterator[Host]:
    with directory() as place:
        host = Host(place, binary)
        host.state.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(host.state)], capture_output=True
        )
        if made.returncode:
            pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
        try:
            host.setup()
            host.start()
            until(lambda: (s := host.status()) and s.keys_unlocked, "the root key is unsealed")
            host.adopt(("acme", 0))
            host.wait_open()
            yield host
        finally:
            host.close_clients()
            if host.supervisor is not None:
                host.kill()
            subprocess.run(["umount", "--lazy", str(host.state)], check=True)
            print(f"── log of the roles ──\n{host.log()}")


def fill(path: Path) -> None:
    """Takes the last byte of the file system that `path` is on."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_the_disk_is_slow(binary: Path, vm: qemu.Vm) -> None:
    """Everybody waits for it, and the gate's sentence holds meanwhile."""
    with traced(binary) as host:
        with Load(host, threads=3, timeout_s=20) as load:
            load.answered_after(time.monotonic(), 20)
            slow = host.directory / SLOW
            slow.write_text(str(SLOW_S))
            began, before = time.monotonic(), len(load.answers)
            until(lambda: len(load.answers) > before + 20, "some are answered", 60)
            took = time.monotonic() - began
            slow.unlink()
            load.answered_after(time.monotonic(), 20)
        found = host.judged(load.answers)
        print(f"{took:.1f} s; {dict(found.counts)}")
        assert found.violations == []
        load.check()


def test_the_disk_is_full(binary: Path, vm: qemu.Vm) -> None:
    with on_a_small_disk(binary) as host:
        client = host.client()
        host.serves(client)
        keys = [client.create_key().key.id for _ in range(5)]
        answered = 0
        filler = host.state / "filler"
        fill(filler)
        told: list[str] = []
        for _ in range(10_000):  # until the page that was begun is full too
            try:
                client.create_key()
                answered += 1
            except HostdError as error:
                told.append(error.code)
                if len(told) == 10:
                    break
        assert len(told) == 10, f"{answered} answers on a full disk"
        assert set(told) <= HONEST
        status = host.status()
        assert status is not None
        assert status.gate == "closed"
        # Room again, and another vault.
        filler.unlink()
        vault = host.pid("vault")
        os.kill(vault, 9)
        until(lambda: not alive(vault), "it is dead")
        until(lambda: (s := host.status()) and s.keys_unlocked, "the vault is back")
        host.wait_open()
        client = host.client()
        host.serves(client)
        keys_work(client, keys)
        found = host.ask(adm.VerifyLedger(), adm.LedgerVerified)
        assert found.problem == ""
