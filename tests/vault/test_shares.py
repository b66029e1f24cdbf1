"""How much of a batch is one caller's."""

from __future__ import annotations

from hostd.core.callers import Caller
from hostd.vault.shares import ABOUT_NS, FLOOD, HOLD_NS, PART, Shares
from hostd.vault.waiting import Waiting
from tests.vault.support_gate import OFFICER, A, B

BATCH = 1024


def test_who_is_alone_has_it_all() -> None:
    shares = Shares(BATCH)
    shares.arrived(A, 0)
    assert shares.of_each(1, 1) == BATCH


def test_while_others_are_about_nobody_has_more_than_his_part() -> None:
    shares = Shares(BATCH)
    shares.arrived(B, 0)
    shares.arrived(A, ABOUT_NS // 2)
    assert shares.of_each(ABOUT_NS - 1, 1) == BATCH // PART
    shares.arrived(A, ABOUT_NS)
    assert shares.of_each(ABOUT_NS, 1) == BATCH, "the other has not asked for a second"
    shares.arrived(B, ABOUT_NS)
    assert shares.of_each(ABOUT_NS + 1, 2) == BATCH // PART


def test_many_share_evenly_and_each_has_something() -> None:
    shares = Shares(BATCH)
    for uid in range(PART * 4):
        shares.arrived(Caller(uid=uid), uid)
    assert shares.of_each(100, PART * 4) == BATCH // (PART * 4)
    assert shares.of_each(100, 2 * BATCH) == 1


def test_somebody_else_waits_though_he_asked_long_ago() -> None:
    shares = Shares(BATCH)
    shares.arrived(OFFICER, 0)
    shares.arrived(A, 5 * ABOUT_NS)
    assert shares.of_each(5 * ABOUT_NS, 2) == BATCH // PART


def test_whoever_was_about_is_forgotten() -> None:
    shares = Shares(BATCH)
    for uid in range(100):
        shares.arrived(Caller(uid=uid), uid)
    shares.of_each(2 * ABOUT_NS, 0)
    assert shares._about == {}


# ── Who floods lets the others go first ───────────────────────────────────────────────────────────


def queue(caller: Caller, length: int, cost: int = 1) -> list[Waiting]:
    return [Waiting(caller, 0, 1, None, cost) for _ in range(length)]


def test_who_floods_is_held_back_while_others_wait() -> None:
    shares = Shares(BATCH)
    most = BATCH // PART
    queues = {A: queue(A, most + 1), B: queue(B, most)}
    assert shares.held(0, queues, ()) == {A}
    assert shares.held(0, {A: queue(A, most), B: queue(B, most)}, ()) == frozenset()
    assert shares.held(0, {A: queue(A, most + 1)}, ()) == frozenset(), "nobody else is there"
    assert shares.held(0, queues, {B}) == frozenset(), "his turn is not now"
    assert shares.held(0, {A: queue(A, most + 1), B: queue(B, most + 1)}, ()) == frozenset()
    assert shares.held(0, {A: queue(A, 4, cost=38), B: queue(B, 1)}, ()) == {A}


def test_what_waits_is_counted_whatever_comes_first() -> None:
    shares = Shares(BATCH)
    most, light = BATCH // PART, queue(B, 1)
    dear_last = queue(A, 1) + queue(A, 1, cost=most)
    assert shares.held(0, {A: dear_last, B: light}, ()) == {A}
    dear_first = queue(A, 1, cost=most - 9) + queue(A, 9)
    assert shares.held(0, {A: dear_first, B: light}, ()) == frozenset()


def test_in_a_small_batch_some_may_wait_all_the_same() -> None:
    shares = Shares(3)
    assert shares.held(0, {A: queue(A, FLOOD), B: queue(B, 1)}, ()) == frozenset()
    assert shares.held(0, {A: queue(A, FLOOD + 1), B: queue(B, 1)}, ()) == {A}


def test_nobody_is_held_back_for_long() -> None:
    shares = Shares(BATCH)
    many = queue(A, BATCH)
    queues = {A: many, B: queue(B, 1)}
    assert shares.held(7, queues, ()) == {A}
    # Others come and go meanwhile: it is one wait all the same.
    shares.took(frozenset({B}))
    assert shares.held(7 + HOLD_NS - 1, {A: many, OFFICER: queue(OFFICER, 1)}, ()) == {A}
    assert shares.held(7 + HOLD_NS, queues, ()) == frozenset()
    assert shares.held(8 + HOLD_NS, queues, ()) == frozenset(), "until one of them went"
    shares.took(frozenset({A, B}))
    assert shares.held(9 + HOLD_NS, queues, ()) == {A}
