"""The pipeline from the gate to the answer, step by step, with a scripted measurer and TPM.

Gate, ledger and store are the real ones. The simulators stand where the vault's own links to the
measurer and the TPM stand; those are tested with real ones elsewhere.
"""

from __future__ import annotations

import errno
import gc
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from guestlib.attest.binding import pass_qualifying
from guestlib.errors import DeniedError, HostdError, NotFoundError, RefusedDriftError, UnavailableError
from hostd.core.callers import Caller
from hostd.core.findings import BOOT, FILES, GUESTS, IMA, Component, Finding, Status, process_of, relro_of
from hostd.ipc import operations as ops
from hostd.ipc.serving import Receipt
from hostd.platform.tpm_errors import TpmError
from hostd.vault.attesting import Signing
from hostd.vault.batches import CONFIRM_S, MAX_PENDING, Batches
from hostd.vault.counters import Counters
from hostd.vault.done import Done
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry, Ledger, LedgerError
from hostd.vault.membership import Membership
from hostd.vault.recording import MAX_RUNS, Executed, Job, Recorder
from hostd.vault.store import Store, StoreError
from hostd.vault.tpmlink import Quoted
from hostd.vault.waiting import Pass, Waiting
from tests.vault.support_gate import HOST, OFFICER, VM_A, VM_B, A, B, hypervisor, make_gate, of_vm, verdict

PROCESS_A, PROCESS_B = process_of(VM_A), process_of(VM_B)
RELRO_A, RELRO_B = relro_of(VM_A), relro_of(VM_B)
PCRS = {0: b"\0" * 32, 10: b"\x10" * 32}


class SimulatedLog:
    """The appraiser's view of the IMA log: the PCR 10 values that it replays to."""

    def __init__(self) -> None:
        self.replays_to = {PCRS[10]}
        self.settled: list[int] = []

    def matches(self, pcr: bytes) -> int | None:
        return 77 if pcr in self.replays_to else None

    def settle(self, position: int) -> None:
        self.settled.append(position)


class SimulatedMeasuring:
    """The link to the measurer: notes what is asked."""

    class Judge:
        def __init__(self) -> None:
            self.ima = SimulatedLog()

    def __init__(self) -> None:
        self.appraiser: SimulatedMeasuring.Judge | None = self.Judge()
        self.ready = True
        self.asked: list[Component] = []

    @property
    def busy(self) -> frozenset[Component]:
        return frozenset(self.asked)

    def ask(self, component: Component) -> None:
        assert component not in self.asked
        self.asked.append(component)


class SimulatedTpm:
    """The link to the TPM: keeps what it is asked to sign until the test answers."""

    def __init__(self) -> None:
        self.pending: list[tuple[bytes, Callable[[Any], None]]] = []
        self.sealed = {0: PCRS[0]}
        self.fails_at_once: TpmError | None = None

    def attest(self, signing: Signing, told: Callable[[Any], None]) -> None:
        if self.fails_at_once is not None:
            told(self.fails_at_once)
        else:
            self.pending.append((signing.qualifying, told))

    def differing(self, pcrs: dict[int, bytes]) -> list[tuple[int, bytes, bytes]]:
        return [(i, v, pcrs[i]) for i, v in self.sealed.items() if pcrs[i] != v]


class SimulatedHeads:
    def __init__(self) -> None:
        self.noted: list[int] = []

    def note(self, *, size: int, **_: object) -> str:
        self.noted.append(size)
        return f"head of {size}"


class SimulatedReceipts:
    """Names the entry and the head that a receipt was asked for."""

    def __init__(self) -> None:
        self.fails = False

    def document(self, seq: int, head: str) -> bytes:
        if self.fails:
            raise LedgerError("the disk")
        return f"{seq} under {head}".encode()


