"""A file's dynamic symbols: lookup by name and version as the dynamic linker does it (pure).

Follows glibc elf/dl-lookup.c (`do_lookup_x`, `check_match`) and dl-version.c. What a file defines is found
through its GNU hash table (its Bloom filter answers most questions with two bit tests), or through a
dictionary where it has only the older table.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.measurer.elf import MalformedElfError
from hostd.measurer.elf_image import (
    DT_GNU_HASH,
    DT_HASH,
    DT_STRSZ,
    DT_STRTAB,
    DT_SYMTAB,
    DT_VERDEF,
    DT_VERDEFNUM,
    DT_VERNEED,
    DT_VERNEEDNUM,
    DT_VERSYM,
    string,
)

if TYPE_CHECKING:
    from hostd.measurer.elf_image import Image

MAX_SYMBOLS: Final = 1_000_000
"""Of one file; QEMU has 20,024."""
MAX_VERSIONS: Final = 4096
MAX_CHAIN: Final = 256
"""Symbols tried for one name; a table that needs more was not made by a linker."""

SYMBOL: Final = struct.Struct("<IBBHQQ")
STB_LOCAL, STB_WEAK, STB_UNIQUE = 0, 2, 10
STT_TLS, STT_IFUNC = 6, 10
_TYPES: Final = frozenset({0, 1, 2, 5, STT_TLS, STT_IFUNC})
SHN_UNDEF, SHN_ABS = 0, 0xFFF1
_HIDDEN, _INDEX = 0x8000, 0x7FFF


class Symbol(NamedTuple):
    """One entry of the dynamic symbol table."""

    name: bytes
    info: int
    other: int
    section: int
    value: int
    size: int

    @property
    def type(self) -> int:
        return self.info & 15

    @property
    def binding(self) -> int:
        return self.info >> 4

    @property
    def own(self) -> bool:
        """Never looked up elsewhere: local, or of a visibility below default. (A protected one is its own
        definition too.)"""
        return self.binding == STB_LOCAL or (bool(self.other & 3) and self.section != SHN_UNDEF)


class Wanted(NamedTuple):
    """What a reference asks for."""

    name: bytes
    version: bytes
    """Empty: none."""
    hidden: bool
    """The version's own flag: only a definition with this version will do."""


class Filter(NamedTuple):
    """The Bloom filter of a GNU hash table: a name may be there only if both of its bits are set, bits
    `hash % 64` and `hash >> shift % 64` of word `hash / 64 & mask`."""

    bloom: array[int]
    mask: int
    shift: int


@dataclass(frozen=True, slots=True)
class SymbolTable:
    """One file's dynamic symbols. Every name was found to be inside the string table, and to end there."""

    count: int
    """Symbols that can be referred to."""
    _symbols: bytes
    _strings: bytes
    _versions: array[int]
    """Entry of the version table for each symbol; empty: the file has no versions."""
    _names: dict[int, tuple[bytes, bool]]
    """Version index → (name, hidden)."""
    _gnu: _GnuHash | None
    _old: dict[bytes, tuple[int, ...]]

    def symbol(self, index: int) -> Symbol:
        """One symbol; `index` below `count`."""
        name, info, other, section, value, size = SYMBOL.unpack_from(self._symbols, index * SYMBOL.size)
        return Symbol(self._name(name), info, other, section, value, size)

    def version(self, index: int) -> tuple[bytes, bool]:
        """(version name, hidden) that a symbol's reference asks for or its definition has."""
        if index >= len(self._versions):
            return b"", False
        return self._names.get(self._versions[index] & _INDEX, (b"", False))

    def wanted(self, index: int) -> Wanted:
        """What a reference through this symbol asks for."""
        version, hidden = self.version(index)
        return Wanted(self.symbol(index).name, version, hidden)

    def find(self, wanted: Wanted, hashed: int, *, slot: bool) -> int | None:
        """Index of the definition that answers a reference.

        `hashed`: `gnu_hash` of the name. `slot`: for a jump slot or TLS, for which the address of a stub
        in the program does not count as a definition.
        """
        newest: list[int] = []
        for index in self._candidates(wanted.name, hashed):
            name, info, _, section, value, _ = SYMBOL.unpack_from(self._symbols, index * SYMBOL.size)
            if info & 15 not in _TYPES or info >> 4 == STB_LOCAL:
                continue
            if (not value and section != SHN_ABS and info & 15 != STT_TLS) or (slot and not section):
                continue
            if self._name(name) != wanted.name:
                continue
            if not self._versions:
                return index
            entry = self._versions[index] if index < len(self._versions) else 1
            if wanted.version:
                own, _ = self._names.get(entry & _INDEX, (b"", False))
                if own == wanted.version or not (wanted.hidden or own or entry & _HIDDEN):
                    return index
            elif entry & _INDEX < 3:
                return index
            elif not entry & _HIDDEN:
                newest.append(index)
        return newest[0] if len(newest) == 1 else None

    def _name(self, at: int) -> bytes:
        return self._strings[at : self._strings.index(0, at)]

    @property
    def filter(self) -> Filter | None:
        """What tells of most names that the file does not define them; None: it has no such thing."""
        gnu = self._gnu
        return None if gnu is None else Filter(gnu.bloom, len(gnu.bloom) - 1, gnu.shift)

    def _candidates(self, name: bytes, hashed: int) -> tuple[int, ...] | list[int]:
        if self._gnu is not None:
            return self._gnu.candidates(hashed, self.count)
        return self._old.get(name, ())


