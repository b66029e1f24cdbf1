"""Files and mappings made to keep the measurer busy: who brings them waits, and nobody else."""

from __future__ import annotations

import mmap
import os
import struct
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostd.core.findings import Status
from hostd.core.readings import EXEC, READ
from hostd.measurer.contents import MAX_STREAMED_PER_OWNER
from hostd.measurer.elf import MalformedElfError
from hostd.measurer.elf_image import MAX_RELRO_BYTES
from hostd.measurer.linking import STEP_SLOTS, Linking, parse_module
from hostd.measurer.relro_modules import MAX_PIECES
from tests.measurer.test_relro import assert_good, reading, verdict
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from tests.support.watched import Watched

_PROGRAM = struct.Struct("<IIQQQQQQ")
_DATA = 0x1000_0000
_DYNAMIC, _STRINGS, _HASH, _SYMBOLS, _RELOCATIONS = 0x400, 0x800, 0x880, 0x900, 0x1000


def library(protected: int, named: int) -> bytes:
    """A small file with `protected` bytes that are protected (all .bss), and as many references by name."""
    table = array("Q", [0, 1 << 32 | 1, 0] * named)
    table[0::3] = array("Q", range(_DATA, _DATA + 8 * named, 8))
    size = _RELOCATIONS + 24 * named
    entries = ((5, _STRINGS), (10, 16), (6, _SYMBOLS), (4, _HASH), (7, _RELOCATIONS), (8, 24 * named), (0, 0))
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    data = bytearray(size)
    data[:64] = struct.pack(
        "<4sBBBxxxxxxxxxHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0
    )
    data[64 : 64 + 4 * 56] = (
        _PROGRAM.pack(1, 5, 0, 0, 0, size, size, 4096)
        + _PROGRAM.pack(1, 6, 0, _DATA, _DATA, 0, protected, 4096)
        + _PROGRAM.pack(2, 6, _DYNAMIC, _DYNAMIC, _DYNAMIC, len(dynamic), len(dynamic), 8)
        + _PROGRAM.pack(0x6474E552, 4, 0, _DATA, _DATA, 0, protected, 1)
    )
    data[_DYNAMIC : _DYNAMIC + len(dynamic)] = dynamic
    data[_STRINGS : _STRINGS + 16] = b"\0name".ljust(16, b"\0")
    data[_HASH : _HASH + 8] = struct.pack("<II", 1, 2)
    data[_SYMBOLS + 24 : _SYMBOLS + 48] = struct.pack("<IBBHQQ", 1, 0x12, 0, 1, 0x1000, 8)
    data[_RELOCATIONS:] = table.tobytes()
    return bytes(data)


def test_a_small_file_does_not_claim_much_memory() -> None:
    data = memoryview(library(MAX_RELRO_BYTES + 4096, 1))
    with pytest.raises(MalformedElfError, match="bytes are relocated"):
        parse_module(data, 1, "/x.so", bytes(32))


def test_linking_stops_now_and_then() -> None:
    count = 50 * STEP_SLOTS
    module = parse_module(memoryview(library(8 * count, count)), 1, "/x.so", bytes(32))
    assert module is not None
    linking = Linking((module, module), 0)
    steps = 0
    while linking.step():
        steps += 1
    assert steps >= 2 * 50
    assert [len(slots) for slots in linking.slots] == [count, count]


@pytest.mark.qemu
def test_a_file_in_many_pieces(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    assert_good(watched, vm)
    text = tamper.mapping(vm.pid, "libz.so", READ | EXEC)
    with tamper.scratch(vm.pid, text.name.encode() + b"\0") as path:
        fd = tamper.syscall(vm.pid, tamper.SYS_OPEN, path, os.O_RDONLY, 0)
    for _ in range(MAX_PIECES):
        tamper.syscall(vm.pid, tamper.SYS_MMAP, 0, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0)
    assert verdict(watched, vm).status is not Status.VERIFIED
    assert any("pieces" in text for text in reading(watched, vm).uncovered)


def _mapped(vm: qemu.Vm, path: Path, megabytes: int) -> None:
    """A file that its process may change, mapped by it as code."""
    path.write_bytes(os.urandom(1 << 20) * megabytes)
    os.chown(path, 65534, 65534)
    tamper.map_file(vm.pid, path)


@pytest.mark.qemu
def test_a_large_file_of_the_process_costs_the_others_nothing(
    watched: Watched, binary: Path, vm: qemu.Vm, tmp_path: Path
) -> None:
    with qemu.running(binary) as other:
        watched.approve()
        for number in range(2):
            _mapped(other, tmp_path / f"{number}.so", (MAX_STREAMED_PER_OWNER >> 20) - 1)
        assert watched.verdicts(other.uuid)[3].status is not Status.VERIFIED
        watched.assert_good(vm.uuid)
        known = watched.appraiser.files.known
        read = {known[item.file].path for item in watched.files().segments}
        assert len([path for path in read if path.startswith(str(tmp_path))]) == 1


@pytest.mark.qemu
def test_a_file_put_out_of_the_page_cache(watched: Watched, vm: qemu.Vm, tmp_path: Path) -> None:
    """Its segment is left out, and is there again when it has been fetched."""
    path = tmp_path / "own.so"
    _mapped(vm, path, 4)
    watched.approve()
    watched.assert_good(vm.uuid)
    number = next(n for n, known in watched.appraiser.files.known.items() if known.path == str(path))

    def there() -> bool:
        return any(item.file == number for item in watched.files().segments)

    assert there()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if there():
        pytest.skip("the page cache keeps it")
    watched.files()
    for _ in range(200):
        if there():
            break
        time.sleep(0.01)
    watched.assert_good(vm.uuid)
