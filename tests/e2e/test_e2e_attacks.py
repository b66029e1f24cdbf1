"""Promise: every attack on a hypervisor that can be staged on this machine is found, named and refused.

Two machines run, each asking as itself (tests/support/relay.py). The attacked one is refused by the next
request; the other is answered all the while, unless what was attacked is the host's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestlib.client import Client
from guestlib.errors import HostdError
from hostd.core.readings import EXEC, READ
from hostd.ipc import operating as adm
from tests.e2e.harness import READY_S, VM, Host, adopted, machine, until
from tests.support import qemu, tamper
from tests.support.attacks import Attack, Finding, Sign, Staged, attempt, report
from tests.support.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
LIBRARY = Path(os.path.realpath("/usr/lib/x86_64-linux-gnu/libpixman-1.so.0"))
OTHER = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0002"
REVIEWED = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0003"
"""Runs while the baseline is taken."""
STRANGER = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0004"
OWN, RELOCATED = f"process:{VM}", f"relro:{VM}"


class Native:
    """Two machines of this machine; the first is attacked."""

    def __init__(self, host: Host, library: Path) -> None:
        self.host = host
        self.library = library
        """On tmpfs, where a page can be changed without a trace in the inode; both machines map it."""
        self._stack = contextlib.ExitStack()
        self.env = {"LD_LIBRARY_PATH": str(library.parent)}
        self.vm: qemu.Vm | None = None
        self._client: Client | None = None
        other = self._stack.enter_context(machine(host.binary, env=self.env, vm=OTHER, name="other"))
        self._other = self._caller(other)

    def start(self, **env: str) -> qemu.Vm:
        """The machine that is attacked, anew, and its caller."""
        self.stop()
        self.vm = qemu.start(self.host.binary, vm=VM, env={**self.env, **env})
        self._client = self._caller(self.vm)
        return self.vm

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self.vm is not None:
            self.vm.kill()
            self.vm = None

    def close(self) -> None:
        self.stop()
        self._other.close()
        self._stack.close()

    @property
    def pid(self) -> int:
        assert self.vm is not None
        return self.vm.pid

    def _caller(self, vm: qemu.Vm) -> Client:
        path = self.host.directory / f"relay-{vm.pid}.sock"
        self._stack.callback(Relay(path, vm.pid, self.host.guest_socket).close)
        return Client(self.host.trust(), f"unix:{path}", timeout_s=15.0)

    def answered(self) -> str:
        if self.vm is None:
            self.start()
        last = ""

        def answers() -> bool:
            nonlocal last
            last = self.refusal()
            return not last

        with contextlib.suppress(AssertionError):
            until(answers, "an answer", READY_S)
        return last

    def refusal(self) -> str:
        assert self._client is not None
        return _asked(self._client)

    def others_answered(self) -> str:
        return _asked(self._other)

    def drift(self) -> list[Finding]:
        return [finding for findings in self.host.drift().values() for finding in findings]

    def recover(self, staged: Staged) -> None:
        self.stop()
        for component in self.host.drift():
            self.host.hostctl("drift", "clear", component, "--reason", "test of an attack")


def _asked(client: Client) -> str:
    try:
        client.random(8)
    except HostdError as error:
        return error.code
    return ""


def own(code: str, *names: str, undo: Callable[[], None] = lambda: None) -> Staged:
    return Staged((Sign(OWN, (code,), names),), undo)


# ── In the process ────────────────────────────────────────────────────────────────────────────────────


def poke_text(scene: Native) -> Staged:
    text = tamper.mapping(scene.pid, "libglib", READ | EXEC)
    tamper.poke(scene.pid, text.start + 0x100, 0x9090909090909090)
    return own("code-altered", "libglib", f"file offset {text.offset + 0x100:#x}")


def write_text(scene: Native) -> Staged:
    text = tamper.mapping(scene.pid, "qemu-under-test", READ | EXEC)
    before = tamper.read(scene.pid, text.start + 0x1234, 1)
    tamper.write(scene.pid, text.start + 0x1234, bytes([before[0] ^ 1]))
    return own("code-altered", "qemu-under-test", f"file offset {text.offset + 0x1234:#x}")


def write_the_same(scene: Native) -> Staged:
    text = tamper.mapping(scene.pid, "libglib", READ | EXEC)
    tamper.write(scene.pid, text.start, tamper.read(scene.pid, text.start, 8))
    return own("code-altered", "libglib", f"{text.offset:#x}")


def write_constants(scene: Native) -> Staged:
    text = tamper.mapping(scene.pid, "libc.so", READ | EXEC)
    constants = _constants(scene, text.name)
    tamper.write(scene.pid, constants + 100, b"\xaa\xbb")
    return own("code-altered", "libc.so", f"{constants + 100:#x}")


def write_vdso(scene: Native) -> Staged:
    vdso = tamper.mapping(scene.pid, "[vdso]", READ | EXEC)
    tamper.write(scene.pid, vdso.start + 0x800, b"\xcc")
    return own("code-altered", "[vdso]", f"{vdso.start + 0x800:#x}")


def inject_code(scene: Native) -> Staged:
    address = tamper.inject_anonymous_code(scene.pid)
    return own("mapping-anonymous-exec", f"pid {scene.pid}", f"{address:#x}-{address + 4096:#x}")


def inject_memory_file(scene: Native) -> Staged:
    tamper.map_memory_file(scene.pid, b"\x90" * 4096)
    return Staged((Sign(OWN, ("file-unknown", "file-unreadable", "file-unapproved"), ("/memfd:payload",)),))


def open_library(scene: Native) -> Staged:
    evil = scene.library.with_name("dlopened.so")
    shutil.copy(scene.library, evil)
    tamper.map_file(scene.pid, evil)
    return own("file-unknown", str(evil), undo=evil.unlink)


def make_code_writable(scene: Native) -> Staged:
    text = tamper.mapping(scene.pid, "libglib", READ | EXEC)
    tamper.syscall(scene.pid, tamper.SYS_MPROTECT, text.start, text.end - text.start, 7)
    return own("mapping-writable-exec", "libglib", f"{text.start:#x}-{text.end:#x}")


def make_constants_writable(scene: Native) -> Staged:
    text = tamper.mapping(scene.pid, "libglib", READ | EXEC)
    start = _constants(scene, text.name)
    tamper.syscall(scene.pid, tamper.SYS_MPROTECT, start, 4096, 3)
    return own("mapping-writable-code", "libglib", f"{start:#x}-")


def hook_writev(scene: Native) -> Staged:
    tamper.hook(scene.pid, "qemu-under-test", "writev")
    return Staged((Sign(RELOCATED, ("got-altered",), ("writev",)),))


def become_another(scene: Native) -> Staged:
    """Same pid, same start time: the other machine's name, in the process that was measured."""
    words = Path(f"/proc/{scene.pid}/cmdline").read_text().split("\0")[:-1]
    words[words.index("-uuid") + 1] = STRANGER
    monitor = words.index("-qmp")
    del words[monitor : monitor + 2]
    tamper.execute(scene.pid, *words, env={**os.environ, **scene.env, "QEMU_MODULE_DIR": qemu.MODULES})
    until(lambda: STRANGER in Path(f"/proc/{scene.pid}/cmdline").read_text(), "it runs the other program")
    return own("identity-changed", f"pid {scene.pid}")


