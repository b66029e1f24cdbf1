"""What those who wait need, summed up: since when each component must have been read (pure).

One look at each caller, whatever the number of components, so that choosing the next reading stays cheap with
hundreds of machines waiting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hostd.core.callers import Caller
    from hostd.core.findings import Component


@dataclass(slots=True)
class Demand:
    """Times are arrivals in nanoseconds; -1: nobody."""

    host: int = -1
    """Of the newest that waits: everybody rests on the host's components."""
    every_vm: int = -1
    """Of the newest host-local caller: it rests on every VM's."""
    vms: dict[str, int] = field(default_factory=dict)
    """Of the newest of each VM."""

    def add(self, caller: Caller, arrived: int) -> None:
        """Somebody waits who arrived then."""
        self.host = max(self.host, arrived)
        if caller.vm:
            self.vms[caller.vm] = max(self.vms.get(caller.vm, -1), arrived)
        elif not caller.officer:
            self.every_vm = max(self.every_vm, arrived)

    def of(self, component: Component) -> int:
        """The arrival that a reading of the component must be good for."""
        return max(self.vms.get(component.vm, -1), self.every_vm) if component.vm else self.host
