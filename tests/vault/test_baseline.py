"""A capture that loses its measurer, or has one that never ends: an error for the officer, nothing worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from guestlib.errors import HostdError
from hostd.config import Config
from hostd.core.findings import BOOT, GUESTS, IMA, KERNEL, POSTURE, Component
from hostd.core.reading_kernel import KernelReading
from hostd.core.readings import FilesReading, GuestsReading, ImaReading, Missing, Reading, Segment
from hostd.ipc.loop import Loop
from hostd.vault import baseline
from hostd.vault.baseline import Capture
from hostd.vault.measuring import Measuring
from tests.support.readings import posture
from tests.vault.support_gate import hypervisor

LOST = Missing(reason="the measurer was lost", absent=False)
ABSENT = Missing(reason="not on this host", absent=True)
VMS = [f"{n:08x}-0000-4000-8000-000000000000" for n in range(1000)]


@dataclass
class Link:
    """The vault's end of the measurer as a capture sees it: once it is lost, every question is answered at
    once."""

    ready: bool = True
    asked: list[tuple[object, Callable[[Reading], None]]] = field(default_factory=list)

    def read(
        self, component: Component, _position: int, told: Callable[[Reading], None], *, part: int = 0
    ) -> None:
        del part
        self._ask(component, told)

    def identify(self, file: int, told: Callable[[Reading], None]) -> None:
        self._ask(file, told)

    def survey(self, prefixes: tuple[str, ...], told: Callable[[None], None]) -> None:
        self._ask(prefixes, lambda _reading: told(None))

    def _ask(self, what: object, told: Callable[[Reading], None]) -> None:
        if self.ready:
            self.asked.append((what, told))
        else:
            told(LOST)

    def answer(self, reading: Reading) -> object:
        what, told = self.asked.pop(0)
        told(reading)
        return what

    def lose(self) -> None:
        self.ready = False
        self.answer(LOST)


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def results(loop: Loop, link: Link) -> list[bytes | HostdError]:
    results: list[bytes | HostdError] = []
    Capture(Config(), cast("Measuring", link), loop, results.append, base=None, pcrs={}).start()
    return results


def refusal(results: list[bytes | HostdError]) -> str:
    (result,) = results
    assert isinstance(result, HostdError)
    return result.message


def until_kernel(link: Link) -> None:
    for component, reading in (
        (GUESTS, GuestsReading((), ())),
        (None, FilesReading(())),
        (POSTURE, posture()),
        (BOOT, ABSENT),
    ):
        asked = link.answer(reading)
        assert component in (None, asked)


def test_the_measurer_is_lost_with_many_machines_left(link: Link, results: list[bytes | HostdError]) -> None:
    link.answer(GuestsReading(tuple(hypervisor(vm) for vm in VMS), ()))
    link.lose()
    assert refusal(results) == "no manifest: the measurer was lost"
    assert not link.asked


def test_the_measurer_is_lost_with_many_files_left(link: Link, results: list[bytes | HostdError]) -> None:
    link.answer(GuestsReading((), ()))
    link.answer(FilesReading(tuple(Segment(n, 0, 4096, bytes(16)) for n in range(1000))))
    link.lose()
    assert refusal(results) == "no manifest: the measurer was lost"


def test_a_kernel_that_is_read_out_of_order(link: Link, results: list[bytes | HostdError]) -> None:
    until_kernel(link)
    for _ in range(2):
        assert link.answer(KernelReading(0, 9, 1, (), (), (), 0, (), 0)) == KERNEL
    assert refusal(results) == "no manifest: the kernel changed while it was read"
    assert not link.asked


def test_a_log_without_end(
    link: Link, results: list[bytes | HostdError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "MAX_LOG_BYTES", 100)
    until_kernel(link)
    link.answer(ABSENT)
    for offset in (0, 60):
        assert link.answer(ImaReading("boot", offset, bytes(60), more=True)) == IMA
    assert refusal(results) == "no manifest: the IMA log is over 100 bytes"
    assert not link.asked