class Bench:
    """A pipeline, and everything that happened in it, in order."""

    def __init__(self, ledger: Ledger, store: Store, keyring: Keyring) -> None:
        self.gate = make_gate()
        membership = Membership(store, keyring)
        for caller, tenant in ((A, "red"), (B, "blue")):
            membership.bind(caller.principal, tenant, 0)
        store.commit()
        self.keyring, self.documents = keyring, SimulatedReceipts()
        self.measuring, self.tpm, self.heads = SimulatedMeasuring(), SimulatedTpm(), SimulatedHeads()
        self.ledger, self.store, self.counters = ledger, store, Counters()
        self.events: list[tuple[str, str]] = []
        self.receipts: dict[str, Receipt] = {}
        self.errors: dict[str, HostdError] = {}
        self.found: dict[Component, tuple[Finding, ...]] = {}
        self.shut: list[str] = []
        self.batches = Batches(
            gate=self.gate,
            measuring=cast("Any", self.measuring),
            tpm=cast("Any", self.tpm),
            ledger=ledger,
            heads=cast("Any", self.heads),
            recorder=Recorder(ledger, keyring, membership),
            receipts=cast("Any", self.documents),
            store=store,
            counters=self.counters,
            evidence_digest=self.evidence_digest,
            found=self.on_found,
            shut=self.on_shut,
        )

    @staticmethod
    def evidence_digest(passed: Pass) -> bytes:
        return passed.number.to_bytes(32, "big")

    def on_found(self, component: Component, findings: tuple[Finding, ...]) -> None:
        self.found[component] = findings
        self.gate.latch(component, findings)

    def on_shut(self, why: str) -> None:
        self.shut.append(why)
        self.gate.shut = why

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def arrive(
        self,
        name: str,
        caller: Caller = A,
        *,
        fails: HostdError | None = None,
        writes: bool = False,
        shreds: bool = False,
        operation: ops.GatedOperation | None = None,
        full: bool = False,
    ) -> None:
        def run(_now: int) -> Done:
            self.events.append(("execute", name))
            if writes:
                self.store.set_meta(name, b"written")
            if fails is not None:
                raise fails
            tenant = "blue" if caller is B else "red"
            return Done(ops.RandomResult(b"random"), tenant, "key-1", 3, "detail")

        def answer(_result: object, receipt: Receipt) -> None:
            self.receipts[name] = receipt
            self.settle("answer", name)

        def refuse(error: HostdError) -> None:
            self.errors[name] = error
            self.settle("refuse", name)

        job = Job(name, writes, shreds, run, answer, refuse, operation, full)
        now = time.monotonic_ns()
        self.gate.arrive(Waiting(caller, now, now + 10**12, job))

    def settle(self, how: str, name: str) -> None:
        assert (how, name) not in self.events
        assert not {("answer", name), ("refuse", name)} & set(self.events), f"{name} was answered twice"
        self.events.append((how, name))

    def outcomes(self) -> dict[str, str]:
        return {name: how for how, name in self.events if how in ("answer", "refuse")}

    # ── The outside ───────────────────────────────────────────────────────────────────────────────

    def read(self, *components: Component, status: Status = Status.VERIFIED, started: int = 0) -> None:
        for component in components:
            if component in self.measuring.asked:
                self.measuring.asked.remove(component)
            begun = started or time.monotonic_ns()
            self.gate.judged(verdict(component, status), started=begun, ended=time.monotonic_ns())

    def read_all(self) -> None:
        self.read(*HOST, *of_vm(VM_A, VM_B))

    def quoted(self, pcrs: dict[int, bytes] | None = None, *, error: TpmError | None = None) -> None:
        _, told = self.tpm.pending.pop(0)
        told(error if error is not None else Quoted(cast("Any", object()), pcrs or PCRS))

    def begin(self) -> None:
        """From waiting to executed and asked to be quoted."""
        self.read_all()
        self.batches.start()
        assert self.batches.busy

    def under_way(self, second: dict[int, bytes] | None = None) -> None:
        """A batch of `a`, and one of `b` with these PCRs in its quote: both wait for their second look."""
        self.arrive("a")
        self.begin()
        self.quoted()
        self.measuring.asked.clear()
        self.arrive("b", B)
        self.read(*HOST, *of_vm(VM_B))
        self.batches.start()
        self.quoted(second)
        assert self.outcomes() == {}

    def second_look(self, **odd: Status) -> None:
        """All that was asked is read again, good but for what is named by kind."""
        for component in list(self.measuring.asked):
            self.read(component, status=odd.get(str(component.kind), Status.VERIFIED))
        self.batches.confirm()

    def entries(self) -> list[Entry]:
        return list(self.ledger.entries(0, 10_000))


@pytest.fixture
def bench(ledger: Ledger, store: Store, keyring: Keyring) -> Bench:
    return Bench(ledger, store, keyring)


def fail_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("write", "pwrite"):
        monkeypatch.setattr(os, call, full)


# ── In order ──────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_executed_before_the_readings_are_there(bench: Bench) -> None:
    bench.read_all()
    bench.arrive("a")
    bench.batches.start()
    assert bench.events == []
    assert not bench.batches.busy
    bench.read(*HOST)
    bench.batches.start()
    assert bench.events == []
    bench.read(*of_vm(VM_A))
    bench.batches.start()
    assert bench.events == [("execute", "a")]


