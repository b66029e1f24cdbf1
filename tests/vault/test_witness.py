"""Health and evidence while the TPM does not answer: bounded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from guestlib.attest.evidence import Status
from guestlib.errors import HostdError, NotFoundError
from hostd.core import findings as core
from hostd.core.callers import Caller
from hostd.core.findings import KERNEL, Kind
from hostd.ipc import operations as ops
from hostd.platform.tpm import Quote
from hostd.platform.tpm_errors import TpmError
from hostd.platform.tpm_worker import Priority
from hostd.vault.evidence import claims_for
from hostd.vault.ledger import Ledger
from hostd.vault.observers import MAX_PER_CALLER
from hostd.vault.tpmlink import Quoted
from hostd.vault.witness import MAX_QUOTING, Witness
from tests.vault.support_gate import A, B, make_gate, read, read_all


class SimulatedTpm:
    """Keeps what it is asked to sign until the test answers."""

    def __init__(self) -> None:
        self.record = SimpleNamespace(ak_public=b"ak", ek_public=b"ek", ek_certificate=None)
        self.host_certificate = None
        self.pending: list[Any] = []

    def quote(self, _qualifying: bytes, told: Any, *, priority: Priority) -> None:
        assert priority is Priority.OTHER
        self.pending.append(told)


class SimulatedChannel:
    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.answers: dict[int, object] = {}
        self.refusals: dict[int, HostdError] = {}

    def answer(self, seq: int, result: object, _receipt: None) -> None:
        self.answers[seq] = result

    def refuse(self, seq: int, error: HostdError) -> None:
        self.refusals[seq] = error


class SimulatedReceipts:
    """Has one receipt, for A; and says what it was asked."""

    def redeem(self, caller: Caller, seq: int, now: int) -> ops.ReceiptResult:
        if (caller, seq) != (A, 7):
            raise NotFoundError("no such receipt")
        return ops.ReceiptResult(str(now).encode())

    def audit(self, caller: Caller, asked: ops.GetAuditLog, now: int) -> ops.AuditLogResult:
        return ops.AuditLogResult(f"{caller.vm} {asked.after} {now}".encode(), ())


class Bench:
    def __init__(self, ledger: Ledger) -> None:
        self.gate = make_gate()
        self.tpm = SimulatedTpm()
        custody = SimpleNamespace(
            channel=SimpleNamespace(ca=SimpleNamespace(certificate_der=b"ca")),
            reference=None,
            reference_digest=bytes(32),
        )
        self.witness = Witness(
            gate=self.gate,
            measuring=cast("Any", SimpleNamespace(appraiser=None, ima_log=bytearray(b"log"))),
            custody=cast("Any", custody),
            ledger=ledger,
            tpm=cast("Any", self.tpm),
            receipts=cast("Any", SimulatedReceipts()),
            wait_s=0.0,
            kick=lambda: None,
        )

    def ask(self, channel: SimulatedChannel, seq: int, operation: ops.UngatedOperation) -> None:
        self.witness.on_call(cast("Any", channel), seq, operation, 1)

    def observe(self) -> None:
        for observer in self.gate.observed(2):
            cast("Any", observer.item)()


def quoted() -> Quoted:
    return Quoted(Quote(b"attest", b"signature"), {0: bytes(32)})


@pytest.fixture
def bench(ledger: Ledger) -> Bench:
    return Bench(ledger)


def test_evidence_that_waits_for_the_tpm_is_bounded(bench: Bench) -> None:
    first = SimulatedChannel(A)
    for seq in range(MAX_QUOTING):
        bench.ask(first, seq, ops.GetEvidence(nonce=bytes(16)))
        bench.observe()
    assert len(bench.tpm.pending) == 1
    assert not first.refusals
    for seq in range(100, 120):
        bench.ask(first, seq, ops.GetEvidence(nonce=bytes(16)))
        bench.observe()
        assert first.refusals.pop(seq).code == "overloaded"
    # What is not evidence is answered all the same.
    bench.ask(first, 200, ops.Health())
    bench.observe()
    assert isinstance(first.answers.pop(200), ops.HealthResult)
    # Each answer of the TPM makes room for one.
    bench.tpm.pending.pop()(quoted())
    assert list(first.answers) == [0]
    bench.ask(first, 300, ops.GetEvidence(nonce=bytes(16)))
    bench.observe()
    assert len(bench.tpm.pending) == 1
    assert not first.refusals
    bench.tpm.pending.pop()(quoted())
    assert list(first.answers) == [0, 1]
    # Who waits behind a failure does not wait for as many.
    bench.tpm.pending.pop()(TpmError("no answer"))
    assert first.refusals.keys() == {*range(2, MAX_QUOTING), 300}
    assert {refusal.code for refusal in first.refusals.values()} == {"unavailable"}
    assert bench.tpm.pending == []
    bench.ask(first, 400, ops.GetEvidence(nonce=bytes(16)))
    bench.observe()
    bench.tpm.pending.pop()(quoted())
    assert 400 in first.answers


def test_nobody_waits_for_another_callers_evidence(bench: Bench) -> None:
    """A guest that asks for as much as it may, and a slow TPM: another's is the next but one."""
    first, second = SimulatedChannel(A), SimulatedChannel(B)
    for seq in range(2 * MAX_QUOTING):
        bench.ask(first, seq, ops.GetEvidence(nonce=bytes(16)))
        bench.observe()
    bench.ask(second, 1, ops.GetEvidence(nonce=bytes(16)))
    bench.observe()
    for _ in range(2):
        bench.tpm.pending.pop(0)(quoted())
    assert len(first.answers) == len(second.answers) == 1
    assert len(bench.tpm.pending) == 1