def _constants(scene: Native, name: str) -> int:
    text = tamper.mapping(scene.pid, name, READ | EXEC)
    return next(
        vma.start
        for vma in tamper.maps(scene.pid)
        if vma.name == name and vma.offset > text.offset and vma.protection == READ
    )


# ── In its files ──────────────────────────────────────────────────────────────────────────────────────


def preload(scene: Native) -> Staged:
    evil = scene.library.with_name("evil.so")
    shutil.copy(scene.library, evil)
    scene.start(LD_PRELOAD=str(evil))
    return own("file-unknown", str(evil), undo=evil.unlink)


def replace_library(scene: Native) -> Staged:
    return _replaced(scene, scene.library)


def replace_hypervisor(scene: Native) -> Staged:
    return _replaced(scene, scene.host.binary)


def mount_over_library(scene: Native) -> Staged:
    scene.stop()
    evil = scene.library.with_name("mounted.so")
    shutil.copy(scene.library, evil)
    tamper.flip_page_cache(evil, evil.stat().st_size - 1)
    subprocess.run(["mount", "--bind", evil, scene.library], check=True)
    scene.start()

    def undo() -> None:
        scene.stop()
        subprocess.run(["umount", "--lazy", scene.library], check=True)
        evil.unlink()

    return own("file-unapproved", str(scene.library), undo=undo)


