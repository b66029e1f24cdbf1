"""Reading of component `kernel`: the running kernel's text and read-only data, part by part.

A complete reading is all parts, in order, of one plan. The measurer makes a new plan when modules come
and go; an image keeps its number, which is never given to another, and its ranges keep theirs.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_types import Address, Count, Label, Name, Struct, Tag, Window

MAX_IMAGES = 512
MAX_RANGES = 2048
MAX_SITES = 256
MAX_ALTERED = 32
VMLINUX = "vmlinux"
"""Name of the kernel's own image."""


class KernelImage(Struct, frozen=True):
    """The kernel itself, or one loaded module."""

    number: Count
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    path: Name
    """Of the file that it was compared with, links resolved; empty if there is none."""
    sha256: Annotated[bytes, msgspec.Meta(max_length=32)]
    """Of that file as packed on disk, 32 bytes; empty: no file, and `note` says why."""
    note: Annotated[str, msgspec.Meta(max_length=256)]
    patched: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """SHA-256 over what boot or loading made of every patch site that does not change later, as
    `hostd.core.patchsites` words it; equal wherever the kernel is loaded. Of a table, what it leads to."""
    compared: Count
    """Bytes compared with the file; 0 without one."""
    pinned: Count
    """Bytes that no file gives, held to what they were at first sight. With `compared` all bytes of the image
    that are read, but for those of tables."""


class KernelRange(Struct, frozen=True):
    """Consecutive bytes of one area of an image."""

    image: Count
    area: Label
    """Section of the image, or `table NAME`."""
    offset: Count
    length: Count
    tag: Tag
    """Keyed tag of the bytes, after each site that changed legally was set back to what it first was."""


class KernelSite(Struct, frozen=True):
    """A patch site that is not what it was when its image was first seen."""

    image: Count
    kind: Annotated[str, msgspec.Meta(max_length=24)]
    """One of `hostd.core.patchsites.RUNTIME`."""
    symbol: Label
    address: Address
    compiled: Annotated[bytes, msgspec.Meta(min_length=1, max_length=8)]
    seen: Annotated[bytes, msgspec.Meta(min_length=1, max_length=8)]
    target: Address
    """Of a jump label."""
    callee: Label
    """Function that starts where `seen` calls or jumps; empty: none does."""


class KernelAltered(Struct, frozen=True):
    """Bytes that no patch site explains, from the first differing byte on."""

    image: Count
    area: Label
    symbol: Label
    """`name+0x12`, with ` [module]`."""
    address: Address
    expected: Window
    seen: Window
    site: Annotated[str, msgspec.Meta(max_length=24)] = ""
    """Kind of the patch site that holds the byte, if one does: its bytes are none of the legal ones."""
    expects: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """Of a table's slot: where it should lead, and where `leads` it does."""
    leads: Annotated[str, msgspec.Meta(max_length=128)] = ""


class KernelReading(Struct, frozen=True, tag="kernel"):
    """Part `part` of `parts`, counted from 0; the vault asks for them one after another."""

    part: Count
    parts: Count
    plan: Count
    """Number of the plan; parts of different plans do not make one reading."""
    images: Annotated[tuple[KernelImage, ...], msgspec.Meta(max_length=MAX_IMAGES)]
    """All of them, in part 0; none in the others."""
    ranges: Annotated[tuple[KernelRange, ...], msgspec.Meta(max_length=MAX_RANGES)]
    sites: Annotated[tuple[KernelSite, ...], msgspec.Meta(max_length=MAX_SITES)]
    sites_total: Count
    altered: Annotated[tuple[KernelAltered, ...], msgspec.Meta(max_length=MAX_ALTERED)]
    altered_total: Count
