"""Changes L1's memory from outside, behind the back of the kernel there: no taint, no module, no trace.

Where a byte lies is learned from inside (page frame numbers, symbols) and from the page tables, read from
outside too. Under emulation the processor goes on running what it has translated already.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from typing import Final

from qemu.host import LabHost

PAGE: Final = 4096
_LOW_END: Final = 2 << 30  # QEMU's q35: RAM beyond it continues at 4 GiB (hw/i386/pc_q35.c)
_HIGH: Final = 4 << 30
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000  # of a page table entry (Intel SDM vol. 3, 4.5)
_PRESENT, _LARGE = 1, 1 << 7
# In L1: the frame of a process's page, after touching it. Arguments: pid, address (hexadecimal).
_FRAME: Final = """
import os, struct, sys
pid, address = int(sys.argv[1]), int(sys.argv[2], 16)
with open(f"/proc/{pid}/mem", "rb", 0) as memory:
    os.pread(memory.fileno(), 1, address)
with open(f"/proc/{pid}/pagemap", "rb", 0) as table:
    entry, = struct.unpack("<Q", os.pread(table.fileno(), 8, address // 4096 * 8))
print(entry & (1 << 55) - 1 if entry >> 63 else 0)
"""
# In L1: addresses of symbols, and where the kernel's code starts physically.
_SYMBOLS: Final = """
import json, sys
wanted, found = set(sys.argv[1:]), {}
for line in open("/proc/kallsyms"):
    address, _kind, name = line.split()[:3]
    if name in wanted:
        found.setdefault(name, int(address, 16))
for line in open("/proc/iomem"):
    if line.strip().endswith(": Kernel code"):
        found["Kernel code"] = int(line.split("-")[0], 16)
print(json.dumps(found))
"""
_FIVE_LEVELS: Final = "grep -qw la57 /proc/cpuinfo"  # the kernel hides the flag where it does not use it


@dataclass(frozen=True, slots=True)
class Flip:
    """A byte of L1's RAM that was changed."""

    host: LabHost
    physical: int
    old: int
    new: int

    def put_back(self) -> None:
        """Write the old byte again."""
        with self.host.memory() as ram:
            ram[_place(self.physical)] = self.old


def symbols(host: LabHost, *names: str) -> dict[str, int]:
    """Addresses of kernel symbols, and ``Kernel code``, the physical address of ``_text``."""
    found: dict[str, int] = json.loads(host.run(["python3", "-c", _SYMBOLS, *names]).stdout)
    return found


def flip_process(host: LabHost, pid: int, address: int, new: int) -> Flip:
    """Change a byte of a page that a process has mapped: of a file's, it is the page cache's."""
    frame = int(host.run(["python3", "-c", _FRAME, str(pid), f"{address:x}"]).text)
    if not frame:
        raise LookupError(f"pid {pid} has no page at {address:#x}")
    return _flip(host, frame * PAGE + address % PAGE, new)


def read_kernel(host: LabHost, address: int, length: int) -> bytes:
    """Bytes of kernel or module memory, within one page, read from outside."""
    with host.memory() as ram:
        place = _place(_physical(host, ram, address))
        return ram[place : place + length]


def flip_kernel(host: LabHost, address: int, new: int) -> Flip:
    """Change a byte of kernel or module memory."""
    with host.memory() as ram:
        physical = _physical(host, ram, address)
    return _flip(host, physical, new)


def harmless(code: bytes) -> tuple[int, int]:
    """Offset and new value of a byte in a function's beginning that may be changed while it runs.

    ``push r8``–``r15`` is 41 5x; with 49 (REX.W) in place of 41 it is the same instruction.
    """
    for at in range(len(code) - 1):
        if code[at] == 0x41 and 0x50 <= code[at + 1] <= 0x57:
            return at, 0x49
    raise LookupError(f"no push of a high register in {code.hex(' ')}")


def _flip(host: LabHost, physical: int, new: int) -> Flip:
    with host.memory() as ram:
        place = _place(physical)
        old, ram[place] = ram[place], new
    return Flip(host, physical, old, new)


def _place(physical: int) -> int:
    """Offset in the RAM file."""
    if physical < _LOW_END:
        return physical
    if physical < _HIGH:
        raise LookupError(f"no RAM at {physical:#x}")
    return physical - _HIGH + _LOW_END


def _physical(host: LabHost, ram: mmap.mmap, address: int) -> int:
    """Walks the kernel's own page tables (Intel SDM vol. 3, 4.5)."""
    known = symbols(host, "_text", "init_top_pgt")
    table = known["init_top_pgt"] - known["_text"] + known["Kernel code"]
    five = host.run(_FIVE_LEVELS, check=False).rc == 0
    for shift in (48, 39, 30, 21, 12)[not five :]:
        place = _place(table) + (address >> shift & 511) * 8
        entry = int.from_bytes(ram[place : place + 8], "little")
        if not entry & _PRESENT:
            raise LookupError(f"{address:#x} is not mapped")
        table = entry & _ADDRESS
        if entry & _LARGE and shift in (30, 21):
            size = 1 << shift
            return (table & -size) + address % size
    return table + address % PAGE
