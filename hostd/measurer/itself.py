"""Reads hostd's own processes and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.readings import Missing

if TYPE_CHECKING:
    from hostd.config import Config
    from hostd.core.reading_self import SelfReading
    from hostd.measurer.files import Registry
    from hostd.measurer.process import ProcessProbe


class SelfProbe:
    """Reads hostd's own processes and files."""

    def __init__(self, config: Config, registry: Registry, processes: ProcessProbe) -> None:
        pass

    def read(self) -> SelfReading | Missing:
        """One reading."""
        return Missing("not read here", absent=True)

    def close(self) -> None:
        pass
