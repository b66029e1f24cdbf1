"""From the gate to the answer: execute, record, quote, look again, release.

    ready requests ─▶ execute ─▶ ledger durable ─▶ store durable ┐
                          └────▶ TPM quote over the tree head    ┤─▶ confirm ─▶ release or withhold
                                                                 ┘
Execution comes after the verdict, never before: in a drifted state no key is touched. The quote runs
in the TPM's thread while the disk works. `confirm` reads again what can change quickly: the IMA log,
which must replay to the PCR 10 of this quote, and `process` and `relro` of every VM in the batch, by readings
that start after the quote. The ring goes on reading meanwhile.

Two batches may be under way, of different callers: while one has its second look, the next executes for those
who have nothing in it. So whoever asks one thing at a time does not wait for what a neighbour has in flight;
and callers who were answered together are executed together again, which is cheaper. Each is quoted, looked
at and released or withheld for itself; the TPM is asked for one at a time.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from guestlib.attest.imalog import PCR as IMA_PCR
from guestlib.errors import HostdError, RefusedDriftError, UnavailableError
from hostd.core.codes import Code
from hostd.core.findings import BOOT, FILES, GUESTS, IMA, VM_KINDS, Finding, Kind, Severity, Status
from hostd.ipc.serving import Receipt
from hostd.platform.tpm_errors import TpmError
from hostd.vault.attesting import Signing, pcr_findings
from hostd.vault.recording import Executed, job_of
from hostd.vault.store import StoreError
from hostd.vault.tpmlink import Quoted

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.callers import Caller
    from hostd.core.findings import Component
    from hostd.vault.attesting import Attesting
    from hostd.vault.counters import Counters
    from hostd.vault.done import Done
    from hostd.vault.gate import Gate
    from hostd.vault.heads import Head, Heads
    from hostd.vault.ledger import Ledger
    from hostd.vault.measuring import Measuring
    from hostd.vault.receipts import Receipts
    from hostd.vault.recording import Recorder
    from hostd.vault.store import Store
    from hostd.vault.tpmlink import PcrsRead
    from hostd.vault.waiting import Pass, Waiting

SECOND_LOOK: Final = frozenset({Kind.PROCESS, Kind.RELRO})
"""Kinds of each VM in the batch that are read again after the quote, besides the IMA log."""
CONFIRM_S: Final = 5.0
"""For the second look. Over it the batch is withheld."""
MAX_PENDING: Final = 16
"""Readings of the second look that may be pending (a file being mapped, a VM that ends) before what is
still pending is withheld: a VM that goes away does not hold up the others."""
UNDER_WAY: Final = 2
"""Batches between execution and release; one of them may wait for the TPM."""


@dataclass(slots=True, eq=False)
class _Batch:
    executed: list[Executed]
    callers: frozenset[Caller]
    passed: Pass
    confirm: frozenset[Component]
    began: int
    quoted: Quoted | PcrsRead | None = None
    quoted_at: int = 0
    first: int | None = None
    """Its `pass` entry; None before it is recorded."""
    digest: bytes = b""
    """The evidence digest that the quote is asked to sign,"""
    size: int = 0
    root: bytes = b""
    """and the tree's head."""
    head: Head | None = None
    """The same, signed."""
    deadline: float = 0.0
    tries: dict[Component, int] = field(default_factory=dict)
    """Number of the last reading of a component that was pending in the second look."""
    pending: int = 0


