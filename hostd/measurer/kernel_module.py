"""What a loaded module should look like in memory, from its file (pure).

The file is relocated as the kernel's loader does it (arch/x86/kernel/module.c `apply_relocate_add`): its
sections go where /sys/module/NAME/sections says, its undefined symbols to what the running kernel exports
under that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.measurer.kernel_elf import ALLOC, EXEC, WRITE, MalformedElfError, parse_elf
from hostd.measurer.kernel_image import Area, Image, SiteTables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hostd.measurer.kernel_elf import ElfSymbol, Section

SORTED: Final = frozenset({"__ex_table", ".orc_unwind", ".orc_unwind_ip", "__mcount_loc"})
"""Read-only tables that the kernel sorts when it loads a module; held to what they were at first sight."""
ONCE: Final = frozenset({".data..ro_after_init", "__jump_table"})
"""Written while the module starts, and read-only after that."""
PER_CPU: Final = ".data..percpu"
_DROPPED: Final = (".init", ".modinfo", "__versions", ".BTF")
_ABSOLUTE: Final = 0xFFF1
_R_64, _R_PC32, _R_PLT32, _R_32, _R_32S, _R_PC64 = 1, 2, 4, 10, 11, 24
_SIZES: Final = {_R_64: 8, _R_PC32: 4, _R_PLT32: 4, _R_32: 4, _R_32S: 4, _R_PC64: 8}
_RELATIVE: Final = frozenset({_R_PC32, _R_PLT32, _R_PC64})
_TABLES: Final = {
    "paravirt": ".parainstructions",
    "retpolines": ".retpoline_sites",
    "returns": ".return_sites",
    "alternatives": ".altinstructions",
    "locks": ".smp_locks",
    "ftrace": "__mcount_loc",
    "jumps": "__jump_table",
    "calls": ".static_call_sites",
}


class ModuleFile:
    """A module file, laid out where the running kernel has it.

    `places` are addresses of its sections; `exported(name)` gives an exported symbol's address and
    `own(name)` that of one of the module's own symbols, both None if there is none.

    Raises:
        MalformedElfError: not a module file.
    """

    def __init__(
        self,
        name: str,
        data: bytes,
        places: Mapping[str, int],
        exported: Callable[[str], int | None],
        own: Callable[[str], int | None],
    ) -> None:
        self._name = name
        self._elf = parse_elf(data)
        self._places = places
        self._exported = exported
        self._symbols = self._elf.symbols()
        self._own = own
        self._found: dict[int, int | None] = {}
        self._made: dict[int, bytes] = {}
        self.unresolved: set[str] = set()
        """Names that nothing exports; what they fill in stays as it is in the file."""

    def image(self) -> Image:
        """Areas and sites.

        Raises:
            MalformedElfError: a relocation is not one that the kernel applies.
            MalformedTableError: a table of sites is not of its form.
        """
        image = Image(self._name, [])
        for section in self._elf.sections:
            address = self._places.get(section.name)
            kept = section.flags & ALLOC and section.size and not section.name.startswith(_DROPPED)
            if address is None or not kept or self._elf.named(section.name) is not section:
                continue
            if section.name in ONCE or section.name in SORTED:
                image.areas.append(Area(section.name, address, section.size, None))
            elif not section.flags & WRITE:
                image.areas.append(
                    Area(section.name, address, section.size, bytearray(self.relocated(section)))
                )
        SiteTables(image, self._table, self._replacement).collect(self._trampolines(), ())
        return image

    def relocated(self, section: Section) -> bytes:
        """A section's bytes as the loader leaves them.

        Raises:
            MalformedElfError: see `image`.
        """
        made = self._made.get(section.index)
        if made is not None:
            return made
        base = self._places.get(section.name, 0)
        content = bytearray(self._elf.content(section))
        for item in self._elf.relocations(section):
            size = _SIZES.get(item.kind)
            if size is None or item.symbol >= len(self._symbols) or item.offset + size > len(content):
                raise MalformedElfError(f"{section.name}: relocation {item.kind} at {item.offset:#x}")
            value = self._value(self._symbols[item.symbol])
            if value is None:
                continue
            value += item.addend - (base + item.offset if item.kind in _RELATIVE else 0)
            content[item.offset : item.offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        made = self._made[section.index] = bytes(content)
        return made

    def data_at(self, name: str) -> tuple[int, bytes] | None:
        """(address, relocated bytes) of a data object by its symbol; None: the file does not define it."""
        for symbol in self._symbols:
            if symbol.name != name or not 0 < symbol.section < len(self._elf.sections) or not symbol.size:
                continue
            section = self._elf.sections[symbol.section]
            if symbol.value + symbol.size <= section.size and section.name in self._places:
                data = self.relocated(section)[symbol.value : symbol.value + symbol.size]
                return self._places[section.name] + symbol.value, data
        return None

    def executable(self) -> list[tuple[int, int]]:
        """(address, length) of its code."""
        return [
            (self._places[section.name], section.size)
            for section in self._elf.sections
            if section.flags & EXEC and section.name in self._places
        ]

    def _base(self, section: Section) -> int | None:
        """Where a section is. Of per-CPU and empty ones sysfs does not say; a symbol in it does."""
        if section.name in self._places and section.name != PER_CPU:
            return self._places[section.name]
        if section.index not in self._found:
            self._found[section.index] = next(
                (
                    at - symbol.value
                    for symbol in self._symbols
                    if symbol.section == section.index
                    and symbol.name
                    and (at := self._own(symbol.name)) is not None
                ),
                None,
            )
        return self._found[section.index]

    def _value(self, symbol: ElfSymbol) -> int | None:
        if symbol.section == 0:
            found = self._exported(symbol.name)
            if found is None:
                self.unresolved.add(symbol.name)
            return found
        if symbol.section == _ABSOLUTE:
            return symbol.value
        if symbol.section >= len(self._elf.sections):
            raise MalformedElfError(f"{symbol.name} is in no section")
        base = self._base(self._elf.sections[symbol.section])
        return None if base is None else base + symbol.value

    def _table(self, name: str) -> tuple[int, bytes] | None:
        section = self._elf.named(_TABLES[name])
        if section is None or section.name not in self._places:
            return None
        return self._places[section.name], self.relocated(section)

    def _replacement(self, address: int, size: int) -> bytes:
        for name in (".altinstr_replacement", ".altinstr_aux"):
            section = self._elf.named(name)
            place = self._places.get(name)
            if section is not None and place is not None:
                at = address - place
                if at >= 0 and at + size <= section.size:
                    return self.relocated(section)[at : at + size]
        return b""

    def _trampolines(self) -> list[int]:
        found = []
        for symbol in self._symbols:
            if symbol.name.startswith("__SCT__") and 0 < symbol.section < len(self._elf.sections):
                value = self._value(symbol)
                if value is not None:
                    found.append(value)
        return found
