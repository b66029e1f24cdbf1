"""Gate, batches, ledger and store against the gate's sentence, with a fault at any step (hypothesis).

What may happen between any two steps: the measurer is lost, the TPM fails or is late, the disk is full when
the ledger is written, the store fails, something drifts, a machine is started again, a deadline passes, the
clock on the wall jumps, the vault is killed. The trace is judged by `tests.support.freshness`;
what was answered must be in the ledger on the disk whatever came after.
"""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any, cast

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guestlib.errors import DeniedError, HostdError
from hostd.core.callers import Caller
from hostd.core.findings import GUESTS, IMA, Component, Kind, Status
from hostd.platform.tpm_errors import TpmError
from hostd.vault import recording
from hostd.vault.batches import CONFIRM_S, Batches
from hostd.vault.counters import Counters
from hostd.vault.done import Done
from hostd.vault.gate import Gate
from hostd.vault.ledger import Ledger
from hostd.vault.store import Store, StoreError
from hostd.vault.tpmlink import PcrsRead
from hostd.vault.waiting import Waiting
from tests.support.freshness import Freshness, Rules
from tests.support.pipeline import MS, PCRS, Clock, Judge, S, simulated
from tests.support.trace import Recorder
from tests.vault.support_gate import (
    HOST,
    OFFICER,
    USER,
    VM_A,
    VM_B,
    caller_of,
    finding,
    hypervisor,
    of_vm,
    verdict,
)

COMPONENTS = [*HOST, *of_vm(VM_A, VM_B)]
ODDLY = st.sampled_from([Status.VERIFIED] * 10 + [Status.PENDING, Status.ABSENT, Status.DRIFTED])
FAULTS = ("measurer", "tpm", "restart", "drift", "late", "pcr", "disk", "store", "kill", "wall")
RARELY = st.integers(0, 7).map(lambda n: n == 0)


class Outside:
    """The measurer and the TPM, as the pipeline sees them: they keep what they are asked."""

    def __init__(self) -> None:
        self.ready = True
        self.appraiser = Judge()
        self.reading: dict[Component, tuple[int, dict[str, int]]] = {}
        self.asked: list[Any] = []
        self.clock: Clock
        self.running: dict[str, int]

    @property
    def busy(self) -> frozenset[Component]:
        return frozenset(self.reading)

    def ask(self, component: Component) -> None:
        assert component not in self.reading
        self.reading[component] = self.clock.now, dict(self.running)

    def attest(self, _signing: object, told: Any) -> None:
        self.asked.append(told)

    def differing(self, pcrs: dict[int, bytes]) -> list[tuple[int, bytes, bytes]]:
        return [(0, PCRS[0], pcrs[0])] if pcrs[0] != PCRS[0] else []


class PipelineMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.patches = simulated(self.clock)
        self.patches.__enter__()
        self.numbers = itertools.count()
        self.starts = itertools.count(3)
        self.running = {VM_A: 1, VM_B: 2}
        self.violations: list[str] = []
        self.told: dict[int, str] = {}
        self.entries: dict[int, int] = {}
        """Answered request → its entry."""
        self.arrived: set[int] = set()
        Store(Path(self.folder.name) / "store.sqlite", create=True).close()
        self.serve()

    def serve(self) -> None:
        """A vault's pipeline starts on what is on the disk."""
        folder = Path(self.folder.name)
        self.freshness = Freshness(Rules(standing_ns=20 * S))
        self.ledger, self.store = Ledger(folder / "ledger.jsonl"), Store(folder / "store.sqlite")
        self.gate = Gate(
            require=frozenset(Kind), host_scope=False, waiting_per_caller=8, batch=8, standing_ns=20 * S
        )
        self.outside = Outside()
        self.outside.clock, self.outside.running = self.clock, self.running
        self.batches = Batches(
            gate=self.gate,
            measuring=cast("Any", self.outside),
            tpm=cast("Any", self.outside),
            ledger=self.ledger,
            heads=cast("Any", None),
            recorder=recording.Recorder(self.ledger, cast("Any", None), cast("Any", None)),
            receipts=cast("Any", None),
            store=self.store,
            counters=Counters(),
            evidence_digest=lambda passed: passed.number.to_bytes(32),
            found=self.found,
            shut=self.shut,
        )
        recorder = Recorder(self.freshness.take, now=self.clock.monotonic_ns)
        recorder.attach(self.gate, self.outside, self.outside)
        recorder.watch_ledger(self.ledger)
        self.gate.shut = None
        self.waiting: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "patches"):
            self.end()
            self.patches.__exit__(None, None, None)
            self.folder.cleanup()

    def end(self) -> None:
        self.violations += self.freshness.violations
        assert self.violations == []
        self.ledger.close()
        self.store.close()

    # ── The vault's wiring ────────────────────────────────────────────────────────────────────────

    def found(self, component: Component, findings: Any) -> None:
        if component not in self.gate.latched:
            self.refuse(self.gate.latch(component, findings))

    def shut(self, why: str) -> None:
        self.gate.shut = why

    def refuse(self, refused: Any) -> None:
        for one in refused:
            one.request.item.refuse(one.error)

    def go_on(self) -> None:
        self.refuse(self.gate.expired(self.clock.now))
        self.batches.confirm()
        self.batches.start()

    # ── Routine ───────────────────────────────────────────────────────────────────────────────────

    @rule(
        who=st.sampled_from([VM_A, VM_A, VM_B, "user", "officer"]),
        patience_ms=st.sampled_from([1, 20, 10_000, 10_000]),
        writes=st.booleans(),
        fails=RARELY,
    )
    def arrive(self, who: str, patience_ms: int, writes: bool, fails: bool) -> None:
        number = next(self.numbers)
        caller: Caller = {"user": USER, "officer": OFFICER}.get(who) or caller_of(
            hypervisor(who, start_time=self.running.get(who, 1))
        )

        def run(_now: int) -> Done:
            if writes:
                self.store.set_meta(f"r{number}", b"written")
            if fails:
                raise DeniedError("no")
            return Done(msgspec.Struct(), "red", "key", 1)

        def answer(_result: object, receipt: Any) -> None:
            assert number not in self.told, "told twice"
            self.told[number] = "answered"
            self.entries[number] = receipt.ledger
            self.waiting.discard(number)

        def refuse(error: HostdError) -> None:
            assert number not in self.told, "told twice"
            self.told[number] = error.code
            self.waiting.discard(number)

        job = recording.Job("Encrypt", writes, False, run, answer, refuse)
        self.arrived.add(number)
        self.waiting.add(number)
        try:
            self.gate.arrive(Waiting(caller, self.clock.now, self.clock.now + patience_ms * MS, job))
        except HostdError as error:
            job.refuse(error)

    @rule(component=st.sampled_from(COMPONENTS))
    def ask(self, component: Component) -> None:
        if self.outside.ready and component not in self.outside.reading:
            self.outside.ask(component)

    @precondition(lambda self: self.outside.reading)
    @rule(data=st.data(), status=ODDLY)
    def reading_ends(self, data: st.DataObject, status: Status) -> None:
        self.judge(data.draw(st.sampled_from(sorted(self.outside.reading))), status)

    @rule(odd=st.none() | st.sampled_from(COMPONENTS), status=ODDLY)
    def a_whole_round(self, odd: Component | None, status: Status) -> None:
        """All is asked for anew and read: what waits is ready."""
        if not self.outside.ready:
            return
        for component in list(self.outside.reading):
            self.judge(component, Status.VERIFIED)
        self.clock.now += 1
        for component in COMPONENTS:
            self.ask(component)
        self.clock.now += MS
        for component in COMPONENTS:
            if component in self.outside.reading:
                self.judge(component, status if component == odd else Status.VERIFIED)

    def judge(self, component: Component, status: Status) -> None:
        started, seen = self.outside.reading.pop(component)
        if component.vm and seen.get(component.vm) != self.running.get(component.vm):
            status = Status.PENDING  # it ended meanwhile
        if component == GUESTS:
            self.gate.guests(hypervisor(vm, start_time=start) for vm, start in seen.items())
        self.refuse(self.gate.judged(verdict(component, status), started=started, ended=self.clock.now))
        self.go_on()

    @precondition(lambda self: self.outside.asked)
    @rule(good=st.integers(0, 5).map(lambda n: n > 0))
    def the_tpm_answers(self, good: bool) -> None:
        self.clock.now += MS
        pcrs = dict(PCRS) if good else {**PCRS, 0: b"\xff" * 32}
        self.outside.asked.pop(0)(PcrsRead(pcrs))

    @rule(ms=st.sampled_from([1, 1, 1, 30, 300, int(CONFIRM_S * 1000) + 1]))
    def time_passes(self, ms: int) -> None:
        self.clock.now += ms * MS
        self.go_on()

    @rule(
        who=st.sampled_from([VM_A, VM_B, "user", "officer"]),
        step=st.integers(0, 4),
        fault=st.none() | st.sampled_from(FAULTS),
        odd=st.none() | st.sampled_from(COMPONENTS),
    )
    def the_whole_way(self, who: str, step: int, fault: str | None, odd: Component | None) -> None:
        """From arrival to answer on a host where all is well, but for a fault at one step."""
        self.heal()
        for number in range(5):
            if number == step and fault is not None:
                self.happens(fault, odd)
            if number == 0:
                self.arrive(who, 10_000, True, False)
            elif number == 1:
                self.a_whole_round(None, Status.VERIFIED)
            elif number == 2 and self.outside.asked:
                self.the_tpm_answers(True)
            elif number > 2:
                self.finish()

    @rule(
        step=st.integers(0, 6),
        fault=st.none() | st.sampled_from(FAULTS),
        odd=st.none() | st.sampled_from(COMPONENTS),
        later_first=st.booleans(),
    )
    def two_on_the_way(self, step: int, fault: str | None, odd: Component | None, later_first: bool) -> None:
        """A batch of one machine has its second look when one of the other is executed."""
        self.heal()
        for number in range(6):
            if number == step and fault is not None:
                self.happens(fault, odd)
            if number == 0:
                self.arrive(VM_B, 10_000, True, False)
                self.a_whole_round(None, Status.VERIFIED)
            elif number in (1, 3) and self.outside.asked:
                self.the_tpm_answers(True)
            elif number == 2:
                self.arrive(VM_A, 10_000, True, False)
                self.are_read(*HOST, *of_vm(VM_A))
            elif number == 4 and later_first:
                self.are_read(IMA, *of_vm(VM_A))
            elif number == 5:
                self.finish()

    def are_read(self, *components: Component) -> None:
        """From now on, and nothing else is."""
        self.clock.now += 1
        for component in components:
            if component in self.outside.reading:
                self.judge(component, Status.VERIFIED)
            self.ask(component)
            if component in self.outside.reading:
                self.judge(component, Status.VERIFIED)

    def finish(self) -> None:
        """The batch under way, if there is one, is quoted and looked at again."""
        self.go_on()
        if self.outside.asked:
            self.the_tpm_answers(True)
        for component in sorted(self.outside.reading):
            self.judge(component, Status.VERIFIED)
        self.time_passes(1)

    def heal(self) -> None:
        """Officers have cleared all, the measurer is there, both machines run."""
        self.an_officer_clears_all()
        self.the_measurer_is_lost(True)
        for vm in (VM_A, VM_B):
            if vm not in self.running:
                self.a_machine_ends_or_starts(vm, True)

    def happens(self, fault: str, odd: Component | None) -> None:
        match fault:
            case "measurer":
                self.the_measurer_is_lost(False)
                self.the_measurer_is_lost(True)
            case "tpm" if self.outside.asked:
                self.the_tpm_fails()
            case "pcr" if self.outside.asked:
                self.the_tpm_answers(False)
            case "restart":
                self.a_machine_ends_or_starts(VM_A, True)
            case "drift":
                self.drift_is_found_elsewhere(odd or GUESTS, True)
            case "late":
                self.time_passes(int(CONFIRM_S * 1000) + 1)
            case "disk":
                self.the_disk_is_full(True, "fdatasync")
            case "store":
                self.the_store_fails(True, "commit")
            case "kill":
                self.the_vault_is_killed(True)
            case "wall":
                self.the_wall_clock_jumps(-24)

    # ── Faults ────────────────────────────────────────────────────────────────────────────────────

    @rule(hours=st.integers(-24, 24))
    def the_wall_clock_jumps(self, hours: int) -> None:
        self.clock.wall += hours * 3600 * S

    @rule(back=st.booleans())
    def the_measurer_is_lost(self, back: bool) -> None:
        if not back:
            self.outside.ready, self.gate.shut = False, "the measurer was lost"
            self.outside.reading.clear()
            self.gate.lose_measurer()
            self.batches.abandon("the measurer was lost")
        elif not self.outside.ready:
            self.outside.ready, self.gate.shut = True, None

    @precondition(lambda self: self.outside.asked)
    @rule()
    def the_tpm_fails(self) -> None:
        self.outside.asked.pop(0)(TpmError("no answer before the deadline"))

    @rule(vm=st.sampled_from([VM_A, VM_B]), back=st.booleans())
    def a_machine_ends_or_starts(self, vm: str, back: bool) -> None:
        if self.running.pop(vm, None) is None or back:
            self.running[vm] = next(self.starts)

    @rule(component=st.sampled_from(COMPONENTS), happens=RARELY)
    def drift_is_found_elsewhere(self, component: Component, happens: bool) -> None:
        if happens:
            self.found(component, (finding(component),))
            self.go_on()

    @precondition(lambda self: self.gate.latched)
    @rule()
    def an_officer_clears_all(self) -> None:
        for component in list(self.gate.latched):
            self.gate.clear(component)
        self.outside.reading.clear()
        self.gate.lose_measurer()
        self.batches.abandon("reference values changed")

    @rule(happens=RARELY, when=st.sampled_from(["write", "fdatasync"]))
    def the_disk_is_full(self, happens: bool, when: str) -> None:
        """While the next batch is executed and recorded."""
        if not happens:
            return
        real = getattr(os, when)

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        self.arrive(VM_A, 10_000, True, False)
        setattr(os, when, full)
        try:
            self.a_whole_round(None, Status.VERIFIED)
        finally:
            setattr(os, when, real)
        self.finish()
        self.the_vault_is_killed(True)

    @rule(happens=RARELY, when=st.sampled_from(["savepoint", "release", "commit"]))
    def the_store_fails(self, happens: bool, when: str) -> None:
        if not happens:
            return

        def fails(*_: object) -> None:
            raise StoreError("disk I/O error")

        self.arrive(VM_A, 10_000, True, False)
        setattr(self.store, when, fails)
        try:
            self.a_whole_round(None, Status.VERIFIED)
        finally:
            delattr(self.store, when)
        self.finish()
        self.the_vault_is_killed(True)

    @rule(happens=RARELY)
    def the_vault_is_killed(self, happens: bool) -> None:
        """Nobody is told anything more; another starts on the files as they are."""
        if not happens:
            return
        for number in self.waiting:
            self.told[number] = "gone"
        self.outside.asked.clear()
        self.end()
        self.serve()
        self.everything_answered_is_on_the_disk()

    # ── What always holds ─────────────────────────────────────────────────────────────────────────

    @invariant()
    def the_sentence_holds(self) -> None:
        if hasattr(self, "freshness"):
            assert self.freshness.violations == []

    @invariant()
    def everybody_is_told_one_thing(self) -> None:
        if hasattr(self, "told"):
            assert self.told.keys() | self.waiting == self.arrived
            assert not self.told.keys() & self.waiting

    @invariant()
    def nobody_who_was_answered_is_withheld(self) -> None:
        if hasattr(self, "ledger"):
            assert self.ledger.withheld == sorted(self.ledger.withheld)
            undecided = {seq for entries in self.batches.unsettled for seq in entries}
            assert undecided.isdisjoint(self.entries.values())

    def everything_answered_is_on_the_disk(self) -> None:
        found = {e.seq: e for e in self.ledger.entries(0, self.ledger.size)}
        withheld = {n for e in found.values() for first, last in e.withheld for n in range(first, last + 1)}
        for seq in self.entries.values():
            assert found[seq].outcome == "released"
            assert seq not in withheld


PipelineMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBatchesModel = PipelineMachine.TestCase
