"""What only hostd's processes map is hashed in turn; what a hypervisor maps, at every reading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hostd.core.appraise_files import FileBook
from hostd.core.appraise_process import Processes
from hostd.core.findings import SELF, Status, process_of
from hostd.core.reference import Reference
from hostd.measurer import contents as module
from hostd.measurer.contents import ContentsProbe
from hostd.measurer.files import Range, Registry
from hostd.measurer.itself import _as_hypervisor
from hostd.measurer.lane import Lane
from hostd.measurer.process import ProcessProbe
from hostd.measurer.tags import Tagger
from hostd.platform.pages import OwnPages
from tests.measurer.test_itself import Bench

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for page frames")
HYPERVISOR = (1, 1)
VM = "6f1c9a52-0000-4000-8000-000000000001"


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


def test_a_hypervisor_rests_on_no_tag_of_an_earlier_reading(counting: tuple[Bench, Counting]) -> None:
    """What only hostd mapped so far may have changed in the page cache since its turn."""
    bench, contents = counting
    book = FileBook()
    digests: dict[str, set[str]] = {}
    for number in {item.file for item in bench.registry.wanted()}:
        identity = bench.registry.identify(number)
        book.learn(number, identity)
        digests.setdefault(identity.path, set()).add(identity.sha256.hex())
    files = {path: tuple(sorted(values)) for path, values in digests.items()}
    reference = Reference("hostd-reference/2", 1, 1, "h", files=files)
    own = next(own for own in bench.probe._in_turn())
    reading = bench.processes.read(_as_hypervisor(own), own.handle)
    vm = process_of(VM)
    as_vm = msgspec.structs.replace(
        reading, hypervisor=msgspec.structs.replace(reading.hypervisor, vm=VM, source="proc")
    )

    def judged() -> tuple[Status, Status]:
        told = contents.read()
        assert {Range(s.file, s.offset, s.length) for s in told.segments} == set(bench.registry.wanted())
        assert len(told.segments) == len(bench.registry.wanted())
        assert book.appraise(told, reference, processes=1).status is Status.VERIFIED
        return (
            Processes(allow_jit=True).appraise(SELF, reading, book, reference).status,
            Processes(allow_jit=True).appraise(vm, as_vm, book, reference).status,
        )

    assert judged() == (Status.VERIFIED, Status.VERIFIED), "all was read"
    assert judged() == (Status.VERIFIED, Status.PENDING), "some of it was not"
    bench.registry.claim(HYPERVISOR, bench.registry.wanted())
    assert judged() == (Status.VERIFIED, Status.VERIFIED)
    assert judged() == (Status.VERIFIED, Status.VERIFIED)


def test_no_copies_are_kept_of_it(counting: tuple[Bench, Counting]) -> None:
    bench, _ = counting
    numbers = {item.file for item in bench.registry.wanted()}
    assert not any(file.copies for number in numbers if (file := bench.registry.get(number)))
