"""Reading of component `relro`: One hypervisor process's relocated read-only data (GOT, vtables)."""

from __future__ import annotations

from hostd.core.reading_types import Struct


class RelroReading(Struct, frozen=True, tag="relro"):
    """One hypervisor process's relocated read-only data (GOT, vtables)."""
