"""How much of a batch is one caller's."""

from __future__ import annotations

from hostd.core.callers import Caller
from hostd.vault.shares import ABOUT_NS, PART, Shares
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
