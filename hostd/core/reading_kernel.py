"""Reading of component `kernel`: the running kernel's text and read-only data, part by part."""

from __future__ import annotations

from hostd.core.reading_types import Count, Struct


class KernelReading(Struct, frozen=True, tag="kernel"):
    """The running kernel's text and read-only data, part by part."""

    part: Count
    parts: Count
    """This is part `part` of `parts`, counted from 0; the vault asks for them one after another."""
