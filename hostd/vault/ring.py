"""The ring: which component is read next (pure).

First what somebody waits for, the one not asked for the longest. Besides, the background: what a hint or the
lot has brought forward, and the sweep, which comes back to every component of every VM within a
time that is configured. Those who wait do not starve the background, nor it them: while somebody waits, one
ask in `SHARE` is the background's if it has any to make; one in two if its time is nearly over.

The `process` and the `relro` of one VM are asked for one after the other, so that the measurer can read its
mappings once for both.

The `relro` of a VM whose `process` has drifted is not asked for until an officer has cleared it: the VM is
refused whatever its `relro` is, and what it has mapped may be made to take long to read.

A hint can only bring a reading forward. A flood of hints costs one reading of a component in
`HINT_PAUSE_NS`, or a twentieth of the time, however many come.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final

from hostd.core.findings import Kind, Status, process_of, relro_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from random import Random

    from hostd.core.findings import Component
    from hostd.vault.waiting import Stamp

PENDING_PAUSE_NS: Final = 10_000_000
"""A pending component is not read again before 10 ms are over, nor before the time a reading of it takes."""
HINT_PAUSE_NS: Final = 50_000_000
"""A hint brings no component forward that was asked for less than 50 ms ago; it is read then."""
HINT_SHARE: Final = 20
"""Nor before so many times its last reading's time: a storm of hints costs each component 5 % at most."""
SHARE: Final = 4
"""While somebody waits, one ask in so many may be the background's."""
PENDING_SHARE: Final = 16
"""The sweep comes back to what is pending in this part of its time: a VM that starts is soon known."""
EARLY: Final = 8
"""On an idle host the sweep asks when this part of its time is left, so that it has read within it. While
somebody waits it begins at half of its time."""


def draw(known: Iterable[Component], chance: Random) -> Component:
    """A component by lot: first a kind, so that the host's are not lost among those of many VMs."""
    by_kind: dict[Kind, list[Component]] = {}
    for component in sorted(known):
        by_kind.setdefault(component.kind, []).append(component)
    return chance.choice(by_kind[chance.choice(sorted(by_kind))])


