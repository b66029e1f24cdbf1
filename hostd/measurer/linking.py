"""Which definition each reference of a process's files leads to, as the dynamic linker decides (pure).

Order of search (glibc elf/dl-deps.c, dl-lookup.c): the program, what it needs, what those need, breadth
first; a file that asks for it (DT_SYMBOLIC) looks in itself before. Files that are mapped and that nobody
needs were preloaded or opened later (dlopen): they look in the program's scope, then in their own. Which of
the two they are is not asked of the process, which could lie: `alternatives` gives every definition of the
same name and version, and a slot that leads to one of them is legal when it is first seen, and counted.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.core.reference import DELETED
from hostd.measurer.elf_image import DT_SYMTAB, parse_image
from hostd.measurer.elf_relocations import (
    R_64,
    R_DTPMOD64,
    R_DTPOFF64,
    R_GLOB_DAT,
    R_IRELATIVE,
    R_JUMP_SLOT,
    R_SIZE64,
    R_TLSDESC,
    R_TPOFF64,
    WORD,
    Named,
    parse_relocations,
)
from hostd.measurer.elf_symbols import (
    SHN_ABS,
    STT_IFUNC,
    STT_TLS,
    Filter,
    SymbolTable,
    Wanted,
    gnu_hash,
    parse_symbols,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.measurer.elf_image import Image
    from hostd.measurer.elf_relocations import Relocated

_BY_SLOT: Final = frozenset({R_JUMP_SLOT, R_DTPMOD64, R_DTPOFF64, R_TPOFF64, R_TLSDESC})
"""Lookups for which a stub in the program is no definition (elf_machine_type_class)."""
_WORDS: Final = (1 << 64) - 1
NOWHERE: Final = -1
STEP_SLOTS: Final = 32
"""References linked in one step. One takes some 10 us, and 10 ms if its process maps 512 files whose tables
were made to be slow."""
SERVED: Final = tuple(
    Wanted(name, b"", False)
    for name in (b"malloc", b"calloc", b"realloc", b"free", b"pthread_mutex_lock", b"pthread_mutex_unlock")
)
"""Functions of other files that the dynamic linker keeps in its protected data (glibc elf/dl-minimal.c
`__rtld_malloc_init_real`, sysdeps/nptl/dl-mutex.c)."""
LINKER: Final = b"ld-"
"""How the dynamic linker's own name starts (ld-linux-x86-64.so.2)."""


@dataclass(frozen=True, slots=True)
class Module:
    """One file, as far as linking it goes; the digest is of the very bytes that were parsed."""

    number: int
    path: str
    sha256: bytes
    image: Image
    relocated: Relocated
    symbols: SymbolTable

    @property
    def names(self) -> frozenset[bytes]:
        return frozenset({self.image.soname, os.fsencode(os.path.basename(self.path.removesuffix(DELETED)))})

    @property
    def is_linker(self) -> bool:
        return self.image.soname.startswith(LINKER)


def parse_module(data: memoryview, number: int, path: str, sha256: bytes) -> Module | None:
    """Parses a whole file; None: nothing that is linked dynamically.

    Raises:
        MalformedElfError: damaged, or with something that cannot be recomputed.
    """
    image = parse_image(data)
    if image is None or image.value(DT_SYMTAB) is None:
        return None
    relocated = parse_relocations(data, image)
    items = (*relocated.named, *relocated.loose, *relocated.copies)
    symbols = parse_symbols(data, image, max((item.symbol for item in items), default=0))
    return Module(number, path, sha256, image, relocated, symbols)


class Target(NamedTuple):
    """Where a reference leads: `value` in the file of module `module` (its position in the list), or an
    absolute value with module `NOWHERE`."""

    module: int
    value: int
    ifunc: bool = False
    size: int = 0


NONE: Final = Target(NOWHERE, 0)
"""A weak reference that nothing defines."""


class Slot(NamedTuple):
    """A named relocation and what it leads to. A `soft` one has a value that only the process knows:
    `ifunc` (a resolver chose it), `tls`, `linker`."""

    item: Named
    target: Target
    soft: str = ""
    stub: int | None = None
    """The other legal value of a lazily bound slot: an address in its own file."""

    def value(self, bases: list[int]) -> int:
        """The address that belongs there; for `ifunc` that of the resolver, for other soft slots nothing."""
        base = 0 if self.target.module == NOWHERE else bases[self.target.module]
        return (base + self.target.value) & _WORDS


