"""What relocation does to a file's data, without its load address (pure).

`Relocated` has a region of the file as 8-byte words, split so that a process's memory is computed from
it with one multiplication: `words + ones * base` as one long integer, where `ones` is 1 in each word that
gets the load address. 1.4 MB take 5 ms this way. No carry leaves a word: a word that gets the load
address must stay below 2^63, or the file is malformed.

Sources: System V ABI, AMD64 supplement, table "Relocation Types"; gABI "Relative relocation table" (RELR);
glibc sysdeps/x86_64/dl-machine.h.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.measurer.elf import MalformedElfError
from hostd.measurer.elf_image import (
    DT_DEBUG,
    DT_GNU_HASH,
    DT_HASH,
    DT_JMPREL,
    DT_PLTGOT,
    DT_PLTREL,
    DT_PLTRELSZ,
    DT_REL,
    DT_RELA,
    DT_RELASZ,
    DT_RELR,
    DT_RELRSZ,
    DT_RELSZ,
    DT_STRTAB,
    DT_SYMTAB,
    DT_TEXTREL,
    DT_VERSYM,
    MAX_ADDRESS,
)
from hostd.platform.pages import PAGE, whole_pages

if TYPE_CHECKING:
    from hostd.measurer.elf_image import Image

R_64, R_COPY, R_GLOB_DAT, R_JUMP_SLOT, R_RELATIVE = 1, 5, 6, 7, 8
R_DTPMOD64, R_DTPOFF64, R_TPOFF64, R_SIZE64, R_TLSDESC, R_IRELATIVE = 16, 17, 18, 33, 36, 37
NAMES: Final = {
    0: "none",
    R_64: "R_X86_64_64",
    R_COPY: "R_X86_64_COPY",
    R_GLOB_DAT: "R_X86_64_GLOB_DAT",
    R_JUMP_SLOT: "R_X86_64_JUMP_SLOT",
    R_RELATIVE: "R_X86_64_RELATIVE",
    R_DTPMOD64: "R_X86_64_DTPMOD64",
    R_DTPOFF64: "R_X86_64_DTPOFF64",
    R_TPOFF64: "R_X86_64_TPOFF64",
    R_SIZE64: "R_X86_64_SIZE64",
    R_TLSDESC: "R_X86_64_TLSDESC",
    R_IRELATIVE: "R_X86_64_IRELATIVE",
}
_SLOTS: Final = frozenset({R_GLOB_DAT, R_JUMP_SLOT, R_IRELATIVE})
MAX_RELOCATIONS: Final = 1_000_000
"""Of one file; QEMU has 123,539, libLLVM 372,000."""
MAX_NAMED: Final = 65_536
"""That name a symbol; QEMU has 1,074, libLLVM 19,600."""
MAX_LOOSE: Final = 65_536
"""Slots outside the protected region; the C library has 53."""
WORD: Final = 8
ADJUSTED: Final = frozenset(
    {DT_PLTGOT, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_JMPREL, DT_RELR, DT_VERSYM, DT_GNU_HASH}
)
"""Entries of the dynamic section to which glibc adds the load address (elf/get-dynamic-info.h)."""


class Named(NamedTuple):
    """A relocation that needs more than the load address."""

    address: int
    type: int
    symbol: int
    """Index in the dynamic symbol table, 0 for none."""
    addend: int


@dataclass(frozen=True, slots=True)
class Relocated:
    """A file's relocated data. Addresses are the file's own."""

    start: int
    size: int
    """Bytes of the protected region; 0: none."""
    words: int
    """The region with addends put in, as one little-endian integer."""
    ones: int
    """1 in each word that gets the load address."""
    named: tuple[Named, ...]
    """Inside the region."""
    loose: tuple[Named, ...]
    """Slots (GLOB_DAT, JUMP_SLOT, IRELATIVE) outside the region: lazily bound, or never protected. With
    type 0: words that the dynamic linker fills in."""
    loose_words: tuple[int, ...]
    """What the file holds at each loose slot: the address of the slot's stub, if it is lazily bound."""
    copies: tuple[Named, ...]
    """Objects that are copied into this file's data (COPY)."""
    relative: int
    """How many words got the load address by RELATIVE and RELR."""
    plain: bytes
    """One bit for each word of the region, 1 where no relocation and no dynamic entry writes."""
    linker_words: frozenset[int]
    """Addresses the dynamic linker fills in: GOT[1], GOT[2], DT_DEBUG."""
    dynamic_words: frozenset[int]
    """Addresses of values in the dynamic section that may have been made absolute or not."""

    def expected(self, base: int) -> bytearray:
        """The region for a load address, named relocations not applied."""
        return bytearray((self.words + self.ones * base).to_bytes(self.size, "little"))

    def is_plain(self, address: int) -> bool:
        index = (address - self.start) // WORD
        return bool(self.plain[index >> 3] >> (index & 7) & 1)