def flip_page_cache(scene: Native) -> Staged:
    text = tamper.mapping(scene.pid, str(scene.library), READ | EXEC)
    offset = text.offset + 0x2345
    tamper.flip_page_cache(scene.library, offset)
    return Staged(
        (Sign("files", ("file-altered",), (str(scene.library), f"file offset {offset:#x}")),),
        lambda: tamper.flip_page_cache(scene.library, offset) and None,
        others=False,  # they map the same page
    )


def _replaced(scene: Native, path: Path) -> Staged:
    """By rename: whoever runs keeps the approved file; who starts afterwards has the other one."""
    scene.stop()
    kept, evil = path.with_name("kept"), path.with_name("replacement")
    os.link(path, kept)
    shutil.copy(path, evil)
    with evil.open("ab") as file:
        file.write(b"\0")
    evil.rename(path)
    scene.start()

    def undo() -> None:
        scene.stop()
        kept.rename(path)

    return own("file-unapproved", str(path), undo=undo)


ATTACKS = [
    Attack("text written with PTRACE_POKETEXT", poke_text),
    Attack("text written through /proc/PID/mem", write_text),
    Attack("text written with the bytes it had", write_the_same),
    Attack("constants of a library written", write_constants),
    Attack("vDSO written", write_vdso),
    Attack("anonymous executable mapping injected", inject_code),
    Attack("executable memfd mapped", inject_memory_file),
    Attack("unapproved library opened as dlopen does", open_library),
    Attack("text made writable with mprotect", make_code_writable),
    Attack("constants made writable with mprotect", make_constants_writable),
    Attack("GOT slot of writev hooked", hook_writev),
    Attack("process becomes another machine, same pid", become_another),
    Attack("library preloaded with LD_PRELOAD", preload),
    Attack("library replaced by rename", replace_library),
    Attack("library covered by a bind mount", mount_over_library),
    Attack("hypervisor binary replaced by rename", replace_hypervisor),
    Attack("page cache of a library changed, inode untouched", flip_page_cache),
]


def test_two_processes_that_say_they_are_one_machine_are_neither(scene: Native) -> None:
    assert not scene.answered()
    with machine(scene.host.binary, env=scene.env, vm=VM, name="impostor"):
        assert scene.refusal() in ("deadline", "transport", "unavailable")
        assert not scene.others_answered()
    assert not scene.answered()
    assert scene.drift() == []


@pytest.fixture
def scene(binary: Path) -> Iterator[Native]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        Path(name).chmod(0o755)
        library = Path(name) / "libpixman-1.so.0"
        shutil.copy(LIBRARY, library)
        env = {"LD_LIBRARY_PATH": name}
        with machine(binary, vm=REVIEWED, env=env), adopted(binary) as host:
            for vm in (VM, OTHER):
                host.ask(adm.BindVm(vm=vm, tenant="acme"), adm.Nothing)
            made = Native(host, library)
            try:
                yield made
            finally:
                made.close()


def test_every_attack_is_found_named_and_refused(scene: Native, capsys: pytest.CaptureFixture[str]) -> None:
    before = scene.host.pids()
    outcomes = [attempt(scene, attack) for attack in ATTACKS]
    with capsys.disabled():
        print(f"\n{report(outcomes)}")
    assert scene.host.pids() == before, "a role died"
    bad = [outcome.name for outcome in outcomes if not outcome.good]
    assert not bad
    assert len(outcomes) == len(ATTACKS)
