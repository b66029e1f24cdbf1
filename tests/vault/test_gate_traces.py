"""Freshness from traces: the gate's sentence over a load by lot, and a proof that the checker can tell.

The gate, the batches and the ledger are the real ones; the checker shares nothing with them. Each test of
the second half takes one check away from the gate and wants the checker to go red.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from hostd.core.findings import FILES, Component, Kind, Status
from hostd.platform.tpm_errors import TpmError
from hostd.vault import batches as batches_module
from hostd.vault.batches import Batches
from hostd.vault.gate import Gate
from hostd.vault.ledger import Ledger
from hostd.vault.tpmlink import PcrsRead
from tests.support.freshness import Freshness, Rules
from tests.support.pipeline import PCRS, ROUGH, Odds, World

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REQUESTS = 200_000
"""`python -m tests.bench.traces` has millions."""
RULES = Rules(tolerated=frozenset({"boot"}))


OFTEN = Odds(attack_s=0.04, restart_s=0.05, loss_s=0.3, shut_s=0.1, tpm_error=0.1)
"""For what otherwise shows only after many requests."""


def run(folder: Path, seed: int, requests: int, odds: Odds = ROUGH) -> tuple[Freshness, World]:
    freshness = Freshness(RULES)
    world = World(folder, seed, freshness.take, odds)
    try:
        world.run(requests)
    finally:
        world.close()
    freshness.end()
    return freshness, world


@pytest.mark.slow
def test_the_sentence_holds(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    freshness, world = run(tmp_path, seed, REQUESTS)
    print(f"seed {seed}, {world.clock.now / 1e9:.1f} s of simulated time: {dict(freshness.counts)}")
    assert freshness.violations == []
    assert world.missed == []
    counts = freshness.counts
    # Something happened: answers, drift, faults.
    assert counts["released"] > REQUESTS / 20
    assert min(counts["readings drifted"], counts["refused_drift"], counts["unavailable"]) > 0
    # Everybody was told one thing, and each answer has an entry of its own.
    assert freshness.waiting == 0
    assert world.answered + world.refused == counts["requests"] == world.arrived
    reopened = Ledger(tmp_path / "ledger.jsonl")
    withheld = {n for first, last in _withheld(reopened) for n in range(first, last + 1)}
    answers = {e.seq for e in reopened.entries(0, reopened.size) if e.outcome == "released"} - withheld
    reopened.close()
    assert len(set(world.entries)) == len(world.entries)
    assert answers == set(world.entries)


def _withheld(ledger: Ledger) -> list[tuple[int, int]]:
    return [run for e in ledger.entries(0, ledger.size) if e.event == "withheld" for run in e.withheld]


# ── Each check taken away ─────────────────────────────────────────────────────────────────────────────


def stale_stamps(gate: Gate, component: Component, *, good: bool = True) -> int:
    found = UNTIL(gate, component, good=good)
    return 2**62 if found >= 0 else found


def pending_is_good(gate: Gate, component: Component, *, good: bool = True) -> int:
    stamp = gate.stamps.get(component)
    if stamp is not None and stamp.status is Status.PENDING:
        return stamp.started
    return UNTIL(gate, component, good=good)


def without(kind: Kind) -> Callable[..., Any]:
    return lambda gate, caller: frozenset(c for c in NEEDS(gate, caller) if c.kind is not kind)


def of_another_machine(gate: Gate, caller: Any) -> frozenset[Component]:
    """Of some machine, whichever."""
    if not caller.vm or len(gate.hypervisors) < 2:
        return NEEDS(gate, caller)
    other = next(h.vm for h in gate.hypervisors if h.vm != caller.vm)
    return frozenset(Component(c.kind, other) if c.vm else c for c in NEEDS(gate, caller))


def no_machines_for_users(gate: Gate, caller: Any) -> frozenset[Component]:
    return NEEDS(gate, caller) if caller.vm else frozenset(c for c in NEEDS(gate, caller) if not c.vm)


def latch_of_the_host_only(gate: Gate, caller: Any) -> Component | None:
    found = LATCHED(gate, caller)
    return None if found is not None and found.vm else found


def keep_what_was_read(gate: Gate, hypervisors: Any) -> None:
    """Stamps of a machine outlive its process."""
    before = dict(gate._stamps)
    GUESTS(gate, hypervisors)
    gate._stamps.update({c: s for c, s in before.items() if c.vm and c in gate.known})


def no_wait_for_the_second_look(batches: Batches) -> None:
    for batch in tuple(batches._under_way):
        if batch.quoted is not None:
            batch.confirm = frozenset()
            batches._finish(batch)


def second_look_from_before(batches: Batches, batch: Any, result: Any) -> None:
    """Readings that started when the batch was executed will do."""
    ON_QUOTE(batches, batch, result)
    batch.quoted_at = min(batch.quoted_at, batch.began)
    batches.confirm()


def release_all(batches: Batches, batch: Any) -> None:
    batches._under_way.remove(batch)
    for executed in batch.executed:
        batches._release(executed, batch)


def no_quote_will_do(batches: Batches, batch: Any, result: Any) -> None:
    ON_QUOTE(batches, batch, PcrsRead(dict(PCRS)) if isinstance(result, TpmError) else result)


def any_pcr_will_do(batches: Batches, batch: Any, result: Any) -> None:
    ON_QUOTE(batches, batch, result if isinstance(result, TpmError) else PcrsRead(dict(PCRS)))


def released_at_once(batches: Batches) -> None:
    """Before the TPM was asked at all."""
    START(batches)
    for batch in tuple(batches._under_way):
        if batch.quoted is None:
            release_all(batches, batch)


def released_before_it_is_written(ledger: Ledger) -> None:
    """Nobody waits for the disk."""


def shut_is_ignored(gate: Gate, now: int, without: Any) -> Any:
    why, gate.__dict__["shut"] = gate.__dict__["shut"], None
    try:
        return TAKE(gate, now, without)
    finally:
        gate.__dict__["shut"] = why


def shut_is_ignored_at_the_end(batches: Batches, batch: Any) -> None:
    gate = batches._gate
    why, gate.__dict__["shut"] = gate.__dict__["shut"], None
    try:
        FINISH(batches, batch)
    finally:
        gate.__dict__["shut"] = why


UNTIL, NEEDS, LATCHED, GUESTS, TAKE = Gate.until, Gate.needs, Gate.latched_for, Gate.guests, Gate.take
ON_QUOTE, START, FINISH = Batches._on_quote, Batches.start, Batches._finish


@dataclass(frozen=True)
class Without:
    """A check of the gate, and what is there in its place."""

    name: str
    owner: Any
    attribute: str
    instead: Any
    tells: str
    """What the checker says, in part."""


MUTATIONS = (
    Without("a reading is younger than the request", Gate, "until", stale_stamps, "too early"),
    Without("pending is not good", Gate, "until", pending_is_good, "was pending"),
    Without(
        "absent is not good where it is required",
        Gate,
        "acceptable",
        lambda _gate, _component, status: status in (Status.VERIFIED, Status.ABSENT),
        "was absent",
    ),
    *(
        Without(f"{kind} counts", Gate, "needs", without(kind), f"{kind}")
        for kind in (Kind.FILES, Kind.KERNEL, Kind.PROCESS, Kind.RELRO, Kind.GUESTS, Kind.SELF)
    ),
    Without("a machine's own reading counts", Gate, "needs", of_another_machine, "executed although"),
    Without("a user rests on all machines", Gate, "needs", no_machines_for_users, "executed although"),
    Without("drift stays", Gate, "latched_for", lambda _gate, _caller: None, "has drifted"),
    Without("drift of a machine stays", Gate, "latched_for", latch_of_the_host_only, "has drifted"),
    Without("a caller is the process it was", Gate, "bound", lambda *_: True, "another process"),
    Without("another process is read anew", Gate, "guests", keep_what_was_read, "nothing was read"),
    Without("nothing outlives the measurer", Gate, "lose_measurer", lambda _gate: None, "executed although"),
    Without("a shut gate is shut", Gate, "take", shut_is_ignored, "the gate is shut"),
    Without("nothing leaves a gate that was shut", Batches, "_finish", shut_is_ignored_at_the_end, "is shut"),
    Without("the second look is waited for", Batches, "confirm", no_wait_for_the_second_look, "second look"),
    Without("the second look starts after", Batches, "_on_quote", second_look_from_before, "second look"),
    Without("the second look decides", Batches, "_finish", release_all, "answered although"),
    Without("the second look is at code", batches_module, "SECOND_LOOK", frozenset(), "second look"),
    Without("the second look is at the log", batches_module, "IMA", FILES, "second look, ima"),
    Without("the TPM agrees", Batches, "_on_quote", no_quote_will_do, "TPM did not agree"),
    Without("the PCRs agree", Batches, "_on_quote", any_pcr_will_do, "TPM did not agree"),
    Without("the TPM is waited for", Batches, "start", released_at_once, "before the TPM was"),
    Without("a batch ends with the measurer", Batches, "abandon", lambda *_: None, "measurer was lost"),
)


@pytest.mark.parametrize("check", MUTATIONS, ids=lambda check: check.name)
def test_a_missing_check_is_found(check: Without, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.owner, check.attribute, check.instead)
    for seed in range(30):
        freshness, _ = run(tmp_path / str(seed), seed, 3_000, OFTEN)
        if any(check.tells in told for told in freshness.violations):
            return
    raise AssertionError(f"the checker does not miss: {check.name}; {freshness.violations}")


def test_the_same_load_is_clean_with_all_checks(tmp_path: Path) -> None:
    for seed in range(3):
        freshness, world = run(tmp_path / str(seed), seed, 6_000, OFTEN)
        assert freshness.violations == []
        assert world.missed == []
