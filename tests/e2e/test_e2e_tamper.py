"""Promise: what was changed in a hypervisor is refused at the next request, and named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestlib.errors import RefusedDriftError, TransportError, UnavailableError, VerificationError
from hostd.core.readings import EXEC, READ
from tests.e2e.harness import VM, Host, adopted, alive, machine, until
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
LIBRARY = Path(os.path.realpath("/usr/lib/x86_64-linux-gnu/libpixman-1.so.0"))
COMPONENT = f"process:{VM}"


@pytest.fixture
def host(binary: Path, vm: qemu.Vm) -> Iterator[Host]:
    with adopted(binary) as made:
        yield made


@pytest.fixture
def library() -> Iterator[Path]:
    """A copy of a library on tmpfs, where a page can be changed without a trace in the inode."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        Path(name).chmod(0o755)
        copy = Path(name) / "libpixman-1.so.0"
        shutil.copy(LIBRARY, copy)
        yield copy


def patch(pid: int) -> dict[str, str]:
    text = tamper.mapping(pid, "qemu-under-test", READ | EXEC)
    offset = text.offset + 0x1234
    address = tamper.address_of(text, offset)
    before = tamper.read(pid, address, 16)
    tamper.write(pid, address, bytes([before[0] ^ 1]))
    return {
        "subject": "qemu-under-test",
        "where": f"file offset {offset:#x}",
        "expected": before.hex(" "),
        "seen": bytes([before[0] ^ 1, *before[1:]]).hex(" "),
    }


def poke(pid: int) -> dict[str, str]:
    text = tamper.mapping(pid, "libglib", READ | EXEC)
    tamper.poke(pid, text.start + 0x100, 0x9090909090909090)
    return {
        "subject": "libglib",
        "where": f"file offset {text.offset + 0x100:#x}",
        "seen": "90 90 90 90 90 90 90 90",
    }


def inject(pid: int) -> dict[str, str]:
    address = tamper.inject_anonymous_code(pid)
    return {"subject": f"pid {pid}", "where": f"{address:#x}-{address + 4096:#x}"}


def refused_and_named(host: Host, expected: dict[str, str], *, component: str = COMPONENT) -> None:
    client = host.client()
    size = len(host.ledger())
    with pytest.raises(RefusedDriftError) as caught:
        client.random(8)
    findings = host.drift()[component]
    assert any(all(text in f[field] for field, text in expected.items()) for f in findings), findings
    drifts = [e for e in host.ledger() if e["event"] == "drift" and component in e["detail"]]
    assert drifts, "the ledger does not say so"
    assert all(text in drifts[-1]["detail"] for field, text in expected.items() if field != "component")
    assert caught.value.ledger is not None
    refusal = host.ledger()[caught.value.ledger]
    assert (refusal["outcome"], refusal["op"]) == ("refused-drift", "GenerateRandom")
    assert not any(e["outcome"] == "released" and e["seq"] >= size for e in host.ledger())
    # And whoever asks for evidence sees it before a word is said.
    with pytest.raises(VerificationError, match="drifted"):
        host.client(attested=True).random(8)


def cleared_and_restarted(host: Host, vm: qemu.Vm, env: dict[str, str] | None = None) -> None:
    """Nothing but an officer's word and a good machine opens the gate again."""
    vm.kill()
    with pytest.raises(RefusedDriftError):
        host.client().random(8)
    for component in host.drift():  # a file that is another one concerns `relro` as well
        host.hostctl("drift", "clear", component, "--reason", "machine restarted")
    assert host.drift() == {}
    (clear,) = [e for e in host.ledger() if e["event"] == "clear" and e["op"] == COMPONENT]
    assert clear["principal"] == 'Officer::"uid:0"'
    assert COMPONENT in str(clear)
    assert "machine restarted" in clear["detail"]
    with machine(host.binary, env=env):
        host.serves(host.client(attested=True))
        assert host.drift() == {}


