"""Reads the relocated data of a hypervisor process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.readings import Missing

if TYPE_CHECKING:
    from hostd.core.reading_relro import RelroReading
    from hostd.core.readings import Hypervisor
    from hostd.measurer.files import Registry
    from hostd.platform.pages import OwnPages
    from hostd.platform.procfs import ProcessHandle


class RelroProbe:
    """Reads the relocated data of a hypervisor process."""

    def __init__(self, registry: Registry, own_pages: OwnPages) -> None:
        pass

    def read(self, hypervisor: Hypervisor, handle: ProcessHandle) -> RelroReading | Missing:
        """One reading."""
        return Missing("not read here", absent=True)

    def close(self) -> None:
        pass
