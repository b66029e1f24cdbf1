"""What the builder hands to the probe: how each image looked when it was first seen, and its sites.

MessagePack over a private file between two processes of one role. Kept small, because the probe holds it:
a site takes 25 bytes, copies are compressed.
"""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

import msgspec

from hostd.core.patchsites import Site, SiteKind
from hostd.core.reading_kernel import KernelAltered, KernelImage
from hostd.platform.kallsyms import PackedSymbols

if TYPE_CHECKING:
    from collections.abc import Iterable

CHUNK: Final = 64 << 10
"""Bytes with a tag of their own: what is decompressed and compared when one byte changes."""
_KINDS: Final = tuple(SiteKind)
_COMPILED: Final = 8


class BuiltArea(msgspec.Struct, frozen=True, array_like=True):
    """A range of kernel memory. `chunks` are its bytes at first sight, `CHUNK` at a time, compressed; bytes
    of a table that change by themselves are zeros, listed in `ignored` as (offset, length)."""

    name: str
    address: int
    length: int
    chunks: tuple[bytes, ...]
    ignored: tuple[tuple[int, int], ...] = ()

    def chunk(self, number: int) -> bytes:
        return zlib.decompress(self.chunks[number])


class BuiltImage(msgspec.Struct, frozen=True, array_like=True):
    """One image; `addresses`, `kinds`, `compiled` and `targets` are parallel arrays of its sites that may
    change while the kernel runs, in order of address."""

    image: KernelImage
    areas: tuple[BuiltArea, ...]
    addresses: bytes
    kinds: bytes
    compiled: bytes
    targets: bytes
    altered: tuple[KernelAltered, ...]
    altered_total: int


class Built(msgspec.Struct, frozen=True, array_like=True):
    """The builder's answer."""

    images: tuple[BuiltImage, ...]
    symbols: PackedSymbols


class Sites:
    """Sites of one image, found by address."""

    def __init__(self, built: BuiltImage) -> None:
        # No copies: there are some 150,000 sites.
        self._addresses = memoryview(built.addresses).cast("Q")
        self._kinds = built.kinds
        self._compiled = built.compiled
        self._targets = memoryview(built.targets).cast("Q")

    def __len__(self) -> int:
        return len(self._addresses)

    def holding(self, address: int) -> Site | None:
        """The site that has a byte at `address`."""
        index = bisect_right(self._addresses, address) - 1
        # A long site may begin before a short one.
        for at in range(index, max(-1, index - 3), -1):
            site = self._site(at)
            if site.address <= address < site.address + len(site.compiled):
                return site
        return None

    def _site(self, index: int) -> Site:
        start = index * (_COMPILED + 1)
        length = self._compiled[start]
        return Site(
            _KINDS[self._kinds[index]],
            self._addresses[index],
            self._compiled[start + 1 : start + 1 + length],
            self._targets[index],
        )


def pack_sites(sites: Iterable[Site]) -> tuple[bytes, bytes, bytes, bytes]:
    """(addresses, kinds, compiled, targets) for `BuiltImage`."""
    ordered = sorted({site.address: site for site in sites}.values(), key=lambda site: site.address)
    compiled = b"".join(
        bytes((len(site.compiled),)) + site.compiled.ljust(_COMPILED, b"\0") for site in ordered
    )
    return (
        array("Q", (site.address for site in ordered)).tobytes(),
        bytes(_KINDS.index(site.kind) for site in ordered),
        compiled,
        array("Q", (site.target for site in ordered)).tobytes(),
    )


def pack_area(name: str, address: int, seen: bytes, ignored: tuple[tuple[int, int], ...] = ()) -> BuiltArea:
    """An area as it was at first sight."""
    chunks = tuple(zlib.compress(seen[at : at + CHUNK], 1) for at in range(0, len(seen), CHUNK))
    return BuiltArea(name, address, len(seen), chunks, ignored)
