"""Reads the boot event log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.readings import Missing

if TYPE_CHECKING:
    from hostd.core.reading_boot import BootReading


class BootProbe:
    """Reads the boot event log."""

    def __init__(self) -> None:
        pass

    def read(self, position: int) -> BootReading | Missing:
        """One reading."""
        return Missing("not read here", absent=True)

    def close(self) -> None:
        pass