@pytest.mark.parametrize("attack", [patch, poke, inject])
def test_change_in_memory(host: Host, vm: qemu.Vm, attack: Callable[[int], dict[str, str]]) -> None:
    host.serves(host.client())
    refused_and_named(host, attack(vm.pid))
    cleared_and_restarted(host, vm)


def test_byte_put_back_does_not_reopen(host: Host, vm: qemu.Vm) -> None:
    client = host.client()
    host.serves(client)
    text = tamper.mapping(vm.pid, "qemu-under-test", READ | EXEC)
    before = tamper.read(vm.pid, text.start + 64, 1)
    tamper.write(vm.pid, text.start + 64, bytes([before[0] ^ 1]))
    with pytest.raises(RefusedDriftError):
        client.random(8)
    tamper.write(vm.pid, text.start + 64, before)
    for _ in range(5):
        with pytest.raises(RefusedDriftError):
            client.random(8)
    assert list(host.drift()) == [COMPONENT]


def test_clearing_alone_does_not_reopen(host: Host, vm: qemu.Vm) -> None:
    client = host.client()
    host.serves(client)
    patch(vm.pid)
    with pytest.raises(RefusedDriftError):
        client.random(8)
    host.hostctl("drift", "clear", COMPONENT, "--reason", "wishful thinking")

    def refused_again() -> bool:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - until then: unavailable
            client.random(8)
        return isinstance(caught.value, RefusedDriftError)

    until(refused_again, "the same drift is found again")


def test_drift_survives_the_vault(host: Host, vm: qemu.Vm) -> None:
    """kill -9 of the vault, and the machine gone too: the latch is on the disk."""
    host.serves(host.client())
    refused_and_named(host, patch(vm.pid))
    before = host.drift()
    vault = host.pid("vault")
    os.kill(vault, 9)
    until(lambda: not alive(vault), "it is dead")
    vm.kill()
    until(lambda: (s := host.status()) and s.keys_unlocked, "the vault is back")
    assert host.drift() == before
    client = host.client()

    def refused() -> bool:
        try:
            client.random(8)
        except RefusedDriftError:
            return True
        except (UnavailableError, TransportError):
            return False
        raise AssertionError("answered")

    until(refused, "the refusal is the drift's")


def test_preloaded_library(host: Host, vm: qemu.Vm, library: Path) -> None:
    host.serves(host.client())
    vm.kill()
    with machine(host.binary, env={"LD_PRELOAD": str(library.rename(library.with_name("evil.so")))}) as evil:
        refused_and_named(host, {"subject": "evil.so"})
        cleared_and_restarted(host, evil)


def test_library_replaced_on_disk(binary: Path, library: Path) -> None:
    """The approved file is exchanged; the machine that is started afterwards maps the other one."""
    env = {"LD_LIBRARY_PATH": str(library.parent)}
    with machine(binary, env=env) as vm, adopted(binary) as host:
        client = host.client()
        host.serves(client)
        other = library.with_name("other")
        shutil.copy(library, other)
        size = other.stat().st_size
        tamper.flip_page_cache(other, size - 1)
        other.rename(library)
        client.random(8)  # what runs maps the approved file still
        vm.kill()
        with machine(binary, env=env) as evil:
            refused_and_named(host, {"subject": str(library), "code": "file"})
            shutil.copy(LIBRARY, other)
            other.rename(library)
            cleared_and_restarted(host, evil, env)


def test_page_cache_flip(binary: Path, library: Path) -> None:
    """The file's record on tmpfs does not move: the mapped pages themselves are compared."""
    with machine(binary, env={"LD_LIBRARY_PATH": str(library.parent)}) as vm, adopted(binary) as host:
        host.serves(host.client())
        text = tamper.mapping(vm.pid, "libpixman", READ | EXEC)
        tamper.flip_page_cache(library, text.offset + 0x321)
        with pytest.raises(RefusedDriftError):
            host.client().random(8)
        drift = host.drift()
        (findings,) = drift.values()
        assert any(str(library) in f["subject"] for f in findings), findings
        assert any(hex(text.offset + 0x321) in f["where"] for f in findings), findings
