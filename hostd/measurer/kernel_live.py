"""What an image is taken to be when no file of it is there: what it is now (first use).

Nothing says then that it is as it was compiled, and the reading says so. Its patch sites are read from its
own tables in memory, which are read-only and belong to the image, so that later changes are judged as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.measurer.kernel_image import Area, Image, SiteTables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_READ_ONLY: Final = (".text", ".rodata", ".noinstr.text", ".static_call.text", "__param", "__ksymtab")
_KERNEL_TABLES: Final = {
    "jumps": ("__start___jump_table", "__stop___jump_table"),
    "calls": ("__start_static_call_sites", "__stop_static_call_sites"),
}
_MODULE_TABLES: Final = {
    "jumps": "__jump_table",
    "calls": ".static_call_sites",
    "ftrace": "__mcount_loc",
}
_UNIT: Final = {"jumps": 16, "calls": 8, "ftrace": 8}


def live_kernel(
    symbols: Mapping[str, int], read: Callable[[int, int], bytes], trampolines: Iterable[int]
) -> Image:
    """The kernel as it is.

    Raises:
        ValueError: a symbol that is needed is not there.
        KcoreError: memory cannot be read.
    """
    image = Image("vmlinux", [])
    for name, start, stop in (
        (".text", "_text", "_etext"),
        (".rodata", "__start_rodata", "__start_ro_after_init"),
        ("ro_after_init", "__start_ro_after_init", "__end_ro_after_init"),
    ):
        if start not in symbols or symbols.get(stop, 0) <= symbols[start]:
            raise ValueError(f"no symbols {start} and {stop}")
        image.areas.append(_now(name, symbols[start], symbols[stop] - symbols[start], read))

    def table(name: str) -> tuple[int, bytes] | None:
        start, stop = _KERNEL_TABLES.get(name, ("", ""))
        if start not in symbols or stop not in symbols:
            return None
        return symbols[start], read(symbols[start], symbols[stop] - symbols[start])

    SiteTables(image, table, lambda _at, _size: b"").collect(trampolines, ())
    return image


def live_module(
    name: str,
    places: Mapping[str, int],
    size: int,
    read: Callable[[int, int], bytes],
    own: Mapping[str, int],
) -> Image:
    """A module as it is: each read-only section up to the next one.

    Raises:
        KcoreError: memory cannot be read.
    """
    image = Image(name, [])
    ends = sorted({*places.values()})

    def span(section: str) -> tuple[int, int]:
        start = places[section]
        end = next((end for end in ends if end > start), start)
        # Past the last section of one allocation the next is elsewhere; then it ends with its page.
        return start, min(end - start, max(size, 0), 16 << 20)

    for section in sorted(places):
        if section.startswith(_READ_ONLY) or (section.endswith(".text") and not section.startswith(".init")):
            start, length = span(section)
            if length:
                image.areas.append(_now(section, start, length, read))

    def table(kind: str) -> tuple[int, bytes] | None:
        section = _MODULE_TABLES.get(kind, "")
        if section not in places:
            return None
        start, length = span(section)
        data = read(start, length // _UNIT[kind] * _UNIT[kind])
        return start, data

    trampolines = [address for symbol, address in own.items() if symbol.startswith("__SCT__")]
    SiteTables(image, table, lambda _at, _size: b"").collect(trampolines, ())
    return image


def _now(name: str, address: int, length: int, read: Callable[[int, int], bytes]) -> Area:
    return Area(name, address, length, bytearray(read(address, length)))
