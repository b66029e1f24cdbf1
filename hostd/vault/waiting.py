"""What the gate hands out: requests that wait, stamps of readings, and the pass a batch rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guestlib.errors import HostdError
    from hostd.core.callers import Caller
    from hostd.core.findings import Component, Status


@dataclass(slots=True)
class Waiting:
    """A request in the gate. `item` is the driver's; the gate does not look at it."""

    caller: Caller
    arrived: int
    deadline: int
    item: object


@dataclass(frozen=True, slots=True)
class Stamp:
    """The latest judged reading of a component. Times in nanoseconds on the vault's clock."""

    number: int
    started: int
    ended: int
    status: Status


@dataclass(frozen=True, slots=True)
class Pass:
    """The set of readings that a batch rests on."""

    number: int
    first_start: int
    last_end: int
    readings: tuple[tuple[Component, Stamp], ...]


@dataclass(frozen=True, slots=True)
class Refused:
    request: Waiting
    error: HostdError