@dataclass(frozen=True, slots=True)
class _GnuHash:
    """The DT_GNU_HASH section, as arrays."""

    first: int
    """Index of the first symbol it covers."""
    shift: int
    bloom: array[int]
    buckets: array[int]
    chain: array[int]

    def candidates(self, hashed: int, count: int) -> list[int]:
        index = self.buckets[hashed % len(self.buckets)]
        found: list[int] = []
        if index < self.first:
            return found
        for _ in range(MAX_CHAIN):
            at = index - self.first
            if at >= len(self.chain) or index >= count:
                break
            entry = self.chain[at]
            if (entry ^ hashed) >> 1 == 0:
                found.append(index)
            if entry & 1:
                break
            index += 1
        return found


def gnu_hash(name: bytes) -> int:
    """Hash of a name in DT_GNU_HASH (Bernstein's), 32 bits."""
    hashed = 5381
    for byte in name:
        hashed = (hashed * 33 + byte) & 0xFFFFFFFF
    return hashed


def parse_symbols(data: memoryview, image: Image, referred: int) -> SymbolTable:
    """Reads the dynamic symbol table. `referred`: the highest index that a relocation uses.

    Raises:
        MalformedElfError: a table is damaged or over its bound.
    """
    address = image.value(DT_SYMTAB)
    if address is None:
        raise MalformedElfError("has no dynamic symbols")
    strings = bytes(image.table(data, DT_STRTAB, DT_STRSZ, 1))
    gnu = _gnu(data, image)
    count = 0
    if gnu is not None:
        count = gnu.first + len(gnu.chain)
    elif (old := image.value(DT_HASH)) is not None:
        at = image.offset_of(old, 8)
        count = int.from_bytes(data[at + 4 : at + 8], "little")
    count = max(count, referred + 1)
    if count > MAX_SYMBOLS:
        raise MalformedElfError(f"{count} dynamic symbols")
    at = image.offset_of(address, count * SYMBOL.size)
    symbols = bytes(data[at : at + count * SYMBOL.size])
    if strings[-1:] != b"\0" or max(array("I", symbols)[:: SYMBOL.size // 4], default=0) >= len(strings):
        raise MalformedElfError("a name is outside the string table")
    versions = array("H")
    table = image.value(DT_VERSYM)
    if table is not None:
        at = image.offset_of(table, count * 2)
        versions.frombytes(data[at : at + count * 2])
    return SymbolTable(
        count=count,
        _symbols=symbols,
        _strings=strings,
        _versions=versions,
        _names=_version_names(data, image, strings),
        _gnu=gnu,
        _old={} if gnu is not None else _by_name(symbols, strings),
    )


def _by_name(symbols: bytes, strings: bytes) -> dict[bytes, tuple[int, ...]]:
    found: dict[bytes, tuple[int, ...]] = {}
    for index, (name, _, _, section, _, _) in enumerate(SYMBOL.iter_unpack(symbols)):
        if index and section:
            text = string(strings, name)
            found[text] = (*found.get(text, ()), index)[:MAX_CHAIN]
    return found


def _gnu(data: memoryview, image: Image) -> _GnuHash | None:
    address = image.value(DT_GNU_HASH)
    if address is None:
        return None
    at = image.offset_of(address, 16)
    buckets, first, words, shift = struct.unpack_from("<IIII", data, at)
    if not 0 < buckets <= MAX_SYMBOLS or not 0 < words <= MAX_SYMBOLS or words & (words - 1) or shift > 31:
        raise MalformedElfError("a hash table of impossible sizes")
    at = image.offset_of(address, 16 + words * 8 + buckets * 4) + 16
    bloom = array("Q", bytes(data[at : at + words * 8]))
    at += words * 8
    heads = array("I", bytes(data[at : at + buckets * 4]))
    at += buckets * 4
    last = max(heads)
    if last > MAX_SYMBOLS:
        raise MalformedElfError(f"{last} dynamic symbols")
    if last < first:
        return _GnuHash(first, shift, bloom, heads, array("I"))
    length = last - first + 1
    tail = data[at + (length - 1) * 4 : at + (length + MAX_CHAIN) * 4]
    extra = next((n for n in range(len(tail) // 4) if tail[n * 4] & 1), None)
    if extra is None:
        raise MalformedElfError("the last chain of the hash table has no end")
    length += extra
    return _GnuHash(first, shift, bloom, heads, array("I", bytes(data[at : at + length * 4])))


def _version_names(data: memoryview, image: Image, strings: bytes) -> dict[int, tuple[bytes, bool]]:
    """Version index → (name, hidden), of what the file defines and what it needs (gABI-like "Symbol
    Versioning" of the LSB; Elf64_Verdef, Elf64_Verneed)."""
    names: dict[int, tuple[bytes, bool]] = {}
    for at in _chain(data, image, DT_VERDEF, DT_VERDEFNUM, 20, 16):
        _, flags, index, count, _, aux, _ = struct.unpack_from("<HHHHIII", data, at)
        # VER_FLG_BASE: the file's own name, which is no version.
        if not flags & 1 and count:
            names[index & _INDEX] = (string(strings, _u32(data, at + aux)), False)
    for at in _chain(data, image, DT_VERNEED, DT_VERNEEDNUM, 16, 12):
        _, count, _, aux, _ = struct.unpack_from("<HHIII", data, at)
        at += aux
        for _ in range(count):
            if at + 16 > len(data):
                raise MalformedElfError("a needed version is outside the file")
            _, _, index, name, following = struct.unpack_from("<IHHII", data, at)
            if len(names) >= MAX_VERSIONS:
                raise MalformedElfError(f"over {MAX_VERSIONS} versions")
            names[index & _INDEX] = (string(strings, name), bool(index & _HIDDEN))
            if not following:
                break
            at += following
    return names


def _chain(
    data: memoryview, image: Image, address_tag: int, count_tag: int, size: int, link: int
) -> list[int]:
    """Offsets of linked version entries."""
    address, count = image.value(address_tag), image.value(count_tag)
    if address is None or not count:
        return []
    if count > MAX_VERSIONS:
        raise MalformedElfError(f"{count} versions")
    at = image.offset_of(address, size)
    found: list[int] = []
    for _ in range(count):
        if at + size > len(data):
            raise MalformedElfError("a version is outside the file")
        found.append(at)
        following = _u32(data, at + link)
        if not following:
            break
        at += following
    return found


def _u32(data: memoryview, at: int) -> int:
    if at + 4 > len(data):
        raise MalformedElfError("a version is outside the file")
    return int.from_bytes(data[at : at + 4], "little")
