"""What hangs in the kernel's code: kernel probes, functions under ftrace, and where CPUs enter it.

Sources: kernel/kprobes.c `report_probe`, kernel/trace/ftrace.c `t_show`, arch/x86/kernel/msr.c. Names are
sorted; flags that come and go by themselves ([OPTIMIZED], counters) are left out.

Needs CAP_SYS_RAWIO for /dev/cpu/*/msr, and CAP_SYSLOG to see addresses of kernel symbols.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostd.core.reading_posture import MAX_HOOKS, EntryPoint

if TYPE_CHECKING:
    from collections.abc import Callable

REGISTERS: Final = {"LSTAR": 0xC0000082, "CSTAR": 0xC0000083, "SYSENTER_EIP": 0x176}
"""Model-specific registers that hold the kernel's entry (AMD64 APM vol. 2, 6.1)."""
CPUS_PER_READING: Final = 4
"""Each register is read by an interrupt to that CPU, some 4 µs; others have their turn with the next."""
MAX_SYMBOL_BYTES: Final = 64 << 20
"""Of /proc/kallsyms, read once: 100,000 to 300,000 symbols, 5 to 20 MB."""
_SYMBOLS: Final = re.compile(rb"^([0-9a-f]{16}) [tT] (entry_SYS[A-Za-z0-9_]+|ignore_sysret)$", re.MULTILINE)
_PROBE: Final = re.compile(r"^[0-9a-fx]+\s+(\S)\s+(\S+?)(?:\s+([A-Za-z0-9_.-]+))?(?:\s*\[.*)?\s*$")
_FUNCTION: Final = re.compile(r"^(\S+(?: \[[^]\s]+\])?)")
_KINDS: Final = {"k": "kprobe", "r": "kretprobe"}
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO})


def probe_names(text: str) -> tuple[str, ...]:
    """Kernel probes as `kprobe at symbol+0x0 [module]`. A line of another form is its own name."""
    names: set[str] = set()
    for line in text.splitlines():
        match = _PROBE.match(line)
        if match is None:
            names.add(line.strip()[:256])
            continue
        kind, where, module = match.groups()
        names.add(f"{_KINDS.get(kind, kind)} at {where}{f' [{module}]' if module else ''}"[:256])
    return _bounded(names)


def traced_names(text: str) -> tuple[str, ...]:
    """Functions that call into ftrace, as `symbol [module]`."""
    # Lines that start with a blank say more of the line before (direct calls, trampolines).
    matches = (_FUNCTION.match(line) for line in text.splitlines())
    return _bounded({match[1][:256] for match in matches if match is not None})


def _bounded(names: set[str]) -> tuple[str, ...]:
    ordered = sorted(names)
    if len(ordered) > MAX_HOOKS:
        return (*ordered[:MAX_HOOKS], f"{len(ordered) - MAX_HOOKS} more")
    return tuple(ordered)


def _target(names: dict[int, str], value: bytes) -> str:
    address = int.from_bytes(value, "little")
    return names.get(address, hex(address))


class Entries:
    """Reads where CPUs enter the kernel."""

    def __init__(self, root: Path = Path("/"), pread: Callable[[int, int, int], bytes] = os.pread) -> None:
        """`pread`: of a register's device the offset is the register's number, and 8 bytes are its value."""
        self._pread = pread
        self._cpus = root / "dev/cpu"
        self._symbols = root / "proc/kallsyms"
        self._names: dict[int, str] | None = None
        self._open: dict[int, int] = {}
        self._turn: list[int] = []

    def read(self) -> tuple[EntryPoint, ...] | None:
        """The registers of the next few CPUs; None: the kernel's `msr` module is not there, or registers or
        addresses of symbols are hidden from us.

        Raises:
            OSError: a register is there and cannot be read.
        """
        try:
            return self._read()
        except PermissionError:
            return None

    def _read(self) -> tuple[EntryPoint, ...] | None:
        if not self._turn:
            self._turn = self._listed()
        if not self._turn:
            return None
        if self._names is None:
            self._names = self._read_names()
        names = self._names
        if not names:
            return None
        turn, self._turn = self._turn[:CPUS_PER_READING], self._turn[CPUS_PER_READING:]
        found: list[EntryPoint] = []
        for cpu in turn:
            try:
                fd = self._descriptor(cpu)
                values = {name: self._pread(fd, 8, number) for name, number in REGISTERS.items()}
            except OSError as error:
                self._close(cpu)
                if error.errno in _MISSING:  # switched off meanwhile
                    continue
                raise
            found += [EntryPoint(cpu, name, _target(names, value)) for name, value in values.items()]
        return tuple(found) or None

    def _listed(self) -> list[int]:
        try:
            return sorted(int(name) for name in os.listdir(self._cpus) if name.isdigit())
        except OSError as error:
            if error.errno in _MISSING:
                return []
            raise

    def _descriptor(self, cpu: int) -> int:
        if cpu not in self._open:
            self._open[cpu] = os.open(self._cpus / str(cpu) / "msr", os.O_RDONLY | os.O_CLOEXEC)
        return self._open[cpu]

    def _read_names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        with self._symbols.open("rb") as file:
            for address, name in _SYMBOLS.findall(file.read(MAX_SYMBOL_BYTES)):
                names.setdefault(int(address, 16), name.decode())
        # Without CAP_SYSLOG every address is shown as 0.
        names.pop(0, None)
        return names

    def _close(self, cpu: int) -> None:
        fd = self._open.pop(cpu, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        for cpu in list(self._open):
            self._close(cpu)
