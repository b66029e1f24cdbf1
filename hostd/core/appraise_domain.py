"""Judges component `domain` (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.findings import Status, Verdict

if TYPE_CHECKING:
    from hostd.core.findings import Component
    from hostd.core.reading_domain import DomainReading
    from hostd.core.reference import Reference


class DomainJudge:
    """Judges readings of `domain` and keeps what later ones must agree with."""

    def appraise(self, component: Component, reading: DomainReading, reference: Reference) -> Verdict:
        """The verdict on one reading."""
        return Verdict(component, Status.PENDING)
