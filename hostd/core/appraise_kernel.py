"""Judges component `kernel` (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.findings import Status, Verdict

if TYPE_CHECKING:
    from hostd.core.findings import Component
    from hostd.core.reading_kernel import KernelReading
    from hostd.core.reference import Reference


class KernelJudge:
    """Judges readings of `kernel` and keeps what later ones must agree with."""

    def appraise(self, component: Component, reading: KernelReading, reference: Reference) -> Verdict:
        """The verdict on one reading."""
        return Verdict(component, Status.PENDING)
