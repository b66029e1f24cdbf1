"""Refusals: in the ledger before they are sent, and never more of them than the disk bears."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestlib.errors import DeniedError, HostdError, OverloadedError, RefusedDriftError, UnavailableError
from hostd.core.callers import Caller
from hostd.vault import refusals as module
from hostd.vault.counters import Counters
from hostd.vault.ledger import Entry, Ledger, LedgerError
from hostd.vault.recording import Job
from hostd.vault.refusals import Refusals
from hostd.vault.waiting import Waiting

P = 'VM::"a"'


class Desk:
    """Who asks, and who is told that the gate is shut."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.counters = Counters()
        self.shut: list[str] = []
        self.answers: list[tuple[str, int | None]] = []
        self.durable_then: list[int] = []
        self.refusals = Refusals(ledger, self.counters, self.shut.append)

    def answer(self, error: HostdError) -> None:
        self.answers.append((error.code, error.ledger))
        self.durable_then.append(len(list(self.ledger.entries(0, 10_000))))

    def refuse(self, error: HostdError | None = None, *, principal: str = P, op: str = "Sign") -> None:
        self.refusals.refuse(principal, op, error or RefusedDriftError("drift"), self.answer, 7)

    def entries(self) -> list[Entry]:
        return list(self.ledger.entries(0, 10_000))


@pytest.fixture
def desk(ledger: Ledger) -> Desk:
    return Desk(ledger)


def break_disk(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    import os

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    def now() -> None:
        monkeypatch.setattr(os, "pwrite", full)

    return now


def test_the_entry_is_durable_before_the_answer(desk: Desk) -> None:
    desk.refuse()
    assert desk.answers == []
    desk.refusals.flush()
    assert desk.answers == [("refused_drift", 0)]
    assert desk.durable_then == [1]
    (entry,) = desk.entries()
    assert (entry.event, entry.outcome, entry.principal, entry.op, entry.code, entry.passed) == (
        "operation",
        "refused-drift",
        P,
        "Sign",
        "refused_drift",
        7,
    )
    desk.refusals.flush()
    assert len(desk.answers) == 1


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RefusedDriftError("d"), "refused-drift"),
        (DeniedError("d"), "denied"),
        (OverloadedError("o"), "failed"),
        (UnavailableError("u"), "failed"),
    ],
    ids=lambda x: str(x),
)
def test_outcomes(desk: Desk, error: HostdError, outcome: str) -> None:
    desk.refuse(error)
    desk.refusals.flush()
    assert desk.entries()[0].outcome == outcome


def test_more_of_the_same_refer_to_the_first_and_are_counted(desk: Desk) -> None:
    for _ in range(3):
        for _ in range(100):
            desk.refuse()
        desk.refusals.flush()
    assert len(desk.entries()) == 1
    assert desk.answers == [("refused_drift", 0)] * 300
    desk.refusals.close_window()
    first, more = desk.entries()
    assert first.seq == 0
    assert (more.event, more.principal, more.op, more.code) == ("repeated", P, "Sign", "refused_drift")
    assert more.detail == "299 more like entry 0"
    desk.refuse()
    desk.refusals.flush()
    assert desk.answers[-1] == ("refused_drift", 2)
    desk.refusals.close_window()
    assert len(desk.entries()) == 3, "one refusal has nothing more to say"


def test_another_caller_operation_or_code_is_an_entry_of_its_own(desk: Desk) -> None:
    desk.refuse()
    desk.refuse(principal='VM::"b"')
    desk.refuse(op="Mac")
    desk.refuse(OverloadedError("o"))
    desk.refuse()
    desk.refusals.flush()
    assert [number for _, number in desk.answers] == [0, 1, 2, 3, 0]
    assert len(desk.entries()) == 4


def test_kinds_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KINDS", 3)
    for i in range(10):
        desk.refuse(principal=f"p{i}")
    desk.refusals.flush()
    assert len(desk.entries()) == 4
    assert [n for _, n in desk.answers] == [0, 1, 2, *[3] * 7]
    desk.refusals.close_window()
    assert desk.entries()[-1].detail == "6 more like entry 3"
    desk.refuse(principal="p9")
    desk.refusals.flush()
    assert len(desk.entries()) == 6


def test_a_ledger_that_fails_shuts_the_gate_and_the_refusal_leaves_without_a_reference(
    desk: Desk, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.refuse()
    break_disk(ledger, monkeypatch)()
    desk.refusals.flush()
    assert desk.answers == [("refused_drift", None)]
    assert len(desk.shut) == 1
    # And from then on: nothing is taken, everything is answered.
    desk.refuse(op="Mac")
    desk.refuse(op="Mac")
    desk.refusals.flush()
    assert desk.answers[1:] == [("refused_drift", None)] * 2
    desk.refusals.close_window()
    assert len(desk.shut) > 2
    monkeypatch.undo()
    with pytest.raises(LedgerError):
        ledger.sync()
    assert desk.entries() == []


def test_a_window_that_closes_on_a_full_disk_shuts_the_gate(
    desk: Desk, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.refuse()
    desk.refuse()
    desk.refusals.flush()
    break_disk(ledger, monkeypatch)()
    desk.refusals.close_window()
    assert desk.shut == ["".join(desk.shut)]


def test_a_request_that_waited(desk: Desk) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    job = Job(name="Sign", mutates=False, shreds=False, run=never, answer=never, refuse=desk.answer)  # type: ignore[arg-type]
    waiting = Waiting(Caller(uid=5), 1, 2, job)
    desk.refusals.refuse_waiting(waiting, UnavailableError("x"))
    desk.refusals.flush()
    assert desk.answers == [("unavailable", 0)]
    assert (desk.entries()[0].principal, desk.entries()[0].op) == ('Host::"uid:5"', "Sign")


def test_each_refusal_is_counted(desk: Desk) -> None:
    for _ in range(5):
        desk.refuse()
    (sample,) = desk.counters.snapshot().counters
    assert sample.value == 5
    assert dict(sample.labels) == {"op": "Sign", "outcome": "refused_drift"}