def test_the_whole_way(bench: Bench) -> None:
    bench.arrive("a")
    bench.arrive("b", B)
    bench.begin()
    # Executed and durable in the ledger, and nothing said.
    assert bench.outcomes() == {}
    assert [(e.event, e.op, e.outcome, e.principal, e.seq) for e in bench.entries()] == [
        ("pass", "", "done", "", 0),
        ("operation", "a", "released", A.principal, 1),
        ("operation", "b", "released", B.principal, 2),
    ]
    entry = bench.entries()[1]
    assert (entry.event, entry.tenant, entry.key, entry.version, entry.detail, entry.passed) == (
        "operation",
        "red",
        "key-1",
        3,
        "detail",
        1,
    )
    # The quote signs the pass, its evidence and the head that holds these entries.
    ((qualifying, _),) = bench.tpm.pending
    assert qualifying == pass_qualifying(1, (1).to_bytes(32, "big"), 3, bench.ledger.tree.root(3))
    assert bench.measuring.asked == []
    bench.quoted()
    assert bench.outcomes() == {}
    assert bench.heads.noted == [3]
    assert set(bench.measuring.asked) == {IMA, PROCESS_A, PROCESS_B, RELRO_A, RELRO_B}
    bench.second_look()
    assert bench.outcomes() == {"a": "answer", "b": "answer"}
    assert bench.receipts == {"a": Receipt(1, 1), "b": Receipt(2, 1)}
    assert not bench.batches.busy
    assert bench.ledger.size == 3


def test_the_second_look_starts_after_the_quote(bench: Bench) -> None:
    """A reading that began before the quote was there says nothing of the time after."""
    bench.arrive("a")
    bench.begin()
    early = time.monotonic_ns()
    bench.quoted()
    bench.read(IMA, PROCESS_A, RELRO_A, started=early)
    bench.batches.confirm()
    assert bench.outcomes() == {}
    assert set(bench.measuring.asked) == {IMA, PROCESS_A, RELRO_A}
    bench.second_look()
    assert bench.outcomes() == {"a": "answer"}


