"""Reading of component `domain`: what libvirt runs for one VM."""

from __future__ import annotations

from hostd.core.reading_types import Struct


class DomainReading(Struct, frozen=True, tag="domain"):
    """What libvirt runs for one VM."""