@dataclass(slots=True)
class Linking:
    """The files of a process in the order they are mapped, linked. Holds for every process with the same."""

    modules: tuple[Module, ...]
    main: int
    slots: list[tuple[Slot, ...]] = field(default_factory=list)
    """Named relocations in the protected region of each module."""
    loose: list[tuple[Slot, ...]] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    """Files or symbols that are needed and not there: linking is not complete."""
    _scope: list[int] = field(default_factory=list)
    _filters: list[Filter | None] = field(default_factory=list)
    _found: dict[tuple[int, Wanted, bool], Target | None] = field(default_factory=dict)
    _hashes: dict[bytes, int] = field(default_factory=dict)
    _orders: dict[int, list[int]] = field(default_factory=dict)
    _work: Iterator[bool] | None = None

    def step(self) -> bool:
        """Links a few more references; False: all are."""
        if self._work is None:
            self._scope = self._reach(self.main)
            self._filters = [module.symbols.filter for module in self.modules]
            self._work = self._steps()
        return next(self._work, False)

    def _steps(self) -> Iterator[bool]:
        for number, module in enumerate(self.modules):
            relocated = module.relocated
            slots: list[Slot] = []
            loose: list[Slot] = []
            for item in relocated.named:
                slots.append(self._slot(number, item))
                if not len(slots) % STEP_SLOTS:
                    yield True
            for item, word in zip(relocated.loose, relocated.loose_words, strict=True):
                loose.append(self._slot(number, item, word))
                if not len(loose) % STEP_SLOTS:
                    yield True
            self.slots.append(tuple(slots))
            self.loose.append(tuple(loose))
            yield True

    def _reach(self, start: int) -> list[int]:
        """A module and what it needs, breadth first."""
        by_name = {name: number for number, module in enumerate(self.modules) for name in module.names}
        found = [start]
        todo = deque(found)
        while todo:
            for name in self.modules[todo.popleft()].image.needed:
                number = by_name.get(name)
                if number is None:
                    if len(self.unmet) < 16:
                        self.unmet.append(name.decode("utf-8", "backslashreplace")[:200])
                elif number not in found:
                    found.append(number)
                    todo.append(number)
        return found

    def _slot(self, number: int, item: Named, word: int | None = None) -> Slot:
        if not item.type:
            return Slot(item, NONE, "linker")
        if item.type == R_IRELATIVE:
            return Slot(item, Target(number, item.addend, ifunc=True), "ifunc")
        stub = word if item.type == R_JUMP_SLOT and word else None
        if item.type in (R_DTPMOD64, R_TPOFF64, R_TLSDESC):
            return Slot(item, NONE, "tls")
        target = self.resolve(number, item)
        if target is None:
            # A lazily bound slot may name what is nowhere; it then stays as it is.
            if stub is None and len(self.unmet) < 16:
                self.unmet.append(self.name_of(number, item)[:200])
            return Slot(item, NONE if stub is None else Target(number, stub), "", stub)
        if item.type == R_SIZE64:
            return Slot(item, Target(NOWHERE, target.size + item.addend))
        if item.type == R_DTPOFF64:
            return Slot(item, Target(NOWHERE, target.value + item.addend))
        if target.ifunc:
            return Slot(item, target, "ifunc", stub)
        addend = item.addend if item.type == R_64 else 0
        return Slot(item, target._replace(value=target.value + addend), "", stub)

    def resolve(self, number: int, item: Named) -> Target | None:
        """The definition that a relocation of a module leads to; None if there must be one and is none."""
        symbol = self.modules[number].symbols.symbol(item.symbol)
        if not item.symbol or symbol.own:
            return self._target(number, item.symbol)
        wanted = self.modules[number].symbols.wanted(item.symbol)
        slot = item.type in _BY_SLOT
        module = self.modules[number]
        in_scope = number in self._scope and not module.image.symbolic
        key = (NOWHERE if in_scope else number, wanted, slot)
        if key not in self._found:
            if number not in self._orders:
                self._orders[number] = self._order(number)
            self._found[key] = self._search(self._orders[number], wanted, slot)
        found = self._found[key]
        if found is None and symbol.binding == 2:
            return NONE
        return found

    def _order(self, number: int) -> list[int]:
        module = self.modules[number]
        order = [number] if module.image.symbolic else []
        order += self._scope
        if number not in self._scope:
            unmet = len(self.unmet)
            order += self._reach(number)
            del self.unmet[unmet:]
            order += range(len(self.modules))
        return list(dict.fromkeys(order))

    def _search(self, order: list[int], wanted: Wanted, slot: bool) -> Target | None:
        hashed = self._hash(wanted.name)
        for number in order:
            # Most files do not have the name, which the filter tells without a call.
            known = self._filters[number]
            if known is not None:
                word = known.bloom[(hashed >> 6) & known.mask]
                if not word >> (hashed & 63) & word >> (hashed >> known.shift & 63) & 1:
                    continue
            index = self.modules[number].symbols.find(wanted, hashed, slot=slot)
            if index is not None:
                return self._target(number, index)
        return None

    def _hash(self, name: bytes) -> int:
        hashed = self._hashes.get(name)
        if hashed is None:
            hashed = self._hashes[name] = gnu_hash(name)
        return hashed

    def _target(self, number: int, index: int) -> Target:
        if not index:
            return Target(number, 0)
        symbol = self.modules[number].symbols.symbol(index)
        absolute = symbol.section == SHN_ABS or symbol.type == STT_TLS
        return Target(NOWHERE if absolute else number, symbol.value, symbol.type == STT_IFUNC, symbol.size)

    def alternatives(self, number: int, item: Named) -> list[Target]:
        """Every definition, in any file, of the name and version that a relocation asks for."""
        if not item.symbol or item.type not in (R_64, R_GLOB_DAT, R_JUMP_SLOT):
            return []
        wanted = self.modules[number].symbols.wanted(item.symbol)
        addend = item.addend if item.type == R_64 else 0
        found = (self._search([other], wanted, False) for other in range(len(self.modules)))
        return [target._replace(value=target.value + addend) for target in found if target is not None]

    def served(self) -> frozenset[Target]:
        """Definitions, in any file, of what the dynamic linker itself calls in others."""
        found = (self._search([n], wanted, True) for wanted in SERVED for n in range(len(self.modules)))
        return frozenset(target for target in found if target is not None)

    def name_of(self, number: int, item: Named) -> str:
        """`writev@GLIBC_2.2.5`; empty for a relocation without a symbol."""
        wanted = self.modules[number].symbols.wanted(item.symbol)
        name = wanted.name + (b"@" + wanted.version if wanted.version else b"")
        return name.decode("utf-8", "backslashreplace")[:256]

    def copied(self, number: int) -> list[tuple[int, int]]:
        """(start, end) of objects that the module has copied from others, in its protected region."""
        module = self.modules[number]
        start, end = module.image.relro
        found = []
        for item in module.relocated.copies:
            size = module.symbols.symbol(item.symbol).size
            if start <= item.address < end:
                found.append((item.address // WORD * WORD, min(end, item.address + size)))
        return found
