"""Judges component `boot` (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.findings import Status, Verdict

if TYPE_CHECKING:
    from hostd.core.findings import Component
    from hostd.core.reading_boot import BootReading
    from hostd.core.reference import Reference


class BootJudge:
    """Judges readings of `boot` and keeps what later ones must agree with."""

    def __init__(self) -> None:
        self.position = 0
        """Bytes of the log that were judged: what to ask from next."""

    def appraise(self, component: Component, reading: BootReading, reference: Reference) -> Verdict:
        """The verdict on one reading."""
        return Verdict(component, Status.PENDING)