class Batches:
    """Drives requests through the gate."""

    def __init__(
        self,
        *,
        gate: Gate,
        measuring: Measuring,
        tpm: Attesting,
        ledger: Ledger,
        heads: Heads,
        recorder: Recorder,
        receipts: Receipts,
        store: Store,
        counters: Counters,
        evidence_digest: Callable[[Pass], bytes],
        found: Callable[[Component, tuple[Finding, ...]], None],
        shut: Callable[[str], None],
    ) -> None:
        self._gate = gate
        self._measuring = measuring
        self._tpm = tpm
        self._ledger = ledger
        self._heads = heads
        self._recorder = recorder
        self._receipts = receipts
        self._store = store
        self._counters = counters
        self._evidence_digest = evidence_digest
        self._found = found
        self._shut = shut
        self._under_way: list[_Batch] = []
        """In the order in which they were taken."""

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def start(self) -> None:
        """Takes the next batch if there is one, of callers who have nothing under way."""
        if len(self._under_way) >= UNDER_WAY or any(batch.quoted is None for batch in self._under_way):
            return
        now = time.monotonic_ns()
        taken = self._gate.take(now, frozenset().union(*(batch.callers for batch in self._under_way)))
        if taken is None:
            return
        requests, passed = taken
        confirm = frozenset(c for c, _ in passed.readings if c == IMA or c.kind in SECOND_LOOK)
        batch = _Batch([], frozenset(request.caller for request in requests), passed, confirm, now)
        self._under_way.append(batch)
        batch.digest = self._evidence_digest(passed)
        wall = time.time_ns() // 1_000_000
        try:
            self._store.refresh()
            for request in requests:
                batch.executed.append(self._execute(request, wall))
            batch.first = self._recorder.record(passed, batch.digest, batch.executed, wall)
        except HostdError as error:
            # The transaction is gone, and with it what the requests before this one did.
            self._not_recorded(batch, requests, error)
            return
        batch.size, batch.root = self._ledger.size, self._ledger.tree.root()
        signing = Signing(passed.number, batch.digest, batch.size, batch.root)
        self._tpm.attest(signing, lambda result: self._on_quote(batch, result))
        try:
            self._ledger.sync()
            self._store.commit()
            if any(one.done is not None and job_of(one.request).shreds for one in batch.executed):
                self._store.flush()
        except HostdError as error:
            self._not_recorded(batch, requests, error)
            return
        self._counters.observe("hostd_batch_requests", len(requests))

    def _not_recorded(self, batch: _Batch, requests: list[Waiting], error: HostdError) -> None:
        """What was done could not be made durable: nobody is answered, and the gate shuts."""
        with suppress(StoreError):
            self._store.rollback()
        self._shut(error.message)
        if batch in self._under_way:  # else its quote failed at once, and all were refused then
            self._under_way.remove(batch)
            for request in requests:
                job_of(request).refuse(UnavailableError("the answer could not be recorded"))
        if batch.first is None:
            # They were executed, for nobody: that is recorded too, if anything still can be.
            wall = time.time_ns() // 1_000_000
            with suppress(HostdError):
                batch.first = self._recorder.record(batch.passed, batch.digest, batch.executed, wall)
        self._say_withheld(batch.executed, batch.passed.number, "the answer could not be recorded")

    def _execute(self, request: Waiting, wall: int) -> Executed:
        job = job_of(request)
        done: Done | None = None
        failure: HostdError | None = None
        if job.mutates:
            self._store.savepoint()
        try:
            done = job.run(wall)
        except HostdError as error:
            # Its traceback is a cycle through this frame, with all that the work had in hand, keys too.
            failure = error.with_traceback(None)
        if job.mutates:
            if failure is None:
                self._store.release()
            else:
                self._store.undo()
        return Executed(request, done, failure)

    @property
    def unsettled(self) -> tuple[range, ...]:
        """Entries of what is under way, of whose answers nobody may know; in order."""
        return tuple(range(b.first, b.size) for b in self._under_way if b.first is not None)

    # ── After the quote ───────────────────────────────────────────────────────────────────────────

    def _on_quote(self, batch: _Batch, result: Quoted | PcrsRead | TpmError) -> None:
        if batch not in self._under_way:
            return  # abandoned meanwhile; its quote says nothing of the batch that came after
        if isinstance(result, TpmError):
            self._withhold(batch, UnavailableError("the TPM did not quote"), str(result))
            return
        if isinstance(result, Quoted):
            try:
                batch.head = self._heads.note(
                    size=batch.size,
                    root=batch.root,
                    passed=batch.passed.number,
                    evidence_digest=batch.digest,
                    quoted=result,
                )
            except HostdError as error:
                self._shut(error.message)
        batch.quoted = result
        batch.quoted_at = time.monotonic_ns()
        batch.deadline = time.monotonic() + CONFIRM_S
        if differing := self._tpm.differing(result.pcrs):
            self._found(BOOT, pcr_findings(differing))
        self.confirm()

    def confirm(self) -> None:
        """Goes on with the second looks; called after every verdict too."""
        for batch in tuple(self._under_way):
            # What comes of one may end another.
            if batch.quoted is not None and batch in self._under_way:
                self._look_again(batch)

    def _look_again(self, batch: _Batch) -> None:
        unseen = [c for c in batch.confirm if not self._looked_at(batch, c)]
        if unseen and time.monotonic() <= batch.deadline:
            # What is pending (a file just mapped) needs its content too before it can be good; or the
            # machine has gone, and `guests` says so.
            again = any(batch.tries.get(c) for c in unseen)
            for component in (*unseen, FILES, GUESTS) if again else unseen:
                if component not in self._measuring.busy and self._measuring.ready:
                    self._gate.ring.asked(component, time.monotonic_ns())
                    self._measuring.ask(component)
            return
        self._finish(batch)

    def _looked_at(self, batch: _Batch, component: Component) -> bool:
        """Whether the second look at a component has come to something."""
        if component in self._gate.ring.withheld or self._gone(batch, component):
            return True
        stamp = self._gate.stamps.get(component)
        if stamp is None or stamp.started < batch.quoted_at:
            return False
        if stamp.status is not Status.PENDING:
            return True
        tries = batch.tries.setdefault(component, 0)
        if tries < stamp.number:
            batch.tries[component] = stamp.number
            batch.pending += 1
        return batch.pending > MAX_PENDING

    def _gone(self, batch: _Batch, component: Component) -> bool:
        """Whether a machine has ended, by a reading of after the quote: only its own requests rest on it."""
        guests = self._gate.stamps.get(GUESTS)
        return (
            component.kind in VM_KINDS
            and self._gate.hypervisor(component.vm) is None
            and guests is not None
            and guests.started >= batch.quoted_at
            and guests.status is Status.VERIFIED
        )

    def _finish(self, batch: _Batch) -> None:
        self._under_way.remove(batch)
        assert batch.quoted is not None
        ima = self._gate.stamps.get(IMA)
        read = ima is not None and ima.status is Status.VERIFIED and ima.started >= batch.quoted_at
        if read and not self._replays(batch):
            self._found(IMA, (self._log_mismatch(batch),))
        released = {caller for caller in batch.callers if self._confirmed(batch, caller)}
        withheld: list[Executed] = []
        for executed in batch.executed:
            if executed.request.caller in released:
                self._release(executed, batch)
            else:
                withheld.append(executed)
        if withheld:
            self._say_withheld(withheld, batch.passed.number, "the second look did not confirm")
            drifted = RefusedDriftError("a measurement this answer rests on has drifted")
            gone = UnavailableError("the measurement could not be confirmed")
            for executed in withheld:
                latched = self._gate.latched_for(executed.request.caller)
                error = gone if latched is None else drifted
                job_of(executed.request).refuse(error)
        self._counters.observe("hostd_batch_seconds", (time.monotonic_ns() - batch.began) / 1e9)

    def _confirmed(self, batch: _Batch, caller: Caller) -> bool:
        """Whether the second look found good what a caller rests on, and nothing else stands against it."""
        stamps = self._gate.stamps
        return (
            self._gate.shut is None
            and self._gate.latched_for(caller) is None
            and self._gate.bound(caller)
            and all(
                (s := stamps.get(c)) is not None
                and s.started >= batch.quoted_at
                and self._gate.acceptable(c, s.status)
                for c in self._gate.needs(caller) & batch.confirm
            )
        )

    def _replays(self, batch: _Batch) -> bool:
        """Whether the log, read after the quote, leads to the PCR 10 in it."""
        assert batch.quoted is not None
        judge = self._measuring.appraiser
        position = None if judge is None else judge.ima.matches(batch.quoted.pcrs[IMA_PCR])
        # Position 0 is a PCR 10 that nothing was ever extended into: not the TPM of a kernel with a log.
        if judge is None or not position:
            return False
        # What the quote of another batch may still have to be found among is kept.
        if all(batch.quoted_at <= other.quoted_at for other in self._under_way if other.quoted_at):
            judge.ima.settle(position)
        return True

    def _log_mismatch(self, batch: _Batch) -> Finding:
        assert batch.quoted is not None
        return Finding(
            component=str(IMA),
            code=Code.IMA_LOG_MISMATCH.value,
            severity=Severity.CRITICAL,
            subject="IMA measurement log",
            expected=f"a log that replays to PCR {IMA_PCR} {batch.quoted.pcrs[IMA_PCR].hex()}",
            seen="another log",
        )

    def _release(self, executed: Executed, batch: _Batch) -> None:
        job = job_of(executed.request)
        if executed.done is not None:
            document = b""
            if job.full and batch.head is not None:
                # The answer is good without; the caller has the reference.
                with suppress(HostdError):
                    document = self._receipts.document(executed.seq, batch.head)
            job.answer(executed.done.result, Receipt(executed.seq, batch.passed.number, document))
            self._counters.count("hostd_requests_total", op=job.name, outcome="released")
        else:
            assert executed.error is not None
            executed.error.ledger = executed.seq
            job.refuse(executed.error)
            self._counters.count("hostd_requests_total", op=job.name, outcome=executed.error.code)

    def _withhold(self, batch: _Batch, error: HostdError, why: str) -> None:
        self._under_way.remove(batch)
        self._say_withheld(batch.executed, batch.passed.number, why)
        for executed in batch.executed:
            job_of(executed.request).refuse(error)

    def _say_withheld(self, executed: list[Executed], number: int, why: str) -> None:
        self._counters.count("hostd_withheld_total", by=len(executed))
        try:
            self._recorder.withheld(executed, number, why)
        except HostdError as error:
            self._shut(error.message)

    def abandon(self, why: str) -> None:
        """The measurer or the keys are gone: nothing of the batches under way leaves."""
        while self._under_way:
            batch = self._under_way[0]
            self._withhold(batch, UnavailableError("the measurement could not be confirmed"), why)
