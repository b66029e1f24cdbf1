"""Owner of /proc/kallsyms: names and addresses of the running kernel and its modules.

A line is `address type name`, and `\t[module]` where it is not the kernel's own
(kernel/kallsyms.c `s_show`). Held compactly: 100,000 symbols take some 4 MB.

Needs CAP_SYSLOG; without it all addresses are 0, which is refused.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_BYTES: Final = 64 << 20
"""A kernel with everything built in has some 300,000 symbols, 20 MB."""
MAX_SYMBOLS: Final = 1_000_000
_LINE: Final = re.compile(
    rb"(?m)^([0-9a-f]{16}) ([A-Za-z?]) ([^ \t\n]{1,511})(?:\t\[([^\]\n\t ]{1,64})\])?\n"
)
_FUNCTIONS: Final = frozenset(b"tTwW")


_NAMELESS: Final = (b"__ksymtab_", b"__kstrtab", b"__crc_", b"__pfx_")


class Line(NamedTuple):
    """One line; `module` is empty for the kernel's own."""

    address: int
    kind: str
    name: bytes
    module: bytes


class MalformedSymbolsError(Exception):
    """/proc/kallsyms is not of its form, over the bounds, or shows no addresses."""


class PackedSymbols(NamedTuple):
    """Symbols in order of address, to be sent to another process: addresses as 8-byte numbers, a byte each
    that says whether it is a function, and names with a zero byte between them."""

    addresses: bytes
    functions: bytes
    names: bytes


def pack_symbols(rows: Iterable[tuple[int, bytes, bool]]) -> PackedSymbols:
    """`rows`: address, name (with ` [module]`), whether it is a function."""
    ordered = sorted(rows)
    return PackedSymbols(
        array("Q", (row[0] for row in ordered)).tobytes(),
        bytes(row[2] for row in ordered),
        b"\0".join(row[1] for row in ordered),
    )


class Symbols:
    """All symbols by address.

    Raises:
        MalformedSymbolsError: the packed arrays do not fit each other.
    """

    __slots__ = ("_addresses", "_functions", "_names", "_starts")

    def __init__(self, packed: PackedSymbols) -> None:
        self._addresses = array("Q")
        if len(packed.addresses) != 8 * len(packed.functions):
            raise MalformedSymbolsError("symbols do not fit their addresses")
        self._addresses.frombytes(packed.addresses)
        self._functions = packed.functions
        self._names = packed.names
        starts = array("I", [0])
        at = packed.names.find(b"\0")
        while at >= 0:
            starts.append(at + 1)
            at = packed.names.find(b"\0", at + 1)
        starts.append(len(packed.names) + 1)
        if len(starts) != len(self._addresses) + 1 and self._addresses:
            raise MalformedSymbolsError("names do not fit their symbols")
        self._starts = starts

    def __len__(self) -> int:
        return len(self._addresses)

    def _name(self, index: int) -> str:
        return self._names[self._starts[index] : self._starts[index + 1] - 1].decode("utf-8", "replace")

    def function(self, address: int) -> str:
        """Name of the function that starts at `address`; of several the first by name; empty: none does."""
        index = bisect_left(self._addresses, address)
        while index < len(self._addresses) and self._addresses[index] == address:
            if self._functions[index]:
                return self._name(index)
            index += 1
        return ""

    def is_code(self, address: int) -> bool:
        """Whether the last symbol at or before `address` is a function."""
        index = bisect_right(self._addresses, address) - 1
        if index < 0:
            return False
        first = bisect_left(self._addresses, self._addresses[index])
        return any(self._functions[first : index + 1])

    def near(self, address: int) -> str:
        """`name+0x12`: the last symbol at or before `address`; empty: none is."""
        index = bisect_right(self._addresses, address) - 1
        if index < 0:
            return ""
        first = bisect_left(self._addresses, self._addresses[index])
        name, offset = self._name(first), address - self._addresses[first]
        plain, space, module = name.partition(" ")
        return f"{plain}+{offset:#x}{space}{module}"


def parse_symbols(data: bytes) -> Symbols:
    """All symbols but absolute ones and those of the export tables.

    Raises:
        MalformedSymbolsError: see there, and `scan_symbols`.
    """
    return Symbols(pack_symbols(code_and_data(scan_symbols(data))))


def code_and_data(lines: Iterable[Line]) -> Iterator[tuple[int, bytes, bool]]:
    """What `pack_symbols` takes, without what no address is named by."""
    for address, kind, name, module in lines:
        if kind not in "aAbB" and not name.startswith(_NAMELESS):
            yield address, name + b" [" + module + b"]" if module else name, ord(kind) in _FUNCTIONS


def scan_symbols(data: bytes) -> list[Line]:
    """All lines.

    Raises:
        MalformedSymbolsError: a line is not of the form, or over the bounds.
    """
    if len(data) > MAX_BYTES:
        raise MalformedSymbolsError(f"over {MAX_BYTES} bytes")
    # All in one call, and counted: this is read while requests wait.
    rows = _LINE.findall(data)
    if len(rows) != data.count(b"\n") or not data.endswith(b"\n"):
        raise MalformedSymbolsError("a line is not a symbol")
    if len(rows) > MAX_SYMBOLS:
        raise MalformedSymbolsError(f"over {MAX_SYMBOLS} symbols")
    found = [
        Line(int(address, 16), kind.decode("ascii"), name, module) for address, kind, name, module in rows
    ]
    if not any(line.address for line in found):
        raise MalformedSymbolsError("no addresses: CAP_SYSLOG is missing")
    return found


def read_symbols() -> bytes:
    """The bytes of /proc/kallsyms.

    Raises:
        OSError: it is not there.
        MalformedSymbolsError: it is larger than it can be.
    """
    with open("/proc/kallsyms", "rb", buffering=0) as file:
        data = bytearray()
        while part := file.read(1 << 20):
            data += part
            if len(data) > MAX_BYTES:
                raise MalformedSymbolsError(f"over {MAX_BYTES} bytes")
    return bytes(data)
