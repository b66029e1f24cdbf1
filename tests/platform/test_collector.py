"""What a role made before it serves is not looked through again."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from hostd.platform import collector

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


class Cycle:
    gone = 0

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        type(self).gone += 1


def test_what_exists_is_put_aside_and_later_cycles_are_still_found() -> None:
    kept = [object() for _ in range(1000)], [[] for _ in range(1000)]
    Cycle()
    collector.settle()
    assert Cycle.gone == 1, "what was garbage before is not kept for ever"
    assert gc.get_freeze_count() > len(kept[1])
    assert len(gc.get_objects()) < 1000
    Cycle()
    gc.collect()
    assert Cycle.gone == 2


def test_a_full_collection_comes_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "YOUNG", 100)
    collector.settle()
    before = gc.get_stats()[2]["collections"]
    # CPython also waits until a quarter as much is new as was there.
    kept: list[list[None]] = []
    while gc.get_stats()[2]["collections"] == before:
        kept.append([])
        assert len(kept) < 3_000_000
    assert len(kept) > 100 * collector.MIDDLE * collector.FULL
