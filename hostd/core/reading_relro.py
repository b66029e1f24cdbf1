"""Reading of component `relro`: One hypervisor process's relocated read-only data (GOT, vtables)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_hypervisor import Hypervisor
from hostd.core.reading_types import Address, Count, Label, Name, Sha256, Struct, Tag

MAX_RELRO_FILES = 512
MAX_ALTERED_SLOTS = 64
MAX_VALUES = 4
MAX_UNCOVERED = 64


class Value(Struct, frozen=True):
    """A word of memory, and what it points to."""

    value: Address
    leads: Label
    """`write+0x0 in libc.so.6`, `anonymous memory`, `nothing mapped`."""


class AlteredSlot(Struct, frozen=True):
    """One word of relocated data that is not what recomputation gives."""

    address: Address
    name: Name
    """Path of the file whose data it is."""
    file_offset: Count
    """Of the same word in the file."""
    place: Label
    """Symbol or section and offset, as `.got+0x48`; empty if the file does not say."""
    symbol: Label
    """That the relocation names, as `writev@GLIBC_2.2.5`; empty for one that names none."""
    relocation: Label
    """`R_X86_64_GLOB_DAT`; `none` for a word that no relocation writes."""
    expected: Annotated[tuple[Value, ...], msgspec.Meta(max_length=MAX_VALUES)]
    seen: Value
    reason: Annotated[str, msgspec.Meta(max_length=16)]
    """`value`: not what recomputation gives. `pinned`: only the process knows the value, and it is not the
    one that was first seen. `writable`: the value is right, but what was protected is writable again;
    `seen` is then the value all the same."""


class RelroFile(Struct, frozen=True):
    """An ELF file of the process that was recomputed. The digest is of the very bytes it was done from."""

    file: Count
    path: Name
    sha256: Sha256
    words: Count
    """8-byte words compared."""
    pinned: Count
    """Of these, words whose value only the process knows."""


class RelroReading(Struct, frozen=True, tag="relro"):
    """One hypervisor process's relocated read-only data (GOT, vtables), and lazily bound slots."""

    hypervisor: Hypervisor
    files: Annotated[tuple[RelroFile, ...], msgspec.Meta(max_length=MAX_RELRO_FILES)]
    uncovered: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_UNCOVERED)]
    """ELF files that are mapped as code and were not recomputed, each with the reason."""
    tag: Tag
    """Of all bytes that were compared, under the measurer's key."""
    altered: Annotated[tuple[AlteredSlot, ...], msgspec.Meta(max_length=MAX_ALTERED_SLOTS)]
    altered_total: Count
    interposed: Count
    """Slots that lead to another definition of their symbol than the order of search gives (preloading)."""
