"""The gate against its one sentence, over traces that nobody thought of.

A machine of random arrivals, readings (which may start before an arrival and end after it), verdicts,
drifts, clearings, restarts of VMs, losses of the measurer. The model keeps the trace and judges each
request that is taken from the trace alone; it shares no code with the gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guestlib.errors import DeadlineError, HostdError, OverloadedError, RefusedDriftError, UnavailableError
from hostd.core.callers import Caller
from hostd.core.findings import Component, Kind, Status
from hostd.vault.gate import Gate
from hostd.vault.waiting import Refused, Waiting
from tests.vault.support_gate import OFFICER, USER, VM_A, VM_B, caller_of, finding, hypervisor, verdict

HOST_KINDS = (Kind.BOOT, Kind.FILES, Kind.GUESTS, Kind.IMA, Kind.KERNEL, Kind.POSTURE, Kind.SELF)
VM_KINDS = (Kind.PROCESS, Kind.RELRO, Kind.DOMAIN)
HOST = {Component(kind) for kind in HOST_KINDS}
GUESTS, FILES, SELF = Component(Kind.GUESTS), Component(Kind.FILES), Component(Kind.SELF)
REQUIRABLE = sorted({*HOST_KINDS, *VM_KINDS} - {Kind.GUESTS, Kind.PROCESS})
STANDING, SWEEP = 12, 24
PER_CALLER = 4
BATCH = 6
COMPONENTS = [*sorted(HOST), *(Component(kind, vm) for vm in (VM_A, VM_B) for kind in VM_KINDS)]
LIKELY_GOOD = st.sampled_from(
    [Status.VERIFIED] * 12 + [Status.PENDING, Status.ABSENT, Status.ABSENT, Status.DRIFTED]
)
RARELY = st.integers(0, 5).map(lambda n: n == 0)


@dataclass
class Trace:
    """What happened, as the sentence needs it."""

    latest: dict[Component, tuple[int, Status]] = field(default_factory=dict)
    """Component → start and verdict of the last reading that was judged and still counts."""
    processes: dict[str, int] = field(default_factory=dict)
    """VM → start time of its process, as the last judged reading of the guests had it."""
    drifted: set[Component] = field(default_factory=set)


class GateMachine(RuleBasedStateMachine):
    @initialize(
        require=st.sets(st.sampled_from(REQUIRABLE)),
        host_scope=st.booleans(),
    )
    def begin(self, require: set[Kind], host_scope: bool) -> None:
        self.require, self.host_scope = require, host_scope
        self.gate = Gate(
            require=frozenset(require),
            host_scope=host_scope,
            waiting_per_caller=PER_CALLER,
            batch=BATCH,
            sweep_ns=SWEEP,
            standing_ns=STANDING,
        )
        self.gate.shut = None
        self.now = 0
        self.trace = Trace()
        self.starts = {VM_A: 1, VM_B: 1}
        self.running = dict(self.starts)
        self.in_flight: dict[Component, tuple[int, dict[str, int]]] = {}
        self.waiting: list[Waiting] = []
        self.observing: list[Waiting] = []
        self.outcomes: dict[int, str] = {}
        self.number = 0
        self.look_at_guests(Status.VERIFIED)

    # ── The model's own reading of the rules ──────────────────────────────────────────────────────

    def needed(self, caller: Caller) -> set[Component]:
        if caller.vm:
            return HOST | {Component(kind, caller.vm) for kind in VM_KINDS}
        vms = [] if caller.officer else list(self.trace.processes)
        return HOST | {Component(kind, vm) for vm in vms for kind in VM_KINDS}

    def good(self, component: Component, status: Status) -> bool:
        tolerated = component.kind not in (Kind.GUESTS, Kind.PROCESS) and component.kind not in self.require
        return status is Status.VERIFIED or (status is Status.ABSENT and tolerated)

    def closed_by_drift(self, caller: Caller) -> bool:
        for component in self.trace.drifted:
            if component in HOST or self.host_scope:
                return True
            if component.vm == caller.vm or caller == USER:
                return True
        return False

    def fresh(self, waiting: Waiting) -> bool:
        """The sentence."""
        caller = waiting.caller
        if caller.vm and self.trace.processes.get(caller.vm) != caller.start_time:
            return False
        return not any(self.lacks(waiting, component) for component in self.needed(caller))

    def lacks(self, waiting: Waiting, component: Component) -> bool:
        started, status = self.trace.latest.get(component, (-100, Status.PENDING))
        return self.early(component, started, waiting) or not self.good(component, status)

    def early(self, component: Component, started: int, waiting: Waiting) -> bool:
        grace = STANDING if component.kind is Kind.DOMAIN else 0
        return started < waiting.arrived - grace

    def settle(self, waiting: Waiting, outcome: str) -> None:
        assert isinstance(waiting.item, int)
        assert waiting.item not in self.outcomes, "a request had two outcomes"
        self.outcomes[waiting.item] = outcome
        self.waiting = [w for w in self.waiting if w.item != waiting.item]

    def refused(self, refused: list[Refused]) -> set[int]:
        for one in refused:
            self.settle(one.request, type(one.error).__name__)
        return {one.request.item for one in refused if isinstance(one.request.item, int)}

    # ── What may happen ───────────────────────────────────────────────────────────────────────────

    @rule(step=st.integers(1, 5))
    def time_passes(self, step: int) -> None:
        self.now += step

    @rule(
        who=st.sampled_from([VM_A, VM_A, VM_A, VM_B, "user", "officer"]),
        stale=st.booleans(),
        patience=st.integers(1, 40),
    )
    def arrive(self, who: str, stale: bool, patience: int) -> None:
        if who in (VM_A, VM_B):
            # A caller may still be one of the process before this one.
            start = max(1, self.starts[who] - (stale and self.number % 3 == 0))
            caller = caller_of(hypervisor(who, start_time=start))
        else:
            caller = USER if who == "user" else OFFICER
        self.number += 1
        waiting = Waiting(caller, self.now, self.now + patience, self.number)
        expected: type[HostdError] | None = None
        if self.closed_by_drift(caller):
            expected = RefusedDriftError
        elif self.gate.shut is not None:
            expected = UnavailableError
        elif sum(w.caller == caller for w in self.waiting) >= PER_CALLER:
            expected = OverloadedError
        if expected is None:
            self.gate.arrive(waiting)
            self.waiting.append(waiting)
        else:
            with pytest.raises(expected):
                self.gate.arrive(waiting)
            self.outcomes[self.number] = "not let in"

    @rule(component=st.sampled_from(COMPONENTS))
    def reading_starts(self, component: Component) -> None:
        if component not in self.in_flight:
            self.in_flight[component] = (self.now, dict(self.running))
            self.gate.ring.asked(component, self.now)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), status=LIKELY_GOOD)
    def reading_ends(self, data: st.DataObject, status: Status) -> None:
        self.judge(data.draw(st.sampled_from(sorted(self.in_flight))), status)

    @rule(odd=st.none() | st.sampled_from(COMPONENTS), status=LIKELY_GOOD, takes=st.booleans())
    def a_whole_round(self, odd: Component | None, status: Status, takes: bool) -> None:
        """All is read once, and perhaps taken: without it, random readings seldom add up."""
        for component in COMPONENTS:
            self.reading_starts(component)
        self.now += 1
        for component in COMPONENTS:
            self.judge(component, status if component == odd else Status.VERIFIED)
        if takes:
            self.take()

    def look_at_guests(self, status: Status) -> None:
        self.reading_starts(GUESTS)
        self.judge(GUESTS, status)

    def judge(self, component: Component, status: Status) -> None:
        started, seen = self.in_flight.pop(component)
        if component == GUESTS:
            self.gate.guests(hypervisor(vm, start_time=start) for vm, start in seen.items())
            before, self.trace.processes = self.trace.processes, dict(seen)
            for vm in {VM_A, VM_B}:
                if vm not in seen or seen[vm] != before.get(vm):
                    for kind in VM_KINDS:
                        self.trace.latest.pop(Component(kind, vm), None)
        self.trace.latest[component] = (started, status)
        if status is Status.DRIFTED:
            self.trace.drifted.add(component)
        expected: set[object] = set()
        for waiting in self.waiting:
            if (status is Status.DRIFTED and self.closed_by_drift(waiting.caller)) or (
                status is Status.ABSENT
                and not self.good(component, status)
                and component in self.needed(waiting.caller)
                and waiting.arrived <= started
            ):
                expected.add(waiting.item)
        refused = self.gate.judged(verdict(component, status), started=started, ended=self.now)
        for one in refused:
            wanted = RefusedDriftError if status is Status.DRIFTED else UnavailableError
            assert type(one.error) is wanted
        assert self.refused(refused) == expected

    @rule(component=st.sampled_from(COMPONENTS), happens=RARELY)
    def drift_is_found_elsewhere(self, component: Component, happens: bool) -> None:
        if not happens:
            return
        self.trace.drifted.add(component)
        expected = {w.item for w in self.waiting if self.closed_by_drift(w.caller)}
        assert self.refused(self.gate.latch(component, (finding(component),))) == expected

    @precondition(lambda self: self.trace.drifted)
    @rule()
    def an_officer_clears_all(self) -> None:
        assert self.gate.host_drifted() == any(c in HOST or self.host_scope for c in self.trace.drifted)
        for component in sorted(self.trace.drifted):
            assert self.gate.clear(component)
            self.trace.latest.pop(component, None)
        self.trace.drifted.clear()

    @rule(vm=st.sampled_from([VM_A, VM_B]))
    def a_vm_ends_or_starts(self, vm: str) -> None:
        if self.running.pop(vm, None) is None:
            self.starts[vm] += 1
            self.running[vm] = self.starts[vm]

    @rule(happens=RARELY)
    def the_measurer_is_lost(self, happens: bool) -> None:
        if not happens:
            return
        self.gate.lose_measurer()
        self.trace.latest.clear()
        self.trace.processes.clear()
        self.in_flight.clear()

    @rule()
    def shut_for_a_while(self) -> None:
        self.gate.shut = "no keys"
        self.arrive(VM_A, False, 10)
        self.take()
        self.gate.shut = None

    @rule(data=st.data(), leaves=st.booleans())
    def a_channel_goes(self, data: st.DataObject, leaves: bool) -> None:
        callers = sorted({w.caller for w in [*self.waiting, *self.observing]}, key=repr)
        if not callers:
            return
        caller = data.draw(st.sampled_from(callers))
        (self.gate.leave if leaves else self.gate.drop)(caller)
        for waiting in [w for w in self.waiting if w.caller == caller]:
            self.settle(waiting, "dropped")
        if leaves:
            self.observing = [o for o in self.observing if o.caller != caller]

    @rule()
    def deadlines(self) -> None:
        expected = {w.item for w in self.waiting if w.deadline <= self.now}
        refused = self.gate.expired(self.now)
        assert all(type(one.error) is DeadlineError for one in refused)
        assert self.refused(refused) == expected

    @rule(who=st.sampled_from([VM_A, "user", "officer"]), patience=st.integers(1, 30))
    def observe(self, who: str, patience: int) -> None:
        caller = caller_of(hypervisor(who)) if who == VM_A else USER if who == "user" else OFFICER
        observer = Waiting(caller, self.now, self.now + patience, object())
        if sum(o.caller == caller for o in self.observing) < 16:
            self.gate.observe(observer)
            self.observing.append(observer)

    @rule()
    def observers_are_told(self) -> None:
        def seen(observer: Waiting, component: Component) -> bool:
            started, status = self.trace.latest.get(component, (-100, Status.PENDING))
            return not self.early(component, started, observer) and status is not Status.PENDING

        expected = [
            o
            for o in self.observing
            if o.deadline <= self.now or all(seen(o, c) for c in self.needed(o.caller))
        ]
        assert self.gate.observed(self.now) == expected
        self.observing = [o for o in self.observing if o not in expected]

    @rule()
    def take(self) -> None:
        callers = {w.caller for w in self.waiting}
        heads = [next(w for w in self.waiting if w.caller == c) for c in callers]
        ready = [
            w
            for w in heads
            if self.gate.shut is None
            and w.deadline > self.now
            and not self.closed_by_drift(w.caller)
            and self.fresh(w)
        ]
        found = self.gate.take(self.now)
        if found is None:
            assert ready == []
            return
        batch, passed = found
        assert 0 < len(batch) <= BATCH
        for waiting in batch:
            assert self.gate.shut is None
            assert waiting.deadline > self.now
            assert not self.closed_by_drift(waiting.caller)
            assert self.fresh(waiting), "taken without fresh readings"
            readings = dict(passed.readings)
            assert self.needed(waiting.caller) <= set(readings)
            for component in self.needed(waiting.caller):
                stamp = readings[component]
                assert (stamp.started, stamp.status) == self.trace.latest[component]
                assert passed.first_start <= stamp.started
                assert stamp.ended <= passed.last_end
            self.settle(waiting, "taken")
        # Nobody who could go was passed over while there was room: every caller with somebody ready
        # had a share. (There are fewer callers here than a batch holds.)
        assert {w.caller for w in ready} == {w.caller for w in batch}
        for waiting in batch:
            earlier = [w for w in self.waiting if w.caller == waiting.caller]
            assert all(w.arrived >= waiting.arrived for w in earlier)

    # ── What always holds ─────────────────────────────────────────────────────────────────────────

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "gate"):
            return
        assert self.gate.waiting == len(self.waiting)
        assert {w.item for w in self.waiting} | set(self.outcomes) == set(range(1, self.number + 1))
        assert not {w.item for w in self.waiting} & set(self.outcomes)

    @rule(busy=st.sets(st.sampled_from(COMPONENTS)), hinted=st.none() | st.sampled_from(COMPONENTS))
    def the_ring_asks(self, busy: set[Component], hinted: Component | None) -> None:
        """Only what exists and is free is asked for, once; and whoever waits is read for."""
        if hinted is not None:
            self.gate.hint(hinted)
        existing = HOST | {Component(kind, vm) for vm in self.trace.processes for kind in VM_KINDS}
        lacking: set[Component] = set()
        for caller in {w.caller for w in self.waiting}:
            newest = [w for w in self.waiting if w.caller == caller][-1]
            lacking |= {c for c in self.needed(caller) if self.lacks(newest, c)}
        for observer in self.observing:
            lacking |= self.needed(observer.caller)
        free = existing - busy - self.in_flight.keys()
        # Those who wait go first but for a share; over so many asks all that is lacking has been asked for.
        asked: list[Component] = []
        for _ in range(4 * len(COMPONENTS)):
            component = self.gate.next_reading(self.now, lambda c: c in free and c not in asked)
            if component is None:
                break
            assert component not in asked
            asked.append(component)
            self.in_flight[component] = (self.now, dict(self.running))
        assert set(asked) <= free | (lacking - busy)
        for caller in {w.caller for w in self.waiting}:
            newest = [w for w in self.waiting if w.caller == caller][-1]
            for component in self.needed(caller) & free:
                pending = self.trace.latest.get(component, (0, None))[1] is Status.PENDING
                if self.lacks(newest, component) and not pending:
                    assert component in asked


GateMachine.TestCase.settings = settings(
    max_examples=250, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)
TestGateModel = GateMachine.TestCase