class Ring:
    """When each component was asked for, and what was brought forward. Times in nanoseconds."""

    def __init__(self, sweep_ns: int, known: frozenset[Component]) -> None:
        self._sweep = sweep_ns
        self._known = known
        self._never = dict.fromkeys(sorted(known, key=lambda c: (c.vm, c)))
        """Components that were not asked for yet, in order."""
        self._asked: dict[Component, int] = {}
        """When the others were asked for last; in order of that."""
        self._forward: dict[Component, None] = {}
        self._pending: set[Component] = set()
        self._withheld: set[Component] = set()
        self._rider: Component | None = None
        """The `relro` of the VM whose `process` was asked for last."""
        self._served = 0
        """Asks for those who wait since the last one of the background."""
        self.soon = False
        """Whether something waits for a pause of milliseconds to be over, as of the last `next`."""

    # ── Next ──────────────────────────────────────────────────────────────────────────────────────

    def next(
        self,
        now: int,
        *,
        lacks: Callable[[Component], bool],
        stamps: Mapping[Component, Stamp],
        takes: Callable[[Component], bool],
    ) -> Component | None:
        """The component to ask for: one that somebody waits for (`lacks`), or one in the background.
        `takes` says which can be asked for now."""

        def free(component: Component) -> bool:
            return component not in self._withheld and takes(component)

        self.soon = bool(self._forward)
        needed = self._needed(now, lacks, stamps, free)
        if needed is not None and self._served < 1:
            self._served += 1
            return needed
        late = self._due(now, self._sweep - self._sweep // EARLY, free)
        due = late or self._brought_forward(now, stamps, free)
        if due is None and needed is not None:
            due = self._due(now, self._sweep // 2, free)
        if needed is not None and (due is None or (late is None and self._served < SHARE - 1)):
            self._served += 1
            return needed
        self._served = 0
        return due

    def _needed(
        self,
        now: int,
        lacks: Callable[[Component], bool],
        stamps: Mapping[Component, Stamp],
        takes: Callable[[Component], bool],
    ) -> Component | None:
        def wanted(component: Component) -> bool:
            if not takes(component) or not lacks(component):
                return False
            paused = self._paused(component, stamps.get(component), now)
            self.soon |= paused
            return not paused

        if self._rider in self._known and wanted(self._rider):
            return self._rider
        first = next(filter(wanted, chain(self._never, self._asked)), None)
        if first is not None and first.kind is Kind.RELRO and wanted(process_of(first.vm)):
            return process_of(first.vm)
        return first

    def _paused(self, component: Component, stamp: Stamp | None, now: int) -> bool:
        """Whether it was found pending a moment ago: reading it again at once would spin."""
        asked = self._asked.get(component)
        if asked is None or stamp is None or stamp.status is not Status.PENDING:
            return False
        return asked > now - max(PENDING_PAUSE_NS, stamp.ended - stamp.started)

    def _brought_forward(
        self, now: int, stamps: Mapping[Component, Stamp], takes: Callable[[Component], bool]
    ) -> Component | None:
        for component in self._forward:
            asked, stamp = self._asked.get(component), stamps.get(component)
            cost = 0 if stamp is None else stamp.ended - stamp.started
            pause = max(HINT_PAUSE_NS, HINT_SHARE * cost)
            if (asked is None or asked <= now - pause) and takes(component):
                return component
        return None

    def _due(self, now: int, age: int, takes: Callable[[Component], bool]) -> Component | None:
        """The sweep's next: of those not asked for since `age`, the one not asked for the longest."""
        rider = self._rider
        if rider is not None and self._asked.get(rider, now) <= now - age // 2 and takes(rider):
            return rider
        for component in self._never:
            if takes(component):
                return component
        for component, asked in self._asked.items():
            if asked > now - age:
                break
            if takes(component):
                return component
        for component in sorted(self._pending):
            if self._asked[component] <= now - age // PENDING_SHARE and takes(component):
                return component
        return None

    # ── What happened ─────────────────────────────────────────────────────────────────────────────

    def asked(self, component: Component, now: int) -> None:
        """A reading of the component has been asked for; `now` never goes back."""
        if component in self._known:
            self._never.pop(component, None)
            self._asked.pop(component, None)
            self._asked[component] = now
            self._rider = relro_of(component.vm) if component.kind is Kind.PROCESS else None
            self._forward.pop(component, None)

    def judged(self, component: Component, *, pending: bool) -> None:
        """A reading of the component has been judged."""
        if pending and component in self._asked:
            self._pending.add(component)
        else:
            self._pending.discard(component)

    @property
    def pending(self) -> frozenset[Component]:
        """Components that were pending when they were read last."""
        return frozenset(self._pending)

    def bring_forward(self, component: Component) -> None:
        """The component is read soon, whenever it was read last. What is being read is read again."""
        if component in self._known and component not in self._withheld:
            self._forward[component] = None

    @property
    def withheld(self) -> frozenset[Component]:
        """Components that are not asked for, and that nobody should wait for."""
        return frozenset(self._withheld)

    def drifted(self, component: Component) -> None:
        """The component is latched: what is of no use without it is withheld."""
        if component.kind is Kind.PROCESS:
            relro = relro_of(component.vm)
            self._withheld.add(relro)
            self._forward.pop(relro, None)

    def cleared(self, component: Component) -> None:
        """An officer has cleared it."""
        if component.kind is Kind.PROCESS:
            self._withheld.discard(relro_of(component.vm))

    def exist(self, known: frozenset[Component], *, anew: Iterable[Component] = ()) -> None:
        """These are the components there are. Those of `anew` stand for another process than before."""
        for component in (self._known - known).union(anew):
            self._asked.pop(component, None)
            self._never.pop(component, None)
            self._forward.pop(component, None)
            self._pending.discard(component)
        self._known = known
        new = known - self._asked.keys() - self._never.keys()
        for component in sorted(new, key=lambda c: (c.vm, c)):
            self._never[component] = None
