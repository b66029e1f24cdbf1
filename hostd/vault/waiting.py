"""What the gate and its driver hand out: requests that wait, stamps and verdicts of readings, passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from guestlib.errors import HostdError
    from hostd.core.callers import Caller
    from hostd.core.findings import Component, Status, Verdict


@dataclass(slots=True)
class Waiting:
    """A request in the gate. `item` is the driver's; the gate does not look at it."""

    caller: Caller
    arrived: int
    deadline: int
    item: object
    cost: int = 1
    """Its work, in units of `hostd.vault.cost`."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """The latest judged reading of a component. Times in nanoseconds on the vault's clock."""

    number: int
    started: int
    ended: int
    status: Status


@dataclass(frozen=True, slots=True)
class Judged:
    """The latest reading of a component as it was judged, for people. Times in nanoseconds on the vault's
    clock; the cost is the measurer's own."""

    verdict: Verdict
    started: int
    ended: int
    cost_ns: int


@dataclass(frozen=True, slots=True)
class Pass:
    """The set of readings that a batch rests on."""

    number: int
    first_start: int
    last_end: int
    readings: tuple[tuple[Component, Stamp], ...]

    @classmethod
    def of(cls, number: int, components: Iterable[Component], stamps: Mapping[Component, Stamp]) -> Pass:
        """The latest readings of these components."""
        readings = tuple(sorted((component, stamps[component]) for component in components))
        first, last = min(s.started for _, s in readings), max(s.ended for _, s in readings)
        return cls(number, first, last, readings)


@dataclass(frozen=True, slots=True)
class Refused:
    request: Waiting
    error: HostdError