def parse_relocations(data: memoryview, image: Image) -> Relocated:
    """Reads all relocations of a file.

    Raises:
        MalformedElfError: damaged, over a bound, or with relocations that are not known here.
    """
    if (image.value(DT_REL) and image.value(DT_RELSZ)) or image.value(DT_TEXTREL) is not None:
        raise MalformedElfError("has REL or text relocations")
    if image.value(DT_PLTREL) not in (None, DT_RELA):
        raise MalformedElfError("DT_PLTREL is not RELA")
    start, end = image.relro
    region = _Region(start, end, _content(data, image, start, end))
    _relr(image.table(data, DT_RELR, DT_RELRSZ, WORD), region, image, data)
    jumps = image.table(data, DT_JMPREL, DT_PLTRELSZ, 24)
    tables = [image.table(data, DT_RELA, DT_RELASZ, 24)]
    # The linker may count the jump slots to DT_RELA too (elf/dynamic-link.h).
    if image.value(DT_JMPREL) is not None and not _within(image, len(tables[0]), len(jumps)):
        tables.append(jumps)
    for table in tables:
        _rela(table, region)
    linker_words = _linker_words(image)
    dynamic_words = _dynamic(image, region)
    for address in linker_words:
        if region.index(address) is None:
            region.loose.append(Named(address, 0, 0, 0))
        region.written(address)
    loose = tuple(sorted(region.loose))
    return Relocated(
        start=start,
        size=end - start,
        words=int.from_bytes(region.words.tobytes(), "little"),
        ones=int.from_bytes(region.ones.tobytes(), "little"),
        named=tuple(sorted(region.named)),
        loose=loose,
        loose_words=tuple(_word(data, image, item.address) for item in loose),
        copies=tuple(region.copies),
        relative=region.relative,
        plain=region.plain(),
        linker_words=linker_words,
        dynamic_words=dynamic_words,
    )


