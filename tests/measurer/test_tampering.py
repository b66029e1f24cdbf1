"""Attacks on a live QEMU, each found by the next reading and named; and their innocent twins."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostd.core.codes import Code
from hostd.core.findings import Status
from hostd.core.readings import EXEC, READ, WRITE
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from tests.support.watched import Watched

pytestmark = pytest.mark.qemu
LIBRARY = Path(os.path.realpath("/usr/lib/x86_64-linux-gnu/libpixman-1.so.0"))


def _into(path: Path, name: str, offset: int) -> int:
    """How far `offset` lies inside what a finding names, by readelf's word."""
    thing = name.rpartition("+")[0]
    if thing.startswith("."):
        rows = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
        row = next(row.partition("]")[2].split() for row in rows.splitlines() if f" {thing} " in row)
        return offset - int(row[3], 16)
    rows = subprocess.run(
        ["readelf", "--dyn-syms", "-W", path], check=True, capture_output=True, text=True
    ).stdout
    row = next(
        row.split()
        for row in rows.splitlines()
        if row.split()[-1:] and row.split()[-1].split("@")[0] == thing
    )
    # Code of a position-independent file lies at the same offset and address here.
    return offset - int(row[1], 16)


def test_untouched_is_good(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    for _ in range(5):
        watched.assert_good(vm.uuid)


def test_unknown_is_never_good(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    assert watched.verdicts("00000000-0000-0000-0000-000000000001")[3].status is Status.PENDING


@pytest.mark.parametrize("page", ["resident", "any"])
def test_byte_in_text(watched: Watched, vm: qemu.Vm, page: str) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    text = tamper.mapping(vm.pid, "qemu-under-test", READ | EXEC)
    offset = text.offset + (0x1234 if page == "resident" else (text.end - text.start) // 2 + 0x777)
    address = tamper.address_of(text, offset)
    before = tamper.read(vm.pid, address, 16)
    tamper.write(vm.pid, address, bytes([before[0] ^ 1]))
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.CODE_ALTERED
    assert finding.component == f"process:{vm.uuid}"
    assert "qemu-under-test" in finding.subject
    assert f"pid {vm.pid}" in finding.subject
    named, _, at = finding.where.partition(", ")
    assert at == f"address {address:#x}, file offset {offset:#x}"
    assert named.endswith(f"+{_into(Path(qemu.QEMU), named, offset):#x}")
    assert before.hex(" ") in finding.expected
    assert bytes([before[0] ^ 1, *before[1:]]).hex(" ") in finding.seen
    # Taking the byte back leaves the copied page.
    tamper.write(vm.pid, address, before[:1])
    (finding,) = watched.findings(vm.uuid)
    assert "(the same)" in finding.seen


def test_byte_in_constants(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    text = tamper.mapping(vm.pid, "libc.so", READ | EXEC)
    constants = next(
        vma
        for vma in tamper.maps(vm.pid)
        if vma.name == text.name and vma.offset > text.offset and vma.protection == READ
    )
    tamper.write(vm.pid, constants.start + 100, b"\xaa\xbb")
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.CODE_ALTERED
    assert "libc.so" in finding.subject


def test_same_content_write(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    text = tamper.mapping(vm.pid, "libglib", READ | EXEC)
    tamper.write(vm.pid, text.start, tamper.read(vm.pid, text.start, 8))
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.CODE_ALTERED
    assert "(the same)" in finding.seen
    assert "a copy of the page" in finding.seen


def test_poke(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    text = tamper.mapping(vm.pid, "libglib", READ | EXEC)
    tamper.poke(vm.pid, text.start + 0x100, 0x9090909090909090)
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.CODE_ALTERED
    assert "90 90 90 90 90 90 90 90" in finding.seen


def test_vdso(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    vdso = tamper.mapping(vm.pid, "[vdso]", READ | EXEC)
    tamper.write(vm.pid, vdso.start + 0x800, b"\xcc")
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.CODE_ALTERED
    assert "[vdso]" in finding.subject


def test_many_pages_are_bounded(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    text = tamper.mapping(vm.pid, "qemu-under-test", READ | EXEC)
    for page in range(200):
        tamper.write(vm.pid, text.start + page * 4096, b"\xcc")
    found = watched.findings(vm.uuid)
    assert len(found) == 64
    assert watched.verdicts(vm.uuid)[3].status is Status.DRIFTED


def test_injected_anonymous_code(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    address = tamper.inject_anonymous_code(vm.pid)
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.MAPPING_ANONYMOUS_EXEC
    assert f"{address:#x}-{address + 4096:#x}" in finding.where


def test_jit_is_a_finding_unless_allowed(binary: Path, vm: qemu.Vm) -> None:
    from tests.support.watched import Watched

    watched = Watched(binary, allow_jit=False)
    try:
        watched.approve()
        assert {finding.code for finding in watched.findings(vm.uuid)} == {Code.MAPPING_ANONYMOUS_EXEC}
    finally:
        watched.close()


def test_code_made_writable(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    text = tamper.mapping(vm.pid, "libglib", READ | EXEC)
    tamper.syscall(vm.pid, tamper.SYS_MPROTECT, text.start, text.end - text.start, READ | WRITE | EXEC)
    assert {finding.code for finding in watched.findings(vm.uuid)} == {Code.MAPPING_WRITABLE_EXEC}


def test_constants_made_writable(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    text = tamper.mapping(vm.pid, "libglib", READ | EXEC)
    constants = next(
        vma
        for vma in tamper.maps(vm.pid)
        if vma.name == text.name and vma.offset > text.offset and vma.protection == READ
    )
    tamper.syscall(vm.pid, tamper.SYS_MPROTECT, constants.start, constants.end - constants.start, 3)
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.MAPPING_WRITABLE_CODE


def test_preloaded_unknown_library(watched: Watched, binary: Path, vm: qemu.Vm, tmp_path: Path) -> None:
    watched.approve()
    evil = tmp_path / "evil.so"
    shutil.copy(LIBRARY, evil)
    with qemu.running(binary, env={"LD_PRELOAD": str(evil)}) as other:
        (finding,) = watched.findings(other.uuid)
        assert finding.code == Code.FILE_UNKNOWN
        assert str(evil) in finding.subject
        # The neighbour is not refused for it.
        watched.assert_good(vm.uuid)


def test_replaced_library(watched: Watched, binary: Path, memory_directory: Path) -> None:
    library = memory_directory / "libpixman-1.so.0"
    shutil.copy(LIBRARY, library)
    with qemu.running(binary, env={"LD_LIBRARY_PATH": str(memory_directory)}) as vm:
        watched.approve()
        watched.assert_good(vm.uuid)
        # By another file of the same content: same digest, so nothing happens.
        twin = memory_directory / "new"
        shutil.copy(LIBRARY, twin)
        twin.rename(library)
        watched.assert_good(vm.uuid)
        with qemu.running(binary, env={"LD_LIBRARY_PATH": str(memory_directory)}) as after:
            watched.assert_good(after.uuid)
        # By one with a changed byte: the VM that maps it is refused, the others are not.
        shutil.copy(LIBRARY, twin)
        tamper.flip_page_cache(twin, twin.stat().st_size - 1)
        twin.rename(library)
        watched.assert_good(vm.uuid)
        with qemu.running(binary, env={"LD_LIBRARY_PATH": str(memory_directory)}) as evil:
            (finding,) = watched.findings(evil.uuid)
            assert finding.code == Code.FILE_UNAPPROVED
            assert str(library) in finding.subject
            watched.assert_good(vm.uuid)


def test_page_cache_flip(watched: Watched, binary: Path, memory_directory: Path) -> None:
    library = memory_directory / "libpixman-1.so.0"
    shutil.copy(LIBRARY, library)
    with qemu.running(binary, env={"LD_LIBRARY_PATH": str(memory_directory)}) as vm:
        watched.approve()
        watched.assert_good(vm.uuid)
        text = tamper.mapping(vm.pid, str(library), READ | EXEC)
        offset = text.offset + 0x2345
        was, now = tamper.flip_page_cache(library, offset)
        (finding,) = watched.findings(vm.uuid)
        assert finding.code == Code.FILE_ALTERED
        assert finding.component == "files"
        assert finding.subject == str(library)
        named, _, at = finding.where.partition(", ")
        assert at == f"file offset {offset:#x}"
        assert named.endswith(f"+{_into(library, named, offset):#x}")
        assert f"bytes {was:02x} " in finding.expected
        assert f"bytes {now:02x} " in finding.seen
        # Identifying the file again does not make it good.
        for number, known in list(watched.appraiser.files.known.items()):
            if known.path == str(library):
                from hostd.ipc.measuring import AskFile

                watched.appraiser.learn(number, watched.measurer.answer(AskFile(0, number)))  # type: ignore[arg-type]
        assert [finding.code for finding in watched.findings(vm.uuid)] == [Code.FILE_ALTERED]
        tamper.flip_page_cache(library, offset)
        watched.assert_good(vm.uuid)


def test_page_cache_flip_before_the_start(watched: Watched, binary: Path, memory_directory: Path) -> None:
    library = memory_directory / "libpixman-1.so.0"
    shutil.copy(LIBRARY, library)
    with qemu.running(binary, env={"LD_LIBRARY_PATH": str(memory_directory)}):
        reference = watched.approve()
    tamper.flip_page_cache(library, library.stat().st_size - 1)
    with qemu.running(binary, env={"LD_LIBRARY_PATH": str(memory_directory)}) as vm:
        watched.use(reference)
        (finding,) = watched.findings(vm.uuid)
        assert finding.code == Code.FILE_UNAPPROVED


def test_bytes_after_the_end_of_a_file(watched: Watched, binary: Path, memory_directory: Path) -> None:
    """The rest of the last page can be executed and is in no read of the file."""
    library = memory_directory / "libpixman-1.so.0"
    shutil.copy(LIBRARY, library)
    size = library.stat().st_size
    assert size % 4096
    with qemu.running(binary, env={"LD_LIBRARY_PATH": str(memory_directory)}) as vm:
        tamper.map_file(vm.pid, library)
        watched.approve()
        watched.assert_good(vm.uuid)
        import ctypes
        import mmap

        with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
            ctypes.c_ubyte.from_buffer(shared, size - 1)
            base = ctypes.addressof(ctypes.c_ubyte.from_buffer(shared))
            ctypes.memset(base + size, 0xCC, 8)
        assert {finding.code for finding in watched.findings(vm.uuid)} == {Code.FILE_ALTERED}


def test_file_mapped_later(watched: Watched, vm: qemu.Vm, tmp_path: Path) -> None:
    """What dlopen does: of a file that is approved, legal; of another, a finding."""
    approved, unknown = tmp_path / "approved.so", tmp_path / "unknown.so"
    shutil.copy(LIBRARY, approved)
    shutil.copy(LIBRARY, unknown)
    tamper.map_file(vm.pid, approved)
    watched.approve()
    watched.assert_good(vm.uuid)
    tamper.map_file(vm.pid, approved)
    watched.assert_good(vm.uuid)
    tamper.map_file(vm.pid, unknown)
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.FILE_UNKNOWN
    assert str(unknown) in finding.subject


def test_file_of_the_process_itself_cut_short(watched: Watched, vm: qemu.Vm, tmp_path: Path) -> None:
    """A process that truncates what it mapped spoils its own reading and not the measurer."""
    own = tmp_path / "own.so"
    shutil.copy(LIBRARY, own)
    os.chown(own, 65534, 65534)
    tamper.map_file(vm.pid, own)
    watched.approve()
    watched.assert_good(vm.uuid)
    os.truncate(own, 4096)
    watched.files()
    assert watched.verdicts(vm.uuid)[3].status is not Status.VERIFIED


def test_device_is_not_opened(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    tamper.map_file(vm.pid, Path("/dev/zero"), length=4096)
    (finding,) = watched.findings(vm.uuid)
    assert finding.code == Code.FILE_UNREADABLE
    assert "/dev/zero" in finding.subject
    assert "regular" in finding.seen


def test_page_migration_and_reclaim_are_innocent(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    compact = Path("/proc/sys/vm/compact_memory")
    for _ in range(10):
        if compact.exists():
            compact.write_text("1")
        # MADV_PAGEOUT on the text drops it from the process's page table.
        text = tamper.mapping(vm.pid, "qemu-under-test", READ | EXEC)
        tamper.syscall(vm.pid, tamper.SYS_MADVISE, text.start, text.end - text.start, 21)
        watched.assert_good(vm.uuid)


@pytest.mark.slow
def test_vms_that_come_and_go(watched: Watched, binary: Path, vm: qemu.Vm) -> None:
    watched.approve()
    steady = vm.uuid
    for number in range(100):
        other = qemu.start(binary, settle=number % 10 == 0)
        try:
            for _ in range(number % 4):
                for verdict in watched.verdicts(other.uuid):
                    assert not verdict.findings, verdict
                time.sleep(0.002)
        finally:
            other.kill()
        for verdict in watched.verdicts(other.uuid)[3:]:
            assert verdict.status is Status.PENDING
        watched.assert_good(steady)
