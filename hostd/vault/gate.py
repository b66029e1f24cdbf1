"""The gate: which requests may execute, and what has to be read for the others (pure).

The promise (docs/architecture.md, "The gate"): a response to a gated request is released only if
everything its caller's safety rests on was measured good by readings that started after the request
arrived, and a second look after the work still agreed.

Kept by one stamp per component: when its latest reading *started*, and how it was judged. A request
that arrived at time a may execute when every component its caller needs has an acceptable stamp
that started at or after a. Times are the vault's own monotonic nanoseconds: arrival is taken after receiving,
a reading's start is when the vault asked for it: true bounds whatever the measurer's clock says.

Everything unknown denies: no stamp, another status, a caller whose process is not the one that the
channel was bound to. This module does no I/O and holds no key; `hostd.vault.batches` drives it.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING

from guestlib.errors import DeadlineError, OverloadedError, RefusedDriftError, UnavailableError
from hostd.core.findings import (
    BOOT,
    FILES,
    GUESTS,
    IMA,
    KERNEL,
    POSTURE,
    SELF,
    VM_KINDS,
    Component,
    Finding,
    Kind,
    Status,
    Verdict,
)
from hostd.vault.demand import Demand
from hostd.vault.observers import Observers
from hostd.vault.ring import HINT_PAUSE_NS, Ring
from hostd.vault.shares import Shares
from hostd.vault.waiting import Pass, Refused, Stamp, Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from guestlib.errors import HostdError
    from hostd.core.callers import Caller
    from hostd.core.readings import Hypervisor

HOST_COMPONENTS = frozenset({GUESTS, BOOT, POSTURE, IMA, KERNEL, FILES, SELF})
ALWAYS = frozenset({Kind.GUESTS, Kind.PROCESS})
"""Kinds that must be verified whatever the configuration requires: who is who is known by them."""
STANDING = frozenset({Kind.DOMAIN})
"""Kinds with events of their own: a request rests on the latest reading of its VM's, if not too old."""
STANDING_NS = 20_000_000_000
"""How old a standing reading may be when a request arrives: four sweeps."""
_NEVER = 1 << 63  # nanoseconds: after every deadline