def test_evidence_that_waits_for_readings_is_bounded_for_each_caller(bench: Bench) -> None:
    first, second = SimulatedChannel(A), SimulatedChannel(B)
    for seq in range(MAX_PER_CALLER + 3):
        bench.ask(first, seq, ops.Health())
    bench.ask(second, 1, ops.Health())
    assert [e.code for e in first.refusals.values()] == ["overloaded"] * 3
    assert not second.refusals
    bench.observe()
    assert len(first.answers) == MAX_PER_CALLER
    assert list(second.answers) == [1]


def test_what_was_read_before_it_was_asked_for_is_pending() -> None:
    """Evidence carries the asker's nonce: it must not say `verified` of what was seen before it."""
    gate = make_gate(standing_ns=1000)
    read_all(gate, at=100)
    fresh = claims_for(A, gate, 100)
    assert set(fresh) == set(map(str, Kind))
    assert set(fresh.values()) == {Status.VERIFIED}
    stale = claims_for(A, gate, 101)
    assert {kind for kind, status in stale.items() if status is Status.VERIFIED} == {"domain"}
    assert set(claims_for(A, gate, 1101).values()) == {Status.PENDING}
    read(gate, KERNEL, at=200, status=core.Status.DRIFTED)
    assert claims_for(A, gate, 300)["kernel"] is Status.DRIFTED


def test_receipts_are_answered_at_once_for_whom_the_channel_names(bench: Bench) -> None:
    first, second = SimulatedChannel(A), SimulatedChannel(B)
    for channel in (first, second):
        bench.ask(channel, 1, ops.GetReceipt(ledger=7))
        bench.ask(channel, 2, ops.GetAuditLog(after=5))
    assert first.answers == {
        1: ops.ReceiptResult(b"1"),
        2: ops.AuditLogResult(f"{A.vm} 5 1".encode(), ()),
    }
    assert [e.code for e in second.refusals.values()] == ["not_found"]
    assert second.answers == {2: ops.AuditLogResult(f"{B.vm} 5 1".encode(), ())}
