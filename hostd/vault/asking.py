"""What the vault has asked the measurer, and what it keeps back until the measurer takes more (no I/O).

The measurer reads the kernel in a thread of its own and identifies files in slices between other
readings, and libvirt may let it wait when a VM is to be suspended: so there are several lanes, and what
waits in one does not hold up another. Nor may a VM that does not answer libvirt hold up the others.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostd.core.findings import Kind
from hostd.ipc.measuring import Ask, AskFile, AskSurvey, AskSuspend, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.findings import Component
    from hostd.core.readings import Reading


class Lane(enum.Enum):
    """Which of the measurer's queues a request goes to."""

    KERNEL = "kernel"
    FILES = "files"
    SURVEY = "survey"
    POWER = "power"
    OTHER = "other"


MAX_OPEN: Final = {Lane.KERNEL: 2, Lane.FILES: 4, Lane.SURVEY: 1, Lane.POWER: 4, Lane.OTHER: 6}
"""Requests with the measurer at once; it cuts off whoever has more (`hostd.measurer.server`)."""


def lane_of(request: Request) -> Lane:
    match request:
        case Ask(kind=Kind.KERNEL):
            return Lane.KERNEL
        case AskFile():
            return Lane.FILES
        case AskSurvey():
            return Lane.SURVEY
        case AskSuspend():
            return Lane.POWER
        case _:
            return Lane.OTHER


@dataclass(slots=True)
class Asked:
    """One request, and who gets the answer. `started` in nanoseconds, `deadline` in seconds (monotonic)."""

    seq: int
    started: int
    within_s: float
    deadline: float = 0.0
    """Once it was sent."""
    component: Component | None = None
    file: int = -1
    part: int = 0
    cost_ns: int = 0
    """Of the parts before this one."""
    raw: Callable[[Reading], None] | None = None
    survey: Callable[[dict[str, bytes] | None], None] | None = None
    suspended: Callable[[bool, str], None] | None = None
    surveyed: dict[str, bytes] = field(default_factory=dict)


class Asks:
    """The requests without an answer: sent, or kept back."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[Asked, Lane]] = {}
        self._kept: dict[Lane, deque[tuple[Asked, Request]]] = {lane: deque() for lane in Lane}
        self._components: set[Component] = set()

    def add(self, asked: Asked, request: Request) -> None:
        """Takes one on; `ready` gives it out when it may be sent."""
        self._kept[lane_of(request)].append((asked, request))
        if asked.component is not None:
            self._components.add(asked.component)

    def ready(self, now: float) -> list[Request]:
        """What may be sent now. The time to answer starts here; a reading's start stays the moment of its
        asking, which is earlier than the truth, never later."""
        requests: list[Request] = []
        for lane, kept in self._kept.items():
            room = MAX_OPEN[lane] - sum(1 for _, other in self._sent.values() if other is lane)
            while kept and room > 0:
                asked, request = kept.popleft()
                asked.deadline = now + asked.within_s
                self._sent[asked.seq] = asked, lane
                requests.append(request)
                room -= 1
        return requests

    def get(self, seq: int) -> Asked | None:
        """The request that was sent with this number."""
        found = self._sent.get(seq)
        return None if found is None else found[0]

    def done(self, asked: Asked) -> None:
        """It has been answered."""
        del self._sent[asked.seq]
        if asked.component is not None:
            self._components.discard(asked.component)

    def late(self, now: float) -> Asked | None:
        """One that was sent and not answered by its deadline."""
        return next((asked for asked, _ in self._sent.values() if now > asked.deadline), None)

    @property
    def components(self) -> frozenset[Component]:
        """Components that are being read."""
        return frozenset(self._components)

    def clear(self) -> list[Asked]:
        """Forgets and returns all: nobody will answer them."""
        lost = [asked for asked, _ in self._sent.values()]
        for kept in self._kept.values():
            lost += [asked for asked, _ in kept]
            kept.clear()
        self._sent.clear()
        self._components.clear()
        return lost
