"""Reading of component `self`: hostd's own processes and files."""

from __future__ import annotations

from hostd.core.reading_types import Struct


class SelfReading(Struct, frozen=True, tag="self"):
    """hostd's own processes and files."""
