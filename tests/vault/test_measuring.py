"""The link to the measurer over a real socket: what is asked when, and what ends the link."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from hostd.core.appraisal import Appraiser
from hostd.core.findings import (
    FILES,
    GUESTS,
    IMA,
    KERNEL,
    POSTURE,
    Component,
    Kind,
    Status,
    Verdict,
    process_of,
    relro_of,
)
from hostd.core.reading_kernel import KernelReading
from hostd.core.readings import (
    FilesReading,
    GuestsReading,
    ImaReading,
    Missing,
    ProcessReading,
    Reading,
)
from hostd.ipc import measuring as protocol
from hostd.ipc.channel import Channel, ChannelClosedError
from hostd.ipc.connect import listen
from hostd.ipc.loop import Loop
from hostd.vault import measuring
from hostd.vault.asking import MAX_OPEN as ROOM
from hostd.vault.asking import Lane
from hostd.vault.measuring import Measuring
from tests.support.readings import posture
from tests.vault.support_gate import finding, hypervisor

HELLO = protocol.Hello(b"e" * 16)
LOST = Missing(reason="the measurer was lost", absent=False)
READINGS: dict[Component, Reading] = {
    GUESTS: GuestsReading((), ()),
    POSTURE: posture(),
    IMA: ImaReading("boot", 0, b"", more=False),
    FILES: FilesReading(()),
}
MAX_OPEN = ROOM[Lane.OTHER]
VMS = [f"{n:08x}-0000-4000-8000-000000000000" for n in range(50)]


class ScriptedJudge:
    """Judges as the test says, and keeps what it was shown."""

    class Log:
        position = 0

    def __init__(self) -> None:
        self.ima = self.Log()
        self.status = Status.VERIFIED
        self.identify: frozenset[int] = frozenset()
        self.shown: list[Reading] = []
        self.learnt: list[int] = []

    def appraise(self, component: Component, reading: Reading) -> Verdict:
        self.shown.append(reading)
        if isinstance(reading, Missing):
            return Verdict(component, Status.ABSENT if reading.absent else Status.PENDING)
        findings = (finding(component),) if self.status is Status.DRIFTED else ()
        return Verdict(component, self.status, findings, self.identify)

    def learn(self, number: int, _reading: Reading) -> None:
        self.learnt.append(number)


class Told:
    """The vault, as far as it is told."""

    def __init__(self) -> None:
        self.ready = 0
        self.lost: list[str] = []
        self.verdicts: list[tuple[Verdict, int, int]] = []
        self.costs: list[int] = []
        self.hints: list[Component] = []

    def measurer_ready(self) -> None:
        self.ready += 1

    def measurer_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def on_verdict(self, verdict: Verdict, _reading: Reading, started: int, ended: int, cost: int) -> None:
        self.costs.append(cost)
        self.verdicts.append((verdict, started, ended))

    def on_hint(self, component: Component) -> None:
        self.hints.append(component)


class Measurer:
    """The measurer's end, in the test's hands."""

    def __init__(self, loop: Loop, path: Path, *, deadline_s: float = 5.0, log_attested: bool = True) -> None:
        self.loop = loop
        self.listener = listen(path, mode=0o600)
        self.told = Told()
        self.judge = ScriptedJudge()
        self.channel: Channel[protocol.Request] | None = None
        self.asked: list[protocol.Request] = []
        self.closed = False
        self.vault = Measuring(
            loop,
            path,
            uid=os.geteuid(),
            deadline_s=deadline_s,
            log_attested=log_attested,
            new_appraiser=lambda: cast("Appraiser", self.judge),
            listener=self.told,
        )

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            self.loop.run_once(0.01)
            self._hear()

    def _hear(self) -> None:
        if self.channel is None:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            self.channel = Channel(sock, protocol.Request)
        try:
            self.asked += self.channel.receive()
        except ChannelClosedError:
            self.closed = True

    def connect(self) -> None:
        self.until(lambda: self.channel is not None)

    def greet(self) -> None:
        self.connect()
        self.say(HELLO)
        self.until(lambda: self.told.ready == 1)

    def say(self, *records: object) -> None:
        assert self.channel is not None
        self.channel.send(*records)

    def answer(self, request: protocol.Request, reading: Reading) -> None:
        self.say(protocol.Answer(request.seq, reading, 1))

    def settle(self) -> None:
        """Until nothing more comes."""
        for _ in range(5):
            self.loop.run_once(0.002)
            self._hear()

    def lost(self) -> str:
        self.until(lambda: bool(self.told.lost))
        self.settle()
        (reason,) = self.told.lost
        assert self.closed
        assert not self.vault.ready
        return reason


@pytest.fixture
def make(loop: Loop, tmp_path: Path) -> Iterator[Callable[..., Measurer]]:
    made: list[Measurer] = []

    def start(*, deadline_s: float = 5.0, log_attested: bool = True) -> Measurer:
        made.append(Measurer(loop, tmp_path / "m", deadline_s=deadline_s, log_attested=log_attested))
        return made[-1]

    yield start
    for measurer in made:
        measurer.listener.close()
        if measurer.channel is not None:
            measurer.channel.close()
        if measurer.vault._channel is not None:
            measurer.vault._channel.close()


@pytest.fixture
def measurer(make: Callable[..., Measurer]) -> Measurer:
    greeted = make()
    greeted.greet()
    return greeted


# ── How much is asked ─────────────────────────────────────────────────────────────────────────────


def test_few_asks_are_open_and_all_are_answered(measurer: Measurer) -> None:
    told: list[Reading] = []
    for vm in VMS:
        measurer.vault.ask(process_of(vm))
    for pid in range(1, 65):
        measurer.vault.who(0, pid, told.append)
    answered: set[int] = set()
    while len(answered) < len(VMS) + 64:
        measurer.settle()
        waiting = [r for r in measurer.asked if r.seq not in answered]
        assert 0 < len(waiting) <= MAX_OPEN
        first = waiting[0]
        answered.add(first.seq)
        vm = first.vm if isinstance(first, protocol.Ask) else "x"
        measurer.answer(first, ProcessReading(hypervisor(vm), (), (), 0))
    measurer.until(lambda: len(told) == 64)
    assert {verdict.component for verdict, _, _ in measurer.told.verdicts} == {process_of(vm) for vm in VMS}
    assert len(measurer.asked) == len(answered)
    assert not measurer.vault.busy
    assert not measurer.told.lost


def test_a_reading_starts_when_it_is_asked_for(measurer: Measurer) -> None:
    times: dict[Component, tuple[int, int]] = {}
    for vm in VMS[: MAX_OPEN + 2]:
        before = time.monotonic_ns()
        measurer.vault.ask(process_of(vm))
        times[process_of(vm)] = before, time.monotonic_ns()
    answered = 0
    while len(measurer.told.verdicts) < len(times):
        time.sleep(0.005)
        measurer.settle()
        for request in measurer.asked[answered:]:
            assert isinstance(request, protocol.Ask)
            measurer.answer(request, ProcessReading(hypervisor(request.vm), (), (), 0))
        answered = len(measurer.asked)
    for verdict, started, ended in measurer.told.verdicts:
        before, after = times[verdict.component]
        assert before <= started <= after
        assert ended >= started + 5_000_000


def test_a_reading_that_goes_on_started_with_its_first_part(measurer: Measurer) -> None:
    measurer.vault.ask(IMA)
    after = time.monotonic_ns()
    measurer.until(lambda: len(measurer.asked) == 1)
    time.sleep(0.01)
    measurer.answer(measurer.asked[0], ImaReading("boot", 0, b"ab", more=True))
    measurer.until(lambda: len(measurer.asked) == 2)
    assert not measurer.told.verdicts
    measurer.answer(measurer.asked[1], ImaReading("boot", 2, b"c", more=False))
    measurer.until(lambda: bool(measurer.told.verdicts))
    assert measurer.told.verdicts[0][1] <= after
    assert bytes(measurer.vault.ima_log) == b"abc"


@pytest.mark.parametrize("status", [Status.PENDING, Status.DRIFTED])
def test_files_of_what_drifted_are_not_identified(measurer: Measurer, status: Status) -> None:
    measurer.judge.status, measurer.judge.identify = status, frozenset({4})
    measurer.vault.ask(FILES)
    measurer.until(lambda: len(measurer.asked) == 1)
    measurer.answer(measurer.asked[0], READINGS[FILES])
    measurer.until(lambda: bool(measurer.told.verdicts))
    measurer.settle()
    files = [r.file for r in measurer.asked if isinstance(r, protocol.AskFile)]
    assert files == ([] if status is Status.DRIFTED else [4])


# ── What ends the link ────────────────────────────────────────────────────────────────────────────


def test_a_measurer_that_does_not_greet_is_lost(make: Callable[..., Measurer]) -> None:
    measurer = make(deadline_s=0.1)
    measurer.connect()
    assert "did not greet" in measurer.lost()
    assert not measurer.told.ready


@pytest.mark.parametrize("raw", [False, True])
def test_a_measurer_that_does_not_answer_is_lost(make: Callable[..., Measurer], raw: bool) -> None:
    measurer = make(deadline_s=0.2)
    measurer.greet()
    told: list[Reading] = []
    if raw:
        measurer.vault.who(0, 1, told.append)
    else:
        measurer.vault.ask(POSTURE)
    assert "missed its deadline" in measurer.lost()
    assert told == ([LOST] if raw else [])


def test_whoever_waits_learns_of_the_loss(measurer: Measurer) -> None:
    told: list[Reading] = []
    surveyed: list[dict[str, bytes] | None] = []
    for pid in range(1, 3 * MAX_OPEN):
        measurer.vault.who(0, pid, told.append)
    measurer.vault.identify(3, told.append)
    measurer.vault.read(POSTURE, 0, told.append)
    measurer.vault.survey(("/usr/",), surveyed.append)
    assert measurer.channel is not None
    measurer.channel.sock.shutdown(socket.SHUT_RDWR)
    measurer.until(lambda: bool(measurer.told.lost))
    assert told == [LOST] * (3 * MAX_OPEN + 1)
    assert surveyed == [None]
    assert len(measurer.told.lost) == 1
    # And so does whoever comes after it.
    measurer.vault.who(0, 1, told.append)
    measurer.vault.survey((), surveyed.append)
    assert isinstance(told[-1], Missing)
    assert not told[-1].absent
    assert surveyed == [None, None]


def test_a_lost_measurer_is_connected_to_again(measurer: Measurer) -> None:
    measurer.vault.ask(POSTURE)
    assert measurer.channel is not None
    measurer.channel.close()
    measurer.channel = None
    measurer.until(lambda: bool(measurer.told.lost))
    measurer.connect()
    measurer.say(HELLO)
    measurer.until(lambda: measurer.told.ready == 2)
    assert not measurer.vault.busy


def test_a_second_greeting_ends_the_link(measurer: Measurer) -> None:
    measurer.say(HELLO)
    assert "greeted twice" in measurer.lost()


def test_an_answer_before_the_greeting_ends_the_link(make: Callable[..., Measurer]) -> None:
    measurer = make()
    measurer.connect()
    measurer.vault.ask(POSTURE)
    measurer.until(lambda: bool(measurer.asked))
    measurer.answer(measurer.asked[0], READINGS[POSTURE])
    assert "not asked" in measurer.lost()


@pytest.mark.parametrize(
    "record", [protocol.Answer(99, READINGS[POSTURE], 1), protocol.SurveyPart(99, {}, done=True)]
)
def test_an_answer_nobody_asked_for_ends_the_link(measurer: Measurer, record: object) -> None:
    measurer.vault.ask(POSTURE)
    measurer.say(record)
    assert "not asked" in measurer.lost()
    assert not measurer.told.verdicts


def test_a_second_answer_ends_the_link(measurer: Measurer) -> None:
    measurer.vault.ask(POSTURE)
    measurer.until(lambda: bool(measurer.asked))
    measurer.answer(measurer.asked[0], READINGS[POSTURE])
    measurer.answer(measurer.asked[0], READINGS[POSTURE])
    assert "not asked" in measurer.lost()
    assert len(measurer.told.verdicts) == 1


@pytest.mark.parametrize("component", list(READINGS), ids=str)
@pytest.mark.parametrize("reading", list(READINGS.values()), ids=lambda r: type(r).__name__)
def test_a_reading_of_another_kind_ends_the_link(
    measurer: Measurer, component: Component, reading: Reading
) -> None:
    measurer.vault.ask(component)
    measurer.until(lambda: bool(measurer.asked))
    measurer.answer(measurer.asked[0], reading)
    if reading is READINGS[component]:
        measurer.until(lambda: bool(measurer.told.verdicts))
        assert not measurer.told.lost
    else:
        assert "not asked" in measurer.lost()
        assert not measurer.judge.shown


def test_a_file_that_is_none_ends_the_link(measurer: Measurer) -> None:
    measurer.judge.identify = frozenset({4})
    measurer.vault.ask(FILES)
    measurer.until(lambda: len(measurer.asked) == 1)
    measurer.answer(measurer.asked[0], READINGS[FILES])
    measurer.until(lambda: len(measurer.asked) == 2)
    measurer.answer(measurer.asked[1], READINGS[POSTURE])
    assert "not asked" in measurer.lost()
    assert not measurer.judge.learnt


def test_a_survey_part_for_a_reading_ends_the_link(measurer: Measurer) -> None:
    measurer.vault.ask(POSTURE)
    measurer.until(lambda: bool(measurer.asked))
    measurer.say(protocol.SurveyPart(measurer.asked[0].seq, {}, done=True))
    assert "not asked" in measurer.lost()


def test_a_reading_for_a_survey_ends_the_link_and_is_told(measurer: Measurer) -> None:
    surveyed: list[dict[str, bytes] | None] = []
    measurer.vault.survey(("/usr/",), surveyed.append)
    measurer.until(lambda: bool(measurer.asked))
    measurer.answer(measurer.asked[0], Missing("no", absent=False))
    assert "not asked" in measurer.lost()
    assert surveyed == [None]


def test_an_overlong_survey_ends_the_link(measurer: Measurer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MAX_SURVEYED", 2)
    surveyed: list[dict[str, bytes] | None] = []
    measurer.vault.survey(("/usr/",), surveyed.append)
    measurer.until(lambda: bool(measurer.asked))
    for name in ("/usr/a", "/usr/b", "/usr/c"):
        measurer.say(protocol.SurveyPart(measurer.asked[0].seq, {name: bytes(32)}, done=False))
    assert "survey of over 2 files" in measurer.lost()
    assert surveyed == [None]


def test_an_overlong_log_ends_the_link(measurer: Measurer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MAX_LOG_BYTES", 3)
    measurer.vault.ask(IMA)
    measurer.until(lambda: len(measurer.asked) == 1)
    measurer.answer(measurer.asked[0], ImaReading("boot", 0, b"abc", more=True))
    measurer.until(lambda: len(measurer.asked) == 2)
    measurer.answer(measurer.asked[1], ImaReading("boot", 3, b"d", more=False))
    assert "the IMA log is over 3 bytes" in measurer.lost()
    assert not measurer.told.verdicts


def test_a_log_that_the_tpm_does_not_vouch_for_is_absent(make: Callable[..., Measurer]) -> None:
    measurer = make(log_attested=False)
    measurer.greet()
    measurer.vault.ask(IMA)
    measurer.until(lambda: bool(measurer.asked))
    measurer.answer(measurer.asked[0], ImaReading("boot", 0, b"abc", more=False))
    measurer.until(lambda: bool(measurer.told.verdicts))
    assert measurer.told.verdicts[0][0] == Verdict(IMA, Status.ABSENT)
    assert not measurer.vault.ima_log


# ── Lanes and hints ───────────────────────────────────────────────────────────────────────────────


def test_the_kernel_does_not_wait_for_others_nor_they_for_it(measurer: Measurer) -> None:
    for vm in VMS:
        measurer.vault.ask(process_of(vm))
    measurer.vault.ask(KERNEL)
    assert not measurer.vault.takes(KERNEL)
    assert not measurer.vault.takes(IMA)
    measurer.until(lambda: any(isinstance(r, protocol.Ask) and r.kind is Kind.KERNEL for r in measurer.asked))
    measurer.settle()
    assert len(measurer.asked) == MAX_OPEN + 1


def test_one_lane_is_full_and_the_other_is_not(measurer: Measurer) -> None:
    assert measurer.vault.takes(KERNEL)
    measurer.vault.ask(KERNEL)
    assert not measurer.vault.takes(KERNEL)
    assert measurer.vault.has_room
    for component in (IMA, FILES):
        assert measurer.vault.takes(component)
        measurer.vault.ask(component)
    assert not measurer.vault.takes(POSTURE)


def test_relro_rides_with_its_process(measurer: Measurer) -> None:
    first, second = VMS[:2]
    measurer.vault.ask(process_of(first))
    measurer.vault.ask(IMA)
    for component in (FILES, process_of(second), relro_of(second)):
        assert not measurer.vault.takes(component)
    assert measurer.vault.has_room
    assert measurer.vault.takes(relro_of(first))
    measurer.vault.ask(relro_of(first))
    assert not measurer.vault.takes(FILES)
    assert not measurer.vault.takes(relro_of(second))
    assert measurer.vault.takes(KERNEL)
    measurer.vault.ask(KERNEL)
    assert not measurer.vault.has_room


def kernel_part(part: int, parts: int) -> KernelReading:
    return KernelReading(part, parts, 1, (), (), (), 0, (), 0)


def test_the_kernel_is_one_reading_of_all_its_parts(measurer: Measurer) -> None:
    measurer.vault.ask(KERNEL)
    after = time.monotonic_ns()
    for part in range(3):
        measurer.until(lambda count=part + 1: len(measurer.asked) == count)  # type: ignore[misc]
        request = measurer.asked[part]
        assert isinstance(request, protocol.Ask)
        assert request.part == part
        assert not measurer.told.verdicts
        assert measurer.vault.busy == {KERNEL}
        measurer.say(protocol.Answer(request.seq, kernel_part(part, 3), 10))
    measurer.until(lambda: bool(measurer.told.verdicts))
    assert measurer.told.verdicts[0][1] <= after
    assert measurer.told.costs == [30]
    assert not measurer.vault.busy


@pytest.mark.parametrize("reading", [kernel_part(1, 3), kernel_part(0, measuring.MAX_PARTS + 1)])
def test_a_part_that_was_not_asked_for_ends_the_link(measurer: Measurer, reading: KernelReading) -> None:
    measurer.vault.ask(KERNEL)
    measurer.until(lambda: bool(measurer.asked))
    measurer.answer(measurer.asked[0], reading)
    assert "not asked" in measurer.lost()


def test_answers_in_any_order(measurer: Measurer) -> None:
    for component in (IMA, FILES, KERNEL):
        measurer.vault.ask(component)
    measurer.until(lambda: len(measurer.asked) == 3)
    readings = {**READINGS, KERNEL: kernel_part(0, 1)}
    for request in reversed(measurer.asked):
        assert isinstance(request, protocol.Ask)
        measurer.answer(request, readings[Component(request.kind)])
    measurer.until(lambda: len(measurer.told.verdicts) == 3)
    assert [v.component for v, _, _ in measurer.told.verdicts] == [KERNEL, FILES, IMA]


def test_hints_are_passed_on_and_none_before_the_greeting(make: Callable[..., Measurer]) -> None:
    measurer = make()
    measurer.greet()
    measurer.say(protocol.Hint(Kind.IMA), protocol.Hint(Kind.PROCESS, VMS[0]))
    measurer.until(lambda: len(measurer.told.hints) == 2)
    assert measurer.told.hints == [IMA, process_of(VMS[0])]


def test_a_hint_before_the_greeting_ends_the_link(make: Callable[..., Measurer]) -> None:
    measurer = make()
    measurer.connect()
    measurer.say(protocol.Hint(Kind.IMA))
    assert "not asked" in measurer.lost()
    assert not measurer.told.hints


@pytest.mark.parametrize("freeze", ["", "frozen", "not frozen in time"])
def test_whether_the_vm_stood_still_is_a_claim(measurer: Measurer, freeze: str) -> None:
    measurer.vault.ask(process_of(VMS[0]))
    measurer.until(lambda: bool(measurer.asked))
    reading = ProcessReading(hypervisor(VMS[0]), (), (), 0)
    measurer.say(protocol.Answer(measurer.asked[0].seq, reading, 1, freeze))
    measurer.until(lambda: bool(measurer.told.verdicts))
    claims = measurer.told.verdicts[0][0].claims
    assert claims == ((("freeze", freeze),) if freeze else ())


def test_no_verdict_comes_after_the_loss(measurer: Measurer) -> None:
    """The reading was the last word of a measurer that went: asking it for a file is how that is noticed."""
    measurer.vault.ask(POSTURE)
    measurer.until(lambda: len(measurer.asked) == 1)
    measurer.judge.identify = frozenset({7})
    measurer.answer(measurer.asked[0], posture())
    assert measurer.channel is not None
    measurer.channel.close()
    measurer.channel = None
    end = time.monotonic() + 30
    while not measurer.told.lost and time.monotonic() < end:
        measurer.loop.run_once(0.01)
    assert len(measurer.told.lost) == 1
    assert len(measurer.judge.shown) == 1
    assert measurer.told.verdicts == []


VM_UUID = "aaaaaaaa-0000-4000-8000-000000000001"


def test_machines_are_suspended_a_few_at_a_time(measurer: Measurer) -> None:
    told: list[tuple[bool, str]] = []
    others = [f"00000000-0000-4000-8000-{number:012}" for number in range(ROOM[Lane.POWER] - 1)]
    for vm in (VM_UUID, *others):
        measurer.vault.suspend(vm, True, lambda done, text: told.append((done, text)))
    measurer.vault.suspend(VM_UUID, False, lambda done, text: told.append((done, text)))
    measurer.until(lambda: len(measurer.asked) == ROOM[Lane.POWER])
    measurer.settle()
    assert len(others) > 1, "one that is not answered holds up no other"
    asked = [request for request in measurer.asked if isinstance(request, protocol.AskSuspend)]
    assert [(request.vm, request.on) for request in asked] == [(vm, True) for vm in (VM_UUID, *others)]
    measurer.say(protocol.Suspended(asked[1].seq, True, "suspended"))
    measurer.until(lambda: len(measurer.asked) == ROOM[Lane.POWER] + 1)
    last = measurer.asked[-1]
    assert isinstance(last, protocol.AskSuspend)
    assert (last.vm, last.on) == (VM_UUID, False)
    measurer.say(protocol.Suspended(last.seq, False, "no"))
    measurer.until(lambda: len(told) == 2)
    assert told == [(True, "suspended"), (False, "no")]


def test_whoever_suspends_learns_of_the_loss(measurer: Measurer) -> None:
    told: list[tuple[bool, str]] = []
    measurer.vault.suspend(VM_UUID, True, lambda done, text: told.append((done, text)))
    measurer.until(lambda: bool(measurer.asked))
    measurer.vault.restart()
    assert told == [(False, "the measurer was lost")]
    measurer.vault.suspend(VM_UUID, True, lambda done, text: told.append((done, text)))
    assert told[1] == (False, "the measurer is not connected")


def test_suspended_for_a_reading_ends_the_link(measurer: Measurer) -> None:
    measurer.vault.ask(POSTURE)
    measurer.until(lambda: bool(measurer.asked))
    measurer.say(protocol.Suspended(measurer.asked[0].seq, True, "what?"))
    assert "not asked" in measurer.lost()


def test_a_reading_for_suspended_ends_the_link(measurer: Measurer) -> None:
    told: list[tuple[bool, str]] = []
    measurer.vault.suspend(VM_UUID, True, lambda done, text: told.append((done, text)))
    measurer.until(lambda: bool(measurer.asked))
    measurer.say(protocol.Answer(measurer.asked[0].seq, Missing(reason="", absent=False), 1))
    assert "not asked" in measurer.lost()
