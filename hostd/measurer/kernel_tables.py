"""The tables in which a kernel image or module lists its patch sites (pure).

Each reader takes a table's bytes and the address where it is, and gives addresses of sites. Formats:
include/linux/jump_label.h `jump_entry`, static_call_types.h `static_call_site`,
arch/x86/include/asm/alternative.h `alt_instr`, paravirt_types.h `paravirt_patch_site`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OFFSET: Final = struct.Struct("<i")
_JUMP: Final = struct.Struct("<iiq")
_CALL: Final = struct.Struct("<ii")
_PARAVIRT: Final = struct.Struct("<QBB6x")
_ADDRESS: Final = struct.Struct("<Q")
_ALTERNATIVES: Final = (
    # 6.3 and later: flags behind the CPU feature; 5.13 to 6.2; before that with the padding's length.
    struct.Struct("<iiIBB"),
    struct.Struct("<iiHBB"),
    struct.Struct("<iiHBBB"),
)


class MalformedTableError(Exception):
    """A table of patch sites is not of its form."""


class Alternative(NamedTuple):
    """`length` bytes at `address` may be replaced by `new_length` bytes from `replacement`."""

    address: int
    replacement: int
    length: int
    new_length: int


def _whole(data: bytes, unit: int, name: str) -> None:
    if len(data) % unit:
        raise MalformedTableError(f"{name}: {len(data)} bytes are not whole entries of {unit}")


def offsets(data: bytes, place: int, name: str) -> Iterator[int]:
    """Tables of distances from the entry to the site: returns, retpolines, locks."""
    _whole(data, 4, name)
    for number, (distance,) in enumerate(_OFFSET.iter_unpack(data)):
        yield place + 4 * number + distance


def jumps(data: bytes, place: int) -> Iterator[tuple[int, int]]:
    """(site, target) of jump labels."""
    _whole(data, _JUMP.size, "jump table")
    for number, (code, target, _) in enumerate(_JUMP.iter_unpack(data)):
        here = place + _JUMP.size * number
        yield here + code, here + 4 + target


def calls(data: bytes, place: int) -> Iterator[int]:
    """Sites of static calls."""
    _whole(data, _CALL.size, "static call sites")
    for number, (site, _) in enumerate(_CALL.iter_unpack(data)):
        yield place + _CALL.size * number + site


def addresses(data: bytes) -> Iterator[int]:
    """Tables of addresses: ftrace's."""
    _whole(data, 8, "addresses")
    for (address,) in _ADDRESS.iter_unpack(data):
        yield address


def paravirt(data: bytes) -> Iterator[tuple[int, int]]:
    """(site, length)."""
    _whole(data, _PARAVIRT.size, "paravirt sites")
    for address, _, length in _PARAVIRT.iter_unpack(data):
        yield address, length


def alternatives(data: bytes, place: int, holds: Callable[[int, int], bool]) -> list[Alternative]:
    """All entries. The kernel's version decides their size; it is the one by which every entry's
    replacement lies where `holds(address, length)` says that replacements are.

    Raises:
        MalformedTableError: no size fits.
    """
    for form in _ALTERNATIVES:
        if len(data) % form.size:
            continue
        found = []
        for number, row in enumerate(form.iter_unpack(data)):
            here = place + form.size * number
            found.append(Alternative(here + row[0], here + 4 + row[1], row[3], row[4]))
        if all(
            (not item.new_length or holds(item.replacement, item.new_length))
            and 0 <= item.new_length <= item.length
            for item in found
        ):
            return found
    raise MalformedTableError("alternatives of no known form")
