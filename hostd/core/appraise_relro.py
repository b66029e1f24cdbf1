"""Judges component `relro` (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.findings import Status, Verdict

if TYPE_CHECKING:
    from hostd.core.findings import Component
    from hostd.core.reading_relro import RelroReading
    from hostd.core.reference import Reference


class RelroJudge:
    """Judges readings of `relro` and keeps what later ones must agree with."""

    def appraise(self, component: Component, reading: RelroReading, reference: Reference) -> Verdict:
        """The verdict on one reading."""
        return Verdict(component, Status.PENDING)
