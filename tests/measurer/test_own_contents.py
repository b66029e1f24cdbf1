"""What only hostd's processes map is hashed in turn; what a hypervisor maps, at every reading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.measurer import contents as module
from hostd.measurer.contents import ContentsProbe
from hostd.measurer.files import Range, Registry
from hostd.measurer.lane import Lane
from hostd.measurer.process import ProcessProbe
from hostd.measurer.tags import Tagger
from hostd.platform.pages import OwnPages
from tests.measurer.test_itself import Bench

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for page frames")
HYPERVISOR = (1, 1)


class Counting(ContentsProbe):
    """Notes which segments are really hashed."""

    def __init__(self, registry: Registry, tagger: Tagger, pages: OwnPages, lane: Lane) -> None:
        super().__init__(registry, tagger, pages, lane)
        self.hashed: list[Range] = []

    def _tag_all(self, views: list[tuple[Range, memoryview]]) -> dict[Range, bytes]:
        tags = super()._tag_all(views)
        self.hashed += tags
        return tags

    def reading(self) -> tuple[dict[Range, bytes], set[Range]]:
        """Tags reported, and the segments that were hashed for them."""
        self.hashed = []
        segments = self.read().segments
        return {Range(s.file, s.offset, s.length): s.tag for s in segments}, set(self.hashed)


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bench, Counting]]:
    monkeypatch.setattr(module, "OWN_BYTES", 1 << 20)
    bench = Bench(tmp_path)
    tagger, pages = Tagger(), OwnPages()
    bench.registry.close()
    bench.registry = Registry(tagger)
    bench.processes = ProcessProbe(bench.registry, tagger, pages, bench.lane)
    bench.probe._registry, bench.probe._processes = bench.registry, bench.processes
    bench.probe.enroll()
    for number in {item.file for item in bench.registry.wanted()}:
        bench.registry.identify(number)
    yield bench, Counting(bench.registry, tagger, pages, bench.lane)
    bench.close()
    pages.close()


def test_all_is_hashed_first_then_some_in_each_reading_and_all_in_turn(
    counting: tuple[Bench, Counting],
) -> None:
    bench, contents = counting
    everything = set(bench.registry.wanted())
    assert everything
    assert all(map(bench.registry.only_ours, everything))
    tags, hashed = contents.reading()
    assert set(tags) == hashed == everything

    largest = max(item.length for item in everything)
    seen: set[Range] = set()
    for _ in range(len(everything)):
        again, hashed = contents.reading()
        assert again == tags
        assert 0 < sum(item.length for item in hashed) <= (1 << 20) + largest
        seen |= hashed
        if seen == everything:
            break
    assert seen == everything


def test_what_a_hypervisor_maps_too_is_hashed_every_time(counting: tuple[Bench, Counting]) -> None:
    bench, contents = counting
    contents.reading()
    shared = bench.registry.wanted()[:3]
    bench.registry.claim(HYPERVISOR, shared)
    for _ in range(5):
        _, hashed = contents.reading()
        assert hashed >= set(shared)
    bench.registry.release_ended(bench.probe.alive(), 0.0)
    assert all(map(bench.registry.only_ours, shared))


def test_no_copies_are_kept_of_it(counting: tuple[Bench, Counting]) -> None:
    bench, _ = counting
    numbers = {item.file for item in bench.registry.wanted()}
    assert not any(file.copies for number in numbers if (file := bench.registry.get(number)))
