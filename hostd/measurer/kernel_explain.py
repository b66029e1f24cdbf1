"""Compares an image with memory at first sight, and explains each difference by its site (pure but for
what `read` does).

A difference that no site explains may be a patch that is being made at the moment: memory is read again,
`ATTEMPTS` times, before it counts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostd.core.patchsites import RUNTIME, differences, settle
from hostd.core.reading_kernel import MAX_ALTERED, KernelAltered
from hostd.core.reading_types import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.patchsites import Site
    from hostd.measurer.kernel_image import Area, Image
    from hostd.platform.kallsyms import Symbols

ATTEMPTS: Final = 5
MAX_COUNTED: Final = 4096
"""Differences counted; a wrong file differs everywhere."""


@dataclass(slots=True)
class Explained:
    """What memory held, and what of it no site explains."""

    seen: list[bytes]
    """By area."""
    sites: list[Site]
    """Those that may change while the kernel runs."""
    patched: bytes
    compared: int
    pinned: int
    altered: list[KernelAltered] = field(default_factory=list)
    altered_total: int = 0


def explain(
    image: Image, read: Callable[[int, int], bytes], symbols: Symbols, pause: Callable[[], None]
) -> Explained:
    """Reads and compares all areas of an image."""
    for attempt in range(ATTEMPTS):
        found = _explain(image, read, symbols)
        if not found.altered or attempt + 1 == ATTEMPTS:
            return found
        pause()
    raise AssertionError("not reached")


def _explain(image: Image, read: Callable[[int, int], bytes], symbols: Symbols) -> Explained:
    seen = [read(area.address, area.length) for area in image.areas]
    golden = [None if area.golden is None else bytearray(area.golden) for area in image.areas]
    words: list[str] = []
    broken: dict[int, Site] = {}
    for site in image.sites:
        number = _area_of(image.areas, site.address, len(site.compiled))
        expected = None if number is None else golden[number]
        if number is None or expected is None:
            continue
        at = site.address - image.areas[number].address
        now = seen[number][at : at + len(site.compiled)]
        word = settle(site, now, symbols)
        if word:
            expected[at : at + len(now)] = now
            if site.kind not in RUNTIME and word != "compiled":
                words.append(f"{site.kind} {image.areas[number].name}+{at:x} {word}\n")
        else:
            broken[site.address] = site
    result = Explained(
        seen=seen,
        sites=[site for site in image.sites if site.kind in RUNTIME],
        patched=hashlib.sha256("".join(sorted(words)).encode()).digest(),
        compared=sum(area.length for area in image.areas if area.golden is not None),
        pinned=sum(area.length for area in image.areas if area.golden is None),
    )
    for area, expected, now in zip(image.areas, golden, seen, strict=True):
        if expected is not None and expected != now:
            _collect(result, area, bytes(expected), now, symbols, broken)
    return result


def _area_of(areas: list[Area], address: int, length: int) -> int | None:
    for number, area in enumerate(areas):
        if area.address <= address and address + length <= area.address + area.length:
            return number
    return None


def _collect(
    result: Explained, area: Area, expected: bytes, seen: bytes, symbols: Symbols, broken: dict[int, Site]
) -> None:
    free_from = 0
    for at in differences(expected, seen, limit=MAX_COUNTED):
        if at < free_from:
            continue
        free_from = at + WINDOW_BYTES
        result.altered_total += 1
        if len(result.altered) < MAX_ALTERED:
            site = next(
                (
                    broken[start]
                    for start in range(area.address + at, area.address + at - 16, -1)
                    if start in broken
                ),
                None,
            )
            result.altered.append(altered(area.name, area.address, at, expected, seen, symbols, site))


def altered(
    area: str, address: int, at: int, expected: bytes, seen: bytes, symbols: Symbols, site: Site | None
) -> KernelAltered:
    """The difference at offset `at` of an area, with image number 0."""
    holds = site is not None and site.address <= address + at < site.address + len(site.compiled)
    return KernelAltered(
        image=0,
        area=area,
        # The interrupt table lies among data, whose symbols are not kept.
        symbol=f"{area}+{at:#x}" if area == "idt_table" else symbols.near(address + at)[:256],
        address=address + at,
        expected=expected[at : at + WINDOW_BYTES],
        seen=seen[at : at + WINDOW_BYTES],
        site=site.kind.value if site is not None and holds else "",
    )
