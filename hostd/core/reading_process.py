"""Readings of one process: what it has mapped as code and constants, and which pages differ.

Addresses and offsets are bytes; `file` numbers are those of `hostd.core.readings`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_hypervisor import Hypervisor
from hostd.core.reading_types import Address, Count, Label, Name, Struct, Window

MAX_MAPPINGS = 4096
MAX_ALTERED = 64

READ, WRITE, EXEC = 4, 2, 1
"""Protection bits of a mapping, as in `r-x`."""


class AlteredPage(Struct, frozen=True):
    """A page of code or constants that is not the page of the file that was hashed."""

    address: Address
    """Of the first differing byte, or of the page where no byte differs; 0 in a `FilesReading`."""
    file: Annotated[int, msgspec.Meta(ge=0)] | None
    name: Name
    file_offset: Count
    """Of the same byte in the file."""
    expected: Window
    seen: Window
    """Up to 16 bytes from the first differing byte on; equal to `expected` if none differs."""
    reason: Annotated[str, msgspec.Meta(max_length=16)]
    """`private` (copied on write), `frame` (another physical page), `swapped`, or in a `FilesReading`
    `content`: the file's own page is not what it was when the file was identified."""
    symbol: Label = ""
    """Function or object of the file that holds the byte, as `name+0x12`; empty if its symbols say none."""


class Mapping(Struct, frozen=True):
    """A mapping that holds code or constants, or anything executable."""

    start: Address
    end: Address
    protection: Annotated[int, msgspec.Meta(ge=0, le=7)]
    file: Annotated[int, msgspec.Meta(ge=0)] | None
    """None: anonymous."""
    offset: Count
    name: Name
    """`[vdso]`, a path, or empty."""


class ProcessReading(Struct, frozen=True, tag="process"):
    """One hypervisor process."""

    hypervisor: Hypervisor
    mappings: Annotated[tuple[Mapping, ...], msgspec.Meta(max_length=MAX_MAPPINGS)]
    altered: Annotated[tuple[AlteredPage, ...], msgspec.Meta(max_length=MAX_ALTERED)]
    altered_total: Count
