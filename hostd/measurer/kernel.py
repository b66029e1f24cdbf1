"""Reads the running kernel's code and constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.readings import Missing

if TYPE_CHECKING:
    from hostd.config import Config
    from hostd.core.reading_kernel import KernelReading


class KernelProbe:
    """Reads the running kernel's code and constants."""

    def __init__(self, config: Config) -> None:
        pass

    def read(self, part: int) -> KernelReading | Missing:
        """One reading."""
        return Missing("not read here", absent=True)

    def close(self) -> None:
        pass