class Gate:
    """State of measurement and the requests that wait for it."""

    def __init__(
        self,
        *,
        require: frozenset[Kind],
        host_scope: bool,
        waiting_per_caller: int,
        batch: int,
        sweep_ns: int = 5_000_000_000,
        standing_ns: int = STANDING_NS,
    ) -> None:
        self._require = require
        self._standing_ns = standing_ns
        self._host_scope = host_scope
        self._per_caller = waiting_per_caller
        self._shares = Shares(batch)
        self._stamps: dict[Component, Stamp] = {}
        self.last_good: dict[Component, int] = {}
        """When the latest good reading of a component started, whatever came after. For people."""
        self._latched: dict[Component, tuple[Finding, ...]] = {}
        self._queues: dict[Caller, deque[Waiting]] = {}
        self._earliest = _NEVER
        """No queued request's deadline is before it."""
        self._turn: deque[Caller] = deque()
        self._hypervisors: dict[str, Hypervisor] = {}
        self._known = HOST_COMPONENTS
        self._observers = Observers()
        self.ring = Ring(sweep_ns, HOST_COMPONENTS)
        """Which component is read next."""
        self._passes = 0
        self._readings = 0
        self.shut: str | None = "starting"
        """Why the gate is closed for all, drift apart: no keys, no reference values, no measurer."""

    # ── What a caller rests on ────────────────────────────────────────────────────────────────────

    def needs(self, caller: Caller) -> frozenset[Component]:
        """The host's components; for a VM its own process; for a host-local caller every VM's."""
        if caller.vm:
            return HOST_COMPONENTS | _of_vm(caller.vm)
        if caller.officer:
            return HOST_COMPONENTS
        return self._known

    def acceptable(self, component: Component, status: Status) -> bool:
        """Whether a reading so judged is enough. Absent is, only where it is not required."""
        if status is Status.VERIFIED:
            return True
        return (
            status is Status.ABSENT and component.kind not in ALWAYS and component.kind not in self._require
        )

    def latched_for(self, caller: Caller) -> Component | None:
        """A drifted component that closes the gate to this caller until an officer clears it."""
        for component in self._latched:
            if component.kind not in VM_KINDS or self._host_scope:
                return component
            if component.vm == caller.vm or not (caller.vm or caller.officer):
                return component
        return None

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def arrive(self, request: Waiting) -> None:
        """Queues a request.

        Raises:
            RefusedDriftError: something it rests on has drifted.
            UnavailableError: the gate is shut.
            OverloadedError: the caller has too much waiting.
        """
        if self.latched_for(request.caller) is not None:
            raise RefusedDriftError("a measurement this answer rests on has drifted")
        if self.shut is not None:
            raise UnavailableError(f"the gate is closed: {self.shut}")
        queue = self._queues.get(request.caller)
        if queue is None:
            queue = self._queues[request.caller] = deque()
            self._turn.append(request.caller)
        if len(queue) >= self._per_caller:
            raise OverloadedError(f"{self._per_caller} requests of this caller are waiting")
        queue.append(request)
        self._earliest = min(self._earliest, request.deadline)
        self._shares.arrived(request.caller, request.arrived)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def bound(self, caller: Caller) -> bool:
        """Whether a VM is still the very process that the caller's channel was bound to."""
        hypervisor = self._hypervisors.get(caller.vm)
        return not caller.vm or (
            hypervisor is not None
            and (hypervisor.pid, hypervisor.start_time) == (caller.pid, caller.start_time)
        )

    def until(self, component: Component, *, good: bool = True) -> int:
        """A request that arrived by then has a reading of the component: a good one, or (not `good`) one that
        says how it stands. -1: there is none."""
        stamp = self._stamps.get(component)
        if stamp is None or stamp.status is Status.PENDING:
            return -1
        if good and not self.acceptable(component, stamp.status):
            return -1
        return stamp.started + (self._standing_ns if component.kind in STANDING else 0)

    def _may_execute(self, caller: Caller) -> int:
        """Requests of the caller that arrived by then have all the readings they need. -1: none has."""
        if not self.bound(caller):
            return -1
        return min(map(self.until, self.needs(caller)))

    def take(self, now: int, without: Collection[Caller] = ()) -> tuple[list[Waiting], Pass] | None:
        """The next batch that may execute now, callers in turn, and the pass it rests on."""
        if self.shut is not None:
            return None
        batch: list[Waiting] = []
        components: set[Component] = set()
        spent = 0
        share = self._shares.of_each(now, len(self._turn))
        held = self._shares.held(now, self._queues, without)
        for caller in tuple(self._turn):
            if spent >= self._shares.batch:
                break  # those left are the first of the next batch
            self._turn.rotate(-1)
            requests = self._queues[caller]
            barred = caller in without or caller in held or self.latched_for(caller) is not None
            until = -1 if barred else self._may_execute(caller)
            taken = 0
            while (
                requests
                and taken < min(share, self._shares.batch - spent)
                and requests[0].deadline > now
                and requests[0].arrived <= until
            ):
                taken += requests[0].cost
                batch.append(requests.popleft())
            if taken:
                spent += taken
                components |= self.needs(caller)
        self._forget_empty()
        if not batch:
            return None
        self._shares.took(frozenset(request.caller for request in batch))
        self._passes += 1
        return batch, Pass.of(self._passes, components, self._stamps)

    def expired(self, now: int) -> list[Refused]:
        """Removes and returns requests whose deadline has passed."""
        if now < self._earliest:
            return []
        late = self._remove(
            lambda r: r.deadline <= now,
            lambda _r: DeadlineError("no complete measurement before the request's deadline"),
        )
        self._earliest = min((r.deadline for queue in self._queues.values() for r in queue), default=_NEVER)
        return late

    def drop(self, caller: Caller) -> None:
        """Forgets the queued requests of a caller."""
        self._queues.pop(caller, None)
        if caller in self._turn:
            self._turn.remove(caller)

    def leave(self, caller: Caller) -> None:
        """The caller's channel is gone: its requests and observers too."""
        self.drop(caller)
        self._observers.leave(caller)

    def _forget_empty(self) -> None:
        for caller in [c for c, requests in self._queues.items() if not requests]:
            self.drop(caller)

    def _remove(
        self, which: Callable[[Waiting], bool], error: Callable[[Waiting], HostdError]
    ) -> list[Refused]:
        refused: list[Refused] = []
        for caller, queue in self._queues.items():
            refused += [Refused(r, error(r)) for r in queue if which(r)]
            self._queues[caller] = deque(r for r in queue if not which(r))
        self._forget_empty()
        return refused

    # ── Observers: evidence and health ────────────────────────────────────────────────────────────

    def observe(self, observer: Waiting) -> None:
        """Queues somebody who wants to see fresh readings, good or bad, and uses no key.

        Raises:
            OverloadedError: the caller has too many.
        """
        self._observers.add(observer)

    def observed(self, now: int) -> list[Waiting]:
        """Those whose readings are all there, or whose time is over: they are told how it stands."""
        return self._observers.take(
            now,
            lambda o: all(
                self.until(c, good=False) >= o.arrived for c in self.needs(o.caller) - self.ring.withheld
            ),
        )

    # ── Readings ──────────────────────────────────────────────────────────────────────────────────

    def next_reading(self, now: int, takes: Callable[[Component], bool]) -> Component | None:
        """The component to ask for now; it counts as asked for. `takes` says which the measurer takes.
        None: nothing is to be read, or it takes none of that."""
        requests, observers = Demand(), Demand()
        for caller, queue in self._queues.items():
            if queue and self.latched_for(caller) is None:
                requests.add(caller, queue[-1].arrived)
        for observer in self._observers:
            observers.add(observer.caller, observer.arrived)

        def lacks(component: Component) -> bool:
            return self.until(component) < requests.of(component) or (
                self.until(component, good=False) < observers.of(component)
            )

        behind = {b for c in self.ring.pending if lacks(c) for b in self._behind(c)}
        listed = self._stamps.get(GUESTS)
        if (requests.vms.keys() | observers.vms.keys()) - self._hypervisors.keys() and (
            listed is None or listed.started <= now - HINT_PAUSE_NS
        ):
            behind.add(GUESTS)  # somebody's machine is not on the list
        component = self.ring.next(
            now, lacks=lambda c: c in behind or lacks(c), stamps=self._stamps, takes=takes
        )
        if component is not None:
            self.ring.asked(component, now)
        return component

    def _behind(self, component: Component) -> set[Component]:
        """What a component that is pending may be waiting for, unless it was read since: the shared files
        (what a process has mapped meanwhile) and the list of machines (it ended, or was started again).
        `relro` waits for its own work, and its VM's `process` for the rest."""
        stamp = self._stamps.get(component)
        if stamp is None or stamp.status is not Status.PENDING or component.kind is Kind.RELRO:
            return set()
        found = {FILES} if component == SELF else {FILES, GUESTS} if component.kind in VM_KINDS else set()
        return {c for c in found if (s := self._stamps.get(c)) is None or s.started <= stamp.started}

    def hint(self, component: Component) -> None:
        """Something may have happened to the component: it is read soon."""
        self.ring.bring_forward(component)

    def guests(self, hypervisors: Iterable[Hypervisor]) -> None:
        """Takes note of which VM is which process, from a judged reading of `guests`."""
        before, self._hypervisors = self._hypervisors, {h.vm: h for h in hypervisors}
        seen = before.keys() | {c.vm for c in self._stamps if c.vm}
        gone = {vm for vm in seen if not _same(self._hypervisors.get(vm), before.get(vm))}
        self._stamps = {c: stamp for c, stamp in self._stamps.items() if c.vm not in gone}
        self.last_good = {c: started for c, started in self.last_good.items() if c.vm not in gone}
        self._known = HOST_COMPONENTS.union(*map(_of_vm, self._hypervisors))
        self.ring.exist(self._known, anew={c for c in self._known if c.vm in gone})

    def hypervisor(self, vm: str) -> Hypervisor | None:
        return self._hypervisors.get(vm)

    @property
    def hypervisors(self) -> tuple[Hypervisor, ...]:
        return tuple(self._hypervisors.values())

    def judged(self, verdict: Verdict, *, started: int, ended: int) -> list[Refused]:
        """Moves the component's stamp; returns the requests that this verdict refuses for good."""
        component = verdict.component
        self._readings += 1
        self._stamps[component] = Stamp(self._readings, started, ended, verdict.status)
        self.ring.judged(component, pending=verdict.status is Status.PENDING)
        if verdict.good:
            self.last_good[component] = started
        if verdict.status is Status.DRIFTED:
            return self.latch(component, verdict.findings)
        if verdict.status is Status.ABSENT and not self.acceptable(component, verdict.status):
            return self._remove(
                lambda r: r.arrived <= started and component in self.needs(r.caller),
                lambda _r: UnavailableError(f"{component.kind} cannot be measured on this host"),
            )
        return []

    def latch(self, component: Component, findings: tuple[Finding, ...]) -> list[Refused]:
        """Closes the gate to all that rest on a drifted component, until `clear`."""
        self._latched[component] = findings
        self.ring.drifted(component)
        return self._remove(
            lambda r: self.latched_for(r.caller) is not None,
            lambda _r: RefusedDriftError("a measurement this answer rests on has drifted"),
        )

    def clear(self, component: Component) -> bool:
        """An officer has cleared this drift; a new good reading is still needed. False: it had none."""
        self._stamps.pop(component, None)
        self.ring.cleared(component)
        self.ring.bring_forward(component)
        return self._latched.pop(component, None) is not None

    def lose_measurer(self) -> None:
        """No stamp survives the loss of the measurer."""
        self._stamps.clear()
        self._hypervisors.clear()
        self._known = HOST_COMPONENTS
        self.ring.exist(HOST_COMPONENTS, anew=HOST_COMPONENTS)

    @property
    def known(self) -> frozenset[Component]:
        """Every component there is: the host's, and those of each VM."""
        return self._known

    @property
    def latched(self) -> dict[Component, tuple[Finding, ...]]:
        return dict(self._latched)

    @property
    def stamps(self) -> dict[Component, Stamp]:
        return dict(self._stamps)

    @property
    def passes(self) -> int:
        return self._passes

    def host_drifted(self) -> bool:
        """Whether a drift closes the gate for all: keys must leave memory."""
        return any(c.kind not in VM_KINDS or self._host_scope for c in self._latched)


@lru_cache(4096)
def _of_vm(vm: str) -> frozenset[Component]:
    return frozenset(Component(kind, vm) for kind in VM_KINDS)


def _same(a: Hypervisor | None, b: Hypervisor | None) -> bool:
    return a is not None and b is not None and (a.pid, a.start_time) == (b.pid, b.start_time)
