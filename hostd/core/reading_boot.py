"""Reading of component `boot`: the boot event log (TCG PC Client Platform Firmware Profile)."""

from __future__ import annotations

from hostd.core.reading_types import Struct


class BootReading(Struct, frozen=True, tag="boot"):
    """The boot event log (TCG PC Client Platform Firmware Profile)."""