class _Region:
    """The protected words while relocations are applied."""

    def __init__(self, start: int, end: int, content: bytes) -> None:
        self.start, self.end = start, end
        self.words = array("Q", content)
        self.ones = array("Q", bytes(len(content)))
        self._touched = bytearray(len(content) // WORD)
        self.named: list[Named] = []
        self.loose: list[Named] = []
        self.copies: list[Named] = []
        self.relative = 0

    def index(self, address: int) -> int | None:
        """Word of an address; None: it is outside the region."""
        if not self.start <= address < self.end:
            return None
        if address % WORD:
            raise MalformedElfError(f"relocates the unaligned word at {address:#x}")
        return (address - self.start) // WORD

    def based(self, address: int, addend: int) -> None:
        """The word becomes load address + addend."""
        if not 0 <= addend <= MAX_ADDRESS:
            raise MalformedElfError(f"relocates {address:#x} to {addend:#x}")
        index = self.index(address)
        if index is None:
            return
        self.words[index], self.ones[index] = addend, 1
        self._touched[index] = 1

    def many_based(self, addresses: array[int], addends: array[int]) -> None:
        start, end = self.start, self.end
        words, ones, touched = self.words, self.ones, self._touched
        for address, addend in zip(addresses, addends, strict=True):
            if start <= address < end:
                if address & 7 or addend > MAX_ADDRESS:
                    raise MalformedElfError(f"relocates {address:#x} to {addend:#x}")
                index = (address - start) >> 3
                words[index] = addend
                ones[index] = touched[index] = 1
        self.relative += len(addresses)

    def add(self, item: Named) -> None:
        if len(self.named) + len(self.loose) + len(self.copies) >= MAX_NAMED:
            raise MalformedElfError(f"over {MAX_NAMED} relocations that name a symbol")
        if item.type not in NAMES:
            raise MalformedElfError(f"relocation type {item.type} is not known")
        if item.type == R_COPY:
            self.copies.append(item)
            return
        if self.index(item.address) is not None:
            if item.type == R_TLSDESC and self.index(item.address + WORD) is None:
                raise MalformedElfError("a TLS descriptor is cut by the end of what is protected")
            self.named.append(item)
            self.written(item.address)
            if item.type == R_TLSDESC:
                self.written(item.address + WORD)
        elif item.type in _SLOTS:
            if len(self.loose) >= MAX_LOOSE:
                raise MalformedElfError(f"over {MAX_LOOSE} slots that are not protected")
            self.loose.append(item)

    def written(self, address: int) -> None:
        index = self.index(address)
        if index is not None:
            self._touched[index] = 1

    def plain(self) -> bytes:
        bits = int(bytes(49 - flag for flag in reversed(self._touched)) or b"0", 2)
        return bits.to_bytes(len(self._touched) // 8 + 1, "little")


def _content(data: memoryview, image: Image, start: int, end: int) -> bytes:
    """What the file has for a region, mapped in whole pages; zero where it has nothing (.bss)."""
    content = bytearray(end - start)
    for load in image.loads:
        # A segment's first page also shows what stands before it in the file; so does its last one
        # what follows, unless the rest of that page is .bss.
        first = max(load.address // PAGE * PAGE, load.address - load.offset)
        last = load.address + load.file_size
        if load.size == load.file_size:
            last = min(whole_pages(last), load.address - load.offset + len(data))
        low, high = max(start, first), min(end, last)
        if low < high:
            at = low - load.address + load.offset
            content[low - start : high - start] = data[at : at + high - low]
    return bytes(content)


def _word(data: memoryview, image: Image, address: int) -> int:
    return int.from_bytes(_content(data, image, address, address + WORD), "little")


def _within(image: Image, size: int, jumps: int) -> bool:
    table, plt = image.value(DT_RELA), image.value(DT_JMPREL)
    return table is not None and plt is not None and table <= plt and plt + jumps <= table + size


def _rela(table: memoryview, region: _Region) -> None:
    if len(table) // 24 > MAX_RELOCATIONS:
        raise MalformedElfError(f"over {MAX_RELOCATIONS} relocations")
    fields = array("Q", bytes(table))
    addresses, infos, addends = fields[0::3], fields[1::3], fields[2::3]
    if not addresses:
        return
    if max(addresses) > MAX_ADDRESS:
        raise MalformedElfError("a relocation is out of bounds")
    # Linkers put the RELATIVE ones first (DT_RELACOUNT, which need not be believed).
    lead = next((at for at, info in enumerate(infos) if info != R_RELATIVE), len(infos))
    region.many_based(addresses[:lead], addends[:lead])
    for address, info, addend in zip(addresses[lead:], infos[lead:], addends[lead:], strict=True):
        if info == R_RELATIVE:
            region.based(address, addend)
            region.relative += 1
        elif info & 0xFFFFFFFF:
            signed = addend - (1 << 64) if addend >> 63 else addend
            region.add(Named(address, info & 0xFFFFFFFF, info >> 32, signed))


def _relr(table: memoryview, region: _Region, image: Image, data: memoryview) -> None:
    """An even entry is an address; an odd one a bitmap of the 63 words after the last one relocated."""
    where = 0
    for entry in array("Q", bytes(table)):
        if not entry & 1:
            where = entry
            _relr_word(where, region, image)
            where += WORD
            continue
        bits = entry >> 1
        at = where
        while bits:
            if bits & 1:
                _relr_word(at, region, image)
            bits >>= 1
            at += WORD
        where += 63 * WORD


def _relr_word(address: int, region: _Region, image: Image) -> None:
    if address > MAX_ADDRESS or not any(
        load.address <= address and address + WORD <= load.address + load.size for load in image.loads
    ):
        raise MalformedElfError("a relative relocation is out of bounds")
    region.relative += 1
    if region.relative > MAX_RELOCATIONS:
        raise MalformedElfError(f"over {MAX_RELOCATIONS} relocations")
    index = region.index(address)
    if index is not None:
        region.based(address, region.words[index])


def _linker_words(image: Image) -> frozenset[int]:
    """GOT[1] and GOT[2] of a lazily bound file (elf_machine_runtime_setup), DT_DEBUG of a program."""
    found = set()
    table = image.value(DT_PLTGOT)
    if table is not None and image.value(DT_JMPREL) is not None:
        found |= {table + WORD, table + 2 * WORD}
    for number, (tag, _) in enumerate(image.dynamic):
        if tag == DT_DEBUG:
            found.add(image.dynamic_address + 16 * number + WORD)
    return frozenset(found)


def _dynamic(image: Image, region: _Region) -> frozenset[int]:
    found = set()
    for number, (tag, value) in enumerate(image.dynamic):
        address = image.dynamic_address + 16 * number + WORD
        if tag in ADJUSTED and region.index(address) is not None:
            region.based(address, value)
            found.add(address)
    return frozenset(found)
