"""Reads what libvirt runs for a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.readings import Missing

if TYPE_CHECKING:
    from hostd.core.reading_domain import DomainReading
    from hostd.core.readings import Hypervisor
    from hostd.measurer.guests import GuestsProbe


class DomainProbe:
    """Reads what libvirt runs for a VM."""

    def __init__(self, guests: GuestsProbe) -> None:
        pass

    def read(self, hypervisor: Hypervisor) -> DomainReading | Missing:
        """One reading."""
        return Missing("not read here", absent=True)

    def close(self) -> None:
        pass