def test_each_part_of_the_second_look_is_waited_for(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted()
    for component in (IMA, PROCESS_A):
        bench.read(component)
        bench.batches.confirm()
        assert bench.outcomes() == {}
    bench.read(RELRO_A)
    bench.batches.confirm()
    assert bench.outcomes() == {"a": "answer"}


def test_one_batch_at_a_time_of_each_caller(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.arrive("b")
    bench.read_all()
    bench.batches.start()
    assert ("execute", "b") not in bench.events
    bench.quoted()
    bench.batches.start()
    bench.second_look()
    bench.batches.start()
    assert bench.events == [("execute", "a"), ("answer", "a"), ("execute", "b")]


def test_who_has_nothing_under_way_does_not_wait_for_who_has(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    ((first, _),) = bench.tpm.pending
    bench.arrive("a2")
    bench.arrive("b", B)
    bench.read_all()
    bench.batches.start()
    assert bench.events == [("execute", "a")], "the TPM is asked one thing at a time"
    bench.quoted()
    bench.batches.start()
    assert bench.events == [("execute", "a"), ("execute", "b")]
    assert bench.batches.unsettled == (range(2), range(2, 4))
    # Each has a quote over a head of its own, and a second look at what is its own.
    ((second, _),) = bench.tpm.pending
    assert first == pass_qualifying(1, (1).to_bytes(32, "big"), 2, bench.ledger.tree.root(2))
    assert second == pass_qualifying(2, (2).to_bytes(32, "big"), 4, bench.ledger.tree.root(4))
    bench.quoted()
    bench.read(IMA, PROCESS_B, RELRO_B)
    bench.batches.confirm()
    assert bench.outcomes() == {"b": "answer"}
    assert bench.batches.unsettled == (range(2),), "whoever was answered may have his receipt"
    bench.read(PROCESS_A, RELRO_A)
    bench.batches.confirm()
    assert bench.outcomes() == {"a": "answer", "b": "answer"}
    assert bench.receipts == {"a": Receipt(1, 1), "b": Receipt(3, 2)}
    assert bench.heads.noted == [2, 4]


def test_no_third_batch_while_two_are_under_way(bench: Bench) -> None:
    bench.under_way()
    bench.arrive("officer", OFFICER)
    bench.read(*HOST)
    bench.batches.start()
    assert ("execute", "officer") not in bench.events
    bench.second_look()
    assert bench.outcomes() == {"a": "answer", "b": "answer"}
    bench.batches.start()
    assert bench.events[-1] == ("execute", "officer")


def test_a_quote_that_is_still_to_be_found_in_the_log_is_kept_there(bench: Bench) -> None:
    """The log has grown between two quotes; the batch of the later one is done first."""
    assert bench.measuring.appraiser is not None
    log = bench.measuring.appraiser.ima
    bench.under_way()
    bench.read(IMA, PROCESS_B, RELRO_B)
    bench.batches.confirm()
    assert bench.outcomes() == {"b": "answer"}
    assert log.settled == []
    bench.read(PROCESS_A, RELRO_A)
    bench.batches.confirm()
    assert bench.outcomes() == {"a": "answer", "b": "answer"}
    assert log.settled == [77]


def test_what_ends_one_batch_ends_the_other_only_if_it_rests_on_it(bench: Bench) -> None:
    bench.under_way()
    bench.read(PROCESS_B, status=Status.DRIFTED)
    bench.second_look()
    assert bench.outcomes() == {"a": "answer", "b": "refuse"}


def test_what_comes_of_one_batch_may_end_the_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reaction to drift sends the measurer something, and it turns out to be lost."""
    assert bench.measuring.appraiser is not None
    bench.under_way()
    bench.measuring.appraiser.ima.replays_to.clear()

    def found(component: Component, findings: tuple[Finding, ...]) -> None:
        bench.on_found(component, findings)
        bench.batches.abandon("the measurer was lost")

    monkeypatch.setattr(bench.batches, "_found", found)
    bench.second_look()
    assert bench.outcomes() == {"a": "refuse", "b": "refuse"}
    assert list(bench.found) == [IMA]
    assert not bench.batches.busy
    assert bench.ledger.withheld == [(1, 1), (3, 3)]


def test_of_two_batches_the_later_may_be_withheld_first(bench: Bench) -> None:
    bench.under_way()
    bench.read(PROCESS_B, status=Status.DRIFTED)
    bench.read(IMA)
    bench.batches.confirm()
    assert bench.outcomes() == {"b": "refuse"}
    bench.read(PROCESS_A, status=Status.DRIFTED)
    bench.batches.confirm()
    assert bench.outcomes() == {"a": "refuse", "b": "refuse"}
    assert [e.withheld for e in bench.entries() if e.event == "withheld"] == [((3, 3),), ((1, 1),)]
    assert bench.ledger.withheld == [(1, 1), (3, 3)]


def test_a_pcr_in_one_batchs_quote_ends_both(bench: Bench) -> None:
    bench.under_way({**PCRS, 0: b"\xff" * 32})
    bench.second_look()
    assert bench.outcomes() == {"a": "refuse", "b": "refuse"}


def test_the_relro_of_a_vm_whose_process_has_drifted_is_not_read(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted()
    bench.read(IMA)
    bench.read(PROCESS_A, status=Status.DRIFTED)
    bench.measuring.asked.clear()
    bench.batches.confirm()
    assert RELRO_A not in bench.measuring.asked
    assert_withheld(bench, "a", error=RefusedDriftError)


def test_all_that_is_under_way_is_abandoned(bench: Bench) -> None:
    bench.under_way()
    bench.batches.abandon("the measurer was lost")
    assert bench.outcomes() == {"a": "refuse", "b": "refuse"}
    assert not bench.batches.busy


def test_a_typed_refusal_goes_the_same_way(bench: Bench) -> None:
    bench.arrive("denied", fails=DeniedError("no"))
    bench.arrive("host", fails=UnavailableError("no"))
    bench.begin()
    assert [(e.outcome, e.code, e.tenant) for e in bench.entries()[1:]] == [
        ("denied", "denied", ""),
        ("failed", "unavailable", ""),
    ]
    assert bench.outcomes() == {}
    bench.quoted()
    bench.second_look()
    assert bench.outcomes() == {"denied": "refuse", "host": "refuse"}
    assert (bench.errors["denied"].code, bench.errors["denied"].ledger) == ("denied", 1)
    assert (bench.errors["host"].code, bench.errors["host"].ledger) == ("unavailable", 2)


def test_confirm_and_start_do_nothing_when_there_is_nothing(bench: Bench) -> None:
    bench.batches.confirm()
    bench.batches.start()
    bench.batches.abandon("nothing")
    assert bench.ledger.size == 0


# ── Mutating operations ───────────────────────────────────────────────────────────────────────────


def test_a_failed_operation_is_undone_alone(bench: Bench) -> None:
    bench.arrive("first", writes=True)
    bench.arrive("second", writes=True, fails=NotFoundError("no"))
    bench.arrive("third", writes=True)
    bench.begin()
    assert not bench.store.dirty, "durable before anything is said"
    assert bench.store.meta("first") == bench.store.meta("third") == b"written"
    assert bench.store.meta("second") is None


def test_a_shred_empties_the_log_before_the_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[dict[str, str]] = []
    monkeypatch.setattr(bench.store, "flush", lambda: flushed.append(bench.outcomes()))
    bench.arrive("plain", writes=True)
    bench.arrive("failed", writes=True, shreds=True, fails=NotFoundError("no"))
    bench.begin()
    assert flushed == []
    bench.quoted()
    bench.second_look()
    bench.arrive("shred", writes=True, shreds=True)
    bench.begin()
    assert len(flushed) == 1
    assert "shred" not in flushed[0]


# ── Withheld ──────────────────────────────────────────────────────────────────────────────────────


def assert_withheld(bench: Bench, *names: str, error: type[HostdError]) -> Entry:
    assert not bench.batches.busy
    for name in names:
        assert bench.outcomes()[name] == "refuse"
        assert type(bench.errors[name]) is error
        assert "red" not in str(bench.errors[name])
    entry = bench.entries()[-1]
    assert (entry.event, entry.outcome) == ("withheld", "withheld")
    assert f"{len(names)} answers" in entry.detail
    seqs = [e.seq for e in bench.entries() if e.op in names]
    for seq in seqs:
        assert str(seq) in entry.detail
    return entry


@pytest.mark.parametrize(
    ("odd", "error"),
    [
        ({"process": Status.DRIFTED}, RefusedDriftError),
        ({"relro": Status.DRIFTED}, RefusedDriftError),
        ({"ima": Status.DRIFTED}, RefusedDriftError),
        ({"process": Status.ABSENT}, UnavailableError),
        ({"relro": Status.ABSENT}, UnavailableError),
        ({"ima": Status.ABSENT}, UnavailableError),
    ],
    ids=str,
)
def test_a_second_look_that_is_not_good(
    bench: Bench, odd: dict[str, Status], error: type[HostdError]
) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted()
    bench.second_look(**odd)
    assert_withheld(bench, "a", error=error)


def test_one_vms_drift_withholds_that_vms_answers(bench: Bench) -> None:
    bench.arrive("a")
    bench.arrive("b", B)
    bench.arrive("officer", OFFICER)
    bench.begin()
    bench.quoted()
    bench.read(PROCESS_A, status=Status.DRIFTED)
    bench.second_look()
    assert bench.outcomes() == {"a": "refuse", "b": "answer", "officer": "answer"}
    assert_withheld(bench, "a", error=RefusedDriftError)


def test_drift_of_anything_between_execution_and_release(bench: Bench) -> None:
    """Also of what the second look does not read again: the ring goes on meanwhile."""
    bench.arrive("a")
    bench.begin()
    bench.read(FILES, status=Status.DRIFTED)
    bench.quoted()
    bench.second_look()
    assert_withheld(bench, "a", error=RefusedDriftError)


def test_the_gate_is_shut_meanwhile(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted()
    bench.gate.shut = "keys locked"
    bench.second_look()
    assert_withheld(bench, "a", error=UnavailableError)


def test_the_tpm_does_not_quote(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted(error=TpmError("lost"))
    entry = assert_withheld(bench, "a", error=UnavailableError)
    assert "lost" in entry.detail
    assert bench.measuring.asked == []


def test_the_tpm_refuses_at_once(bench: Bench) -> None:
    bench.tpm.fails_at_once = TpmError("queue full")
    bench.arrive("a", writes=True)
    bench.read_all()
    bench.batches.start()
    assert_withheld(bench, "a", error=UnavailableError)
    assert not bench.store.dirty


def test_a_pcr_is_not_what_the_root_key_is_sealed_to(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted({0: b"\xff" * 32, 10: PCRS[10]})
    (finding,) = bench.found[BOOT]
    assert (finding.code, finding.subject, finding.expected, finding.seen) == (
        "pcr-changed",
        "PCR 0",
        "00" * 32,
        "ff" * 32,
    )
    bench.second_look()
    assert_withheld(bench, "a", error=RefusedDriftError)


def test_the_log_does_not_replay_to_the_quoted_pcr_10(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted({0: PCRS[0], 10: b"\xee" * 32})
    bench.second_look()
    (finding,) = bench.found[IMA]
    assert finding.code == "ima-log-mismatch"
    assert "ee" * 32 in finding.expected
    assert_withheld(bench, "a", error=RefusedDriftError)


def test_a_log_that_replays_is_settled_so_far(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted()
    bench.second_look()
    assert bench.measuring.appraiser is not None
    assert bench.measuring.appraiser.ima.settled == [77]


def test_a_host_without_ima_where_it_is_not_required(bench: Bench) -> None:
    bench.gate._require = frozenset()
    bench.arrive("a")
    bench.begin()
    bench.quoted({0: PCRS[0], 10: b"\xee" * 32})
    bench.second_look(ima=Status.ABSENT)
    assert bench.outcomes() == {"a": "answer"}
    assert bench.found == {}


def test_the_measurer_is_lost(bench: Bench) -> None:
    for quoted in (False, True):
        name = f"a{quoted}"
        bench.arrive(name)
        bench.begin()
        if quoted:
            bench.quoted()
        bench.gate.lose_measurer()
        bench.batches.abandon("the measurer was lost")
        entry = assert_withheld(bench, name, error=UnavailableError)
        assert "measurer was lost" in entry.detail
        bench.tpm.pending.clear()
        bench.measuring.asked.clear()
        bench.gate.guests(hypervisor(vm) for vm in (VM_A, VM_B))


def test_the_quote_of_an_abandoned_batch_is_not_the_next_ones(bench: Bench) -> None:
    """It was made before the next batch's work was done, and signs another head."""
    bench.arrive("a")
    bench.begin()
    bench.batches.abandon("the measurer was lost")
    bench.arrive("b")
    bench.begin()
    bench.quoted()  # the first batch's, late
    bench.read(IMA, PROCESS_A, RELRO_A)
    bench.batches.confirm()
    assert bench.heads.noted == []
    assert bench.outcomes() == {"a": "refuse"}
    bench.quoted()
    bench.second_look()
    assert bench.outcomes() == {"a": "refuse", "b": "answer"}


def test_a_late_failure_of_an_abandoned_quote_harms_nobody(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.batches.abandon("the measurer was lost")
    bench.arrive("b")
    bench.begin()
    bench.quoted(error=TpmError("late"))
    bench.quoted()
    bench.second_look()
    assert bench.outcomes() == {"a": "refuse", "b": "answer"}


def overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + CONFIRM_S + 1)


def test_a_confirmation_that_is_overdue(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.arrive("a")
    bench.arrive("b", B)
    bench.begin()
    bench.quoted()
    bench.read(IMA, PROCESS_B, RELRO_B, RELRO_A)
    bench.batches.confirm()
    assert bench.outcomes() == {}
    overdue(monkeypatch)
    bench.batches.confirm()
    assert bench.outcomes() == {"a": "refuse", "b": "answer"}
    assert_withheld(bench, "a", error=UnavailableError)


def test_a_slow_measurer_is_not_a_forged_log(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log was not read since the quote; that it does not reach the quoted PCR proves nothing."""
    bench.arrive("a")
    bench.begin()
    bench.quoted({0: PCRS[0], 10: b"\xee" * 32})
    overdue(monkeypatch)
    bench.batches.confirm()
    assert bench.found == {}
    assert_withheld(bench, "a", error=UnavailableError)


def test_a_measurer_that_is_not_ready_is_not_asked(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.measuring.ready = False
    bench.quoted()
    assert bench.measuring.asked == []
    assert bench.outcomes() == {}


def test_pending_is_looked_at_again_and_not_for_ever(bench: Bench) -> None:
    bench.arrive("a")
    bench.arrive("b", B)
    bench.begin()
    bench.quoted()
    bench.read(IMA, PROCESS_B, RELRO_B, RELRO_A)
    bench.batches.confirm()
    for _ in range(MAX_PENDING):
        assert bench.outcomes() == {}
        assert PROCESS_A in bench.measuring.asked
        bench.read(PROCESS_A, status=Status.PENDING)
        bench.batches.confirm()
        bench.batches.confirm()
    assert bench.outcomes() == {}
    assert FILES in bench.measuring.asked
    bench.read(PROCESS_A, status=Status.PENDING)
    bench.batches.confirm()
    assert bench.outcomes() == {"a": "refuse", "b": "answer"}
    assert_withheld(bench, "a", error=UnavailableError)


def test_pending_that_becomes_good_is_released(bench: Bench) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted()
    bench.second_look(process=Status.PENDING)
    assert bench.outcomes() == {}
    bench.second_look()
    assert bench.outcomes() == {"a": "answer"}


def test_a_vm_that_ended_holds_up_nobody_and_gets_nothing(bench: Bench) -> None:
    bench.arrive("a")
    bench.arrive("b", B)
    bench.begin()
    bench.quoted()
    bench.read(IMA, PROCESS_B, RELRO_B)
    bench.gate.guests([hypervisor(VM_B)])
    # That it was gone before the quote, or that it is not seen by a reading that is good, is not enough.
    for started, status in ((1, Status.VERIFIED), (0, Status.PENDING)):
        bench.read(GUESTS, started=started, status=status)
        bench.batches.confirm()
        assert bench.outcomes() == {}
    bench.read(GUESTS)
    bench.batches.confirm()
    assert bench.outcomes() == {"a": "refuse", "b": "answer"}


# ── A ledger or store that cannot be written ──────────────────────────────────────────────────────


def test_a_ledger_that_cannot_be_written_answers_nothing_and_shuts_the_gate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.arrive("a", writes=True)
    bench.arrive("b", B)
    bench.read_all()
    fail_disk(monkeypatch)
    bench.batches.start()
    assert bench.outcomes() == {"a": "refuse", "b": "refuse"}
    assert {type(e) for e in bench.errors.values()} == {UnavailableError}
    assert all(e.ledger is None for e in bench.errors.values())
    assert bench.shut
    assert not bench.batches.busy
    monkeypatch.undo()
    assert bench.store.meta("a") is None
    assert not bench.store.dirty
    assert bench.entries() == []
    # The quote that was asked for comes late, and nothing follows from it.
    bench.quoted()
    assert bench.measuring.asked == []
    with pytest.raises(UnavailableError):
        bench.arrive("c")
    assert len(bench.outcomes()) == 2


@pytest.mark.parametrize("step", ["commit", "flush"])
def test_a_store_that_cannot_be_written_answers_nothing_and_shuts_the_gate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails() -> None:
        raise StoreError("disk full")

    monkeypatch.setattr(bench.store, step, fails)
    bench.arrive("a", writes=True, shreds=True)
    bench.read_all()
    bench.batches.start()
    assert bench.outcomes() == {"a": "refuse"}
    assert bench.shut == ["disk full"]
    assert not bench.store.dirty
    bench.quoted()
    assert bench.outcomes() == {"a": "refuse"}


def test_a_transaction_that_is_gone_takes_the_whole_batch_with_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier request of the batch wrote went with it, so its answer must not leave."""

    def fails() -> None:
        raise StoreError("disk full")

    bench.arrive("a", writes=True)
    bench.arrive("b", writes=True, fails=DeniedError("no"))
    bench.arrive("c", writes=True)
    bench.read_all()
    monkeypatch.setattr(bench.store, "undo", fails)
    bench.batches.start()
    assert bench.outcomes() == {"a": "refuse", "b": "refuse", "c": "refuse"}
    assert {type(e) for e in bench.errors.values()} == {UnavailableError}
    assert bench.shut == ["disk full"]
    assert bench.store.meta("a") is None
    assert not bench.batches.busy
    assert bench.entries()[-1].outcome == "withheld"
    assert bench.tpm.pending == []


def test_a_quote_that_fails_at_once_and_a_disk_that_is_full_refuse_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.tpm.fails_at_once = TpmError("busy")
    bench.arrive("a")
    bench.read_all()
    fail_disk(monkeypatch)
    bench.batches.start()
    assert bench.outcomes() == {"a": "refuse"}
    assert bench.shut


def test_every_withheld_entry_is_named(bench: Bench) -> None:
    for number in range(90):
        bench.arrive(f"a{number}")
    bench.begin()
    bench.quoted(error=TpmError("gone"))
    assert "90 answers, entries 1-90" in bench.entries()[-1].detail


def test_a_store_that_fails_after_the_ledger_is_said_to_withhold(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise StoreError("disk full")

    monkeypatch.setattr(bench.store, "commit", fails)
    bench.arrive("a", writes=True)
    bench.read_all()
    bench.batches.start()
    assert [e.outcome for e in bench.entries()] == ["done", "released", "withheld"]
    assert "entries 1" in bench.entries()[-1].detail


def test_a_withholding_that_cannot_be_recorded_shuts_the_gate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.arrive("a")
    bench.begin()
    bench.quoted()
    fail_disk(monkeypatch)
    bench.second_look(process=Status.DRIFTED)
    assert bench.outcomes() == {"a": "refuse"}
    assert bench.shut


def test_what_a_refused_request_had_in_hand_goes_with_it(bench: Bench) -> None:
    """Not when the garbage collector comes, which is seldom: keys must leave memory."""

    class Secret:
        pass

    secrets: list[weakref.ref[Secret]] = []

    def run(_now: int) -> Done:
        secret = Secret()
        secrets.append(weakref.ref(secret))
        raise DeniedError("no")

    told: list[str] = []
    now = time.monotonic_ns()
    job = Job("a", False, False, run, cast("Any", None), lambda error: told.append(error.code))
    gc.disable()
    try:
        bench.gate.arrive(Waiting(A, now, now + 10**12, job))
        bench.begin()
        bench.quoted()
        bench.second_look()
        assert told == [DeniedError.code]
        assert [secret() for secret in secrets] == [None]
    finally:
        gc.enable()


def test_a_defect_is_not_survived(bench: Bench) -> None:
    """Only typed refusals are answers; anything else ends the process."""
    bench.arrive("a", fails=cast("Any", ZeroDivisionError("defect")))
    bench.read_all()
    with pytest.raises(ZeroDivisionError):
        bench.batches.start()
    assert bench.outcomes() == {}
    assert bench.entries() == []


# ── Receipts ──────────────────────────────────────────────────────────────────────────────────────


def test_a_full_receipt_is_made_under_the_batchs_own_head_and_only_if_wanted(bench: Bench) -> None:
    bench.arrive("a")
    bench.arrive("b", full=True)
    bench.begin()
    bench.quoted()
    bench.second_look()
    assert bench.receipts == {"a": Receipt(1, 1), "b": Receipt(2, 1, b"2 under head of 3")}


def test_an_answer_leaves_without_a_receipt_that_cannot_be_made(bench: Bench) -> None:
    bench.documents.fails = True
    bench.arrive("a", full=True)
    bench.begin()
    bench.quoted()
    bench.second_look()
    assert bench.receipts == {"a": Receipt(1, 1)}


def test_a_batch_under_way_is_unsettled_until_it_is_answered(bench: Bench) -> None:
    assert bench.batches.unsettled == ()
    bench.arrive("a")
    bench.begin()
    assert bench.batches.unsettled == (range(2),)
    bench.quoted()
    assert bench.batches.unsettled == (range(2),)
    bench.second_look()
    assert bench.batches.unsettled == ()
    bench.arrive("b")
    bench.begin()
    assert bench.batches.unsettled == (range(2, 4),)
    bench.quoted(error=TpmError("gone"))
    assert bench.batches.unsettled == ()


def test_what_was_withheld_is_named_by_number(bench: Bench) -> None:
    bench.arrive("a")
    bench.arrive("b", B)
    bench.arrive("c")
    bench.begin()
    bench.quoted()
    for component in list(bench.measuring.asked):
        bad = component == PROCESS_A
        bench.read(component, status=Status.DRIFTED if bad else Status.VERIFIED)
    bench.batches.confirm()
    named = {e.seq for e in bench.entries() if e.op in ("a", "c")}
    assert bench.outcomes() == {"a": "refuse", "b": "answer", "c": "refuse"}
    (entry,) = (e for e in bench.entries() if e.event == "withheld")
    assert {n for first, last in entry.withheld for n in range(first, last + 1)} == named
    assert bench.ledger.withheld == [tuple(run) for run in entry.withheld]


def test_what_was_executed_before_the_store_failed_is_recorded_and_withheld(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key was used, for nobody: the pass counts what there is."""

    def fails() -> None:
        raise StoreError("disk full")

    bench.arrive("a")
    bench.arrive("b", writes=True)
    monkeypatch.setattr(bench.store, "savepoint", fails)
    bench.read_all()
    bench.batches.start()
    assert bench.outcomes() == {"a": "refuse", "b": "refuse"}
    assert [(e.event, e.op, e.requests, e.withheld) for e in bench.entries()] == [
        ("pass", "", 1, ()),
        ("operation", "a", 0, ()),
        ("withheld", "", 0, ((1, 1),)),
    ]


def test_more_runs_than_one_entry_names_are_named_by_several(bench: Bench) -> None:
    passed = Pass(1, 1, 2, ())
    one = Waiting(A, 0, 1, Job("a", False, False, cast("Any", None), cast("Any", None), cast("Any", None)))
    executed = [Executed(one, None, None, seq) for seq in range(1, 4 * MAX_RUNS, 2)]
    Recorder(bench.ledger, bench.keyring, cast("Any", None)).withheld(executed, passed.number, "why")
    entries = bench.entries()
    assert [len(e.withheld) for e in entries] == [MAX_RUNS, MAX_RUNS]
    assert [n for e in entries for n, _ in e.withheld] == [e.seq for e in executed]
