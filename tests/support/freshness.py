"""The gate's sentence, checked over a trace (`tests.support.trace`).

    A response to a gated request is released only if everything that its caller's safety rests on was
    measured good by readings that started after the request arrived at the vault, and, after the work
    was done, the TPM quote and a second look at what can change quickly still agreed with that verdict.

This module shares nothing with the gate but the names of the components. What a caller's safety rests on,
what changes quickly and what counts as good are written down here a second time, from the documents.
It reads the events one by one and keeps only what is under way, so that a trace may be of any length.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support import trace

if TYPE_CHECKING:
    from collections.abc import Iterable

HOST = ("guests", "boot", "posture", "ima", "kernel", "files", "self")
OF_A_MACHINE = ("process", "relro", "domain")
QUICK = ("process", "relro")
"""Of each machine that the caller rests on, besides `ima`."""
ALWAYS_NEEDED = ("guests", "process")
STANDING = "domain"
"""Moves by events of its own: a reading from some time before the arrival will do."""
KEPT = 20
"""Violations that are told in full."""


@dataclass(frozen=True)
class Rules:
    """How the host is configured. `tolerated`: kinds that may be absent. `host_scope`: drift of one machine
    closes the gate to all."""

    tolerated: frozenset[str] = frozenset()
    host_scope: bool = False
    standing_ns: int = 20_000_000_000


@dataclass(slots=True)
class _Request:
    arrived: trace.Arrived
    executed: int = 0
    """When; 0: not yet."""
    check: _Check | None = None
    vms: tuple[str, ...] = ()
    """Machines that the caller rested on then."""
    losses: int = 0
    durable: int = 0
    """How much had become durable before it was executed."""


@dataclass(slots=True)
class _Check:
    asked: int
    answered: int = 0
    good: bool = False


@dataclass(slots=True)
class _Reading:
    started: int
    status: str


@dataclass
class Freshness:
    """Takes a trace event by event; `violations` and `counts` say what was found."""

    rules: Rules = field(default_factory=Rules)
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._requests: dict[int, _Request] = {}
        self._readings: dict[str, _Reading] = {}
        self._asked: dict[str, int] = {}
        self._processes: dict[str, tuple[int, int]] = {}
        self._drifted: set[str] = set()
        self._unchecked: list[_Request] = []
        self._checks: dict[int, _Check] = {}
        self._shut = ""
        self._losses = 0
        self._syncs = 0
        self._take = {
            trace.Arrived: self._arrived,
            trace.Asked: self._on_asked,
            trace.Judged: self._judged,
            trace.Machines: self._machines,
            trace.Found: lambda e: self._drifted.add(e.component),
            trace.Cleared: self._cleared,
            trace.Lost: self._lost,
            trace.Shut: self._on_shut,
            trace.Executed: self._executed,
            trace.Durable: self._durable,
            trace.Checking: self._checking,
            trace.Checked: self._checked,
            trace.Told: self._told,
        }

    def take(self, event: trace.AnyEvent) -> None:
        self._take[type(event)](event)  # type: ignore[operator]

    def over(self, events: Iterable[trace.AnyEvent]) -> Freshness:
        for event in events:
            self.take(event)
        return self

    def end(self) -> None:
        """Nothing more comes: whoever was executed was told something."""
        for number, request in self._requests.items():
            if request.executed:
                self._violated(number, "was executed and never told anything")

    @property
    def waiting(self) -> int:
        """Requests that were told nothing so far."""
        return len(self._requests)

    def _violated(self, number: int, what: str) -> None:
        self.counts["violations"] += 1
        if len(self.violations) < KEPT:
            self.violations.append(f"request {number} {what}")

    # ── What is known of the host ─────────────────────────────────────────────────────────────────

    def _on_asked(self, event: trace.Asked) -> None:
        if event.component in self._asked:
            self._violated(-1, f"{event.component} is read twice at once")
        self._asked[event.component] = event.at

    def _judged(self, event: trace.Judged) -> None:
        started = self._asked.pop(event.component, None)
        if started is None:
            self._violated(-1, f"a reading of {event.component} that nobody asked for")
            return
        self._readings[event.component] = _Reading(started, event.status)
        self.counts["readings"] += 1
        self.counts[f"readings {event.status}"] += 1
        if event.status == "drifted":
            self._drifted.add(event.component)

    def _machines(self, event: trace.Machines) -> None:
        for vm, process in self._processes.items():
            if event.processes.get(vm) != process:
                self._forget_machine(vm)
        for vm in event.processes.keys() - self._processes.keys():
            self._forget_machine(vm)
        self._processes = event.processes

    def _forget_machine(self, vm: str) -> None:
        """Another process, or none, or one that was not there: what was read is not of it."""
        for kind in OF_A_MACHINE:
            self._readings.pop(f"{kind}:{vm}", None)

    def _cleared(self, event: trace.Cleared) -> None:
        self._drifted.discard(event.component)
        self._readings.pop(event.component, None)

    def _lost(self, _event: trace.Lost) -> None:
        self._readings.clear()
        self._asked.clear()
        self._processes = {}
        self._losses += 1

    def _on_shut(self, event: trace.Shut) -> None:
        self._shut = event.why

    def _durable(self, _event: trace.Durable) -> None:
        self._syncs += 1

    # ── What a caller rests on ────────────────────────────────────────────────────────────────────

    def _vms(self, caller: trace.Arrived) -> list[str]:
        if caller.vm:
            return [caller.vm]
        return [] if caller.officer else list(self._processes)

    def _good(self, kind: str, status: str) -> bool:
        absent_will_do = kind in self.rules.tolerated and kind not in ALWAYS_NEEDED
        return status == "verified" or (status == "absent" and absent_will_do)

    def _closed(self, caller: trace.Arrived) -> str:
        """Why nothing may be answered to the caller now, whatever was read; empty: it may."""
        if self._shut:
            return f"the gate is shut ({self._shut})"
        if caller.vm and self._processes.get(caller.vm) != tuple(caller.process):
            return "its machine is another process now"
        for component in self._drifted:
            vm = component.partition(":")[2]
            own = not vm or vm == caller.vm or not (caller.vm or caller.officer)
            if own or self.rules.host_scope:
                return f"{component} has drifted"
        return ""

    def _lacks(self, component: str, since: int) -> str:
        """What is wrong with the latest reading of a component, if one must have started since `since`."""
        kind = component.partition(":")[0]
        reading = self._readings.get(component)
        if reading is None:
            return f"nothing was read of {component}"
        if reading.started < since - (self.rules.standing_ns if kind == STANDING else 0):
            return f"{component} was read {(since - reading.started) / 1e6:.3f} ms too early"
        if not self._good(kind, reading.status):
            return f"{component} was {reading.status}"
        return ""

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def _arrived(self, event: trace.Arrived) -> None:
        self.counts["requests"] += 1
        if event.arrived > event.at:
            self._violated(event.number, "arrived after it was seen")
        self._requests[event.number] = _Request(event)

    def _executed(self, event: trace.Executed) -> None:
        request = self._requests.get(event.number)
        if request is None or request.executed:
            self._violated(event.number, "was executed twice, or after it was told something")
            return
        caller = request.arrived
        request.executed, request.losses, request.durable = event.at, self._losses, self._syncs
        request.vms = tuple(self._vms(caller))
        self._unchecked.append(request)
        if why := self._closed(caller):
            self._violated(event.number, f"was executed although {why}")
        if caller.deadline <= event.at:
            self._violated(event.number, "was executed after its deadline")
        needs = [*HOST, *(f"{kind}:{vm}" for vm in request.vms for kind in OF_A_MACHINE)]
        for component in needs:
            if why := self._lacks(component, caller.arrived):
                self._violated(event.number, f"was executed although {why}")

    def _checking(self, event: trace.Checking) -> None:
        check = self._checks[event.number] = _Check(event.at)
        for request in self._unchecked:
            request.check = check
        self._unchecked.clear()

    def _checked(self, event: trace.Checked) -> None:
        check = self._checks.pop(event.number)
        check.answered, check.good = event.at, event.good

    def _told(self, event: trace.Told) -> None:
        request = self._requests.pop(event.number, None)
        if request is None:
            self._violated(event.number, "was told two things")
            return
        self.counts[event.outcome or "released"] += 1
        if event.outcome:
            return  # a refusal that says nothing of the work
        number, caller, check = event.number, request.arrived, request.check
        if not request.executed:
            self._violated(number, "was answered without being executed")
            return
        if check is None or not check.answered:
            self._violated(number, "was answered before the TPM was")
            return
        if not check.good:
            self._violated(number, "was answered although the TPM did not agree")
        if why := self._closed(caller):
            self._violated(number, f"was answered although {why}")
        if request.losses != self._losses:
            self._violated(number, "was answered although the measurer was lost meanwhile")
        if request.durable == self._syncs:
            self._violated(number, "was answered before its entry was durable")
        # A machine that has ended is not looked at; one that has started since had no part in the verdict.
        there = [vm for vm in request.vms if vm in self._processes]
        for component in ("ima", *(f"{kind}:{vm}" for vm in there for kind in QUICK)):
            if why := self._lacks(component, check.answered):
                self._violated(number, f"was answered although, in the second look, {why}")
