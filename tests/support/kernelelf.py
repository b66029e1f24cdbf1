"""Makes small ELF files as kernels and modules are, and memory that holds them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

ALLOC, WRITE, EXEC = 2, 1, 4
PROGBITS, SYMTAB, STRTAB, RELA, NOBITS = 1, 2, 3, 4, 8


@dataclass
class Part:
    """A section."""

    name: str
    content: bytes
    flags: int = ALLOC
    address: int = 0
    kind: int = PROGBITS
    link: int = 0
    info: int = 0


@dataclass
class ElfMaker:
    """Sections by order of `add`; number 0 is the empty one."""

    parts: list[Part] = field(default_factory=lambda: [Part("", b"", 0, kind=0)])

    def add(self, name: str, content: bytes, flags: int = ALLOC, **more: int) -> int:
        self.parts.append(Part(name, content, flags, **more))
        return len(self.parts) - 1

    def symbols(self, rows: list[tuple[str, int, int, int]]) -> int:
        """(name, section, value, size) after the empty first one; gives the table's number."""
        names, table = b"\0", struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
        for name, section, value, size in rows:
            table += struct.pack("<IBBHQQ", len(names), 0x10, 0, section, value, size)
            names += name.encode() + b"\0"
        strings = self.add(".strtab", names, 0, kind=STRTAB)
        return self.add(".symtab", table, 0, kind=SYMTAB, link=strings)

    def relocations(self, section: int, symbols: int, rows: list[tuple[int, int, int, int]]) -> int:
        """(offset, kind, symbol, addend) for a section."""
        table = b"".join(
            struct.pack("<QQq", offset, symbol << 32 | kind, addend) for offset, kind, symbol, addend in rows
        )
        return self.add(".rela", table, 0, kind=RELA, link=symbols, info=section)

    def file(self) -> bytes:
        names = b""
        name_at = []
        self.add(".shstrtab", b"", 0, kind=STRTAB)
        for part in self.parts:
            name_at.append(len(names))
            names += part.name.encode() + b"\0"
        self.parts[-1].content = names
        body, rows = bytearray(64), b""
        for part, name in zip(self.parts, name_at, strict=True):
            offset = len(body)
            if part.kind != NOBITS:
                body += part.content
            rows += struct.pack(
                "<IIQQQQIIQQ",
                *(name, part.kind, part.flags, part.address, offset, len(part.content)),
                *(part.link, part.info, 1, 0),
            )
        header = struct.pack(
            "<16sHHIQQQIHHHHHH",
            b"\x7fELF\x02\x01\x01",
            *(1, 62, 1, 0, 0, len(body), 0, 64, 0, 0, 64, len(self.parts), len(self.parts) - 1),
        )
        body[:64] = header
        self.parts.pop()
        return bytes(body) + rows


class Memory:
    """Bytes by address, for what reads kernel memory."""

    def __init__(self) -> None:
        self.pieces: dict[int, bytearray] = {}

    def put(self, address: int, data: bytes) -> None:
        self.pieces[address] = bytearray(data)

    def flip(self, address: int, data: bytes) -> None:
        start, piece = self._piece(address)
        piece[address - start : address - start + len(data)] = data

    def _piece(self, address: int) -> tuple[int, bytearray]:
        for start, piece in self.pieces.items():
            if start <= address < start + len(piece):
                return start, piece
        raise AssertionError(f"nothing at {address:#x}")

    def read(self, address: int, size: int) -> bytes:
        start, piece = self._piece(address)
        data = bytes(piece[address - start : address - start + size])
        assert len(data) == size
        return data

    def read_into(self, address: int, buffer: memoryview) -> None:
        buffer[:] = self.read(address, len(buffer))
