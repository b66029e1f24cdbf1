"""The thread for the kernel, and the server around it: what is slow there holds up nothing else."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from hostd.core.findings import KERNEL, Kind, process_of
from hostd.core.readings import FileIdentity, Missing, Reading
from hostd.ipc.channel import Channel
from hostd.ipc.loop import Loop
from hostd.ipc.measuring import Answer, Ask, AskFile, Hello, Hint, Response
from hostd.measurer.apart import Apart
from hostd.measurer.server import MAX_WAITING, Server, listen
from hostd.measurer.suspender import Suspender

STEP_S = 0.002
VM = "aaaaaaaa-0000-4000-8000-000000000001"


class SlowProbe:
    """Reads a part when it is let."""

    def __init__(self) -> None:
        self.threads = {threading.get_ident()}
        self.let = threading.Event()
        self.closed = False
        self.error: Exception | None = None

    def read(self, part: int) -> Reading:
        self.threads.add(threading.get_ident())
        self.let.wait(20)
        if self.error is not None:
            raise self.error
        return Missing(f"part {part}", absent=False)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed = True


class SlowRegistry:
    """Files of a hundred steps each."""

    def __init__(self) -> None:
        self.steps = 0

    def get(self, number: int) -> Any:
        return type("File", (), {"owner": number % 3})()

    def identify_steps(self, number: int) -> Iterator[FileIdentity | None]:
        for _ in range(100):
            time.sleep(STEP_S)
            self.steps += 1
            yield None
        yield FileIdentity(number, "/usr/lib/x", 1, number, 1, bytes(32), ())


class QuickMeasurer:
    freeze = "frozen"

    def __init__(self) -> None:
        self.registry = SlowRegistry()

    def answer(self, request: Any, *_when: int) -> Reading:
        return Missing(f"{request.kind}", absent=False)


class Bench:
    """A server with its loop in the test's hands, and a vault's connection to it."""

    def __init__(self, path: Path) -> None:
        self.loop = Loop()
        self.path = path
        self.listener = listen(path, os.geteuid())
        self.probe: SlowProbe | None = None
        self.apart = Apart(self.make)
        self.measurer = QuickMeasurer()
        self.server = Server(
            self.loop,
            self.listener,
            cast("Any", self.measurer),
            self.apart,
            Suspender("test:///default", path.parent, allowed=False),
            vault_uid=os.geteuid(),
            epoch=bytes(16),
        )
        self.let = False
        self.channel = self.connect()
        self.records: list[Any] = []
        self.until(lambda: bool(self.records))
        assert isinstance(self.records.pop(0), Hello)

    def make(self) -> SlowProbe:
        self.probe = SlowProbe()
        if self.let:
            self.probe.let.set()
        return self.probe

    def connect(self) -> Channel[Any]:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        return Channel(sock, Response)

    def until(self, condition: Callable[[], bool], within_s: float = 30.0) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            self.loop.run_once(0.002)
            self.records += self.channel.receive()

    def answers(self) -> list[int]:
        return [r.seq for r in self.records if isinstance(r, Answer)]

    def close(self) -> None:
        if self.probe is not None:
            self.probe.let.set()
        self.apart.close()
        self.channel.close()
        if self.server._channel is not None:
            self.server._channel.close()
        self.listener.close()
        self.loop.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "m")
    yield made
    made.close()


def test_others_are_answered_while_the_kernel_is_read(bench: Bench) -> None:
    bench.channel.send(Ask(1, Kind.KERNEL, part=7))
    bench.channel.send(*[Ask(n, Kind.POSTURE) for n in range(2, 2 + MAX_WAITING)])
    bench.until(lambda: len(bench.answers()) == MAX_WAITING)
    assert 1 not in bench.answers()
    assert bench.probe is not None
    bench.probe.let.set()
    bench.until(lambda: 1 in bench.answers())
    (answer,) = [r for r in bench.records if r.seq == 1]
    assert [r.freeze for r in bench.records if r.seq == 2] == ["frozen"]
    assert answer.reading == Missing("part 7", absent=False)
    assert answer.cost_ns > 0


def test_the_probe_is_made_used_and_closed_in_one_thread(bench: Bench) -> None:
    bench.let = True
    for number in range(3):
        bench.channel.send(Ask(number, Kind.KERNEL, part=number))
    bench.until(lambda: bench.answers() == [0, 1, 2])
    bench.apart.close()
    bench.apart = Apart(bench.make)
    assert bench.probe is not None
    assert bench.probe.closed
    assert len(bench.probe.threads) == 1
    assert threading.get_ident() not in bench.probe.threads


def test_an_answer_for_a_connection_that_is_gone_is_not_given_to_the_next(bench: Bench) -> None:
    bench.channel.send(Ask(1, Kind.KERNEL))
    bench.until(lambda: bench.probe is not None)
    bench.channel.close()
    bench.channel = bench.connect()
    bench.until(lambda: bool(bench.records))
    bench.records.clear()
    bench.channel.send(Ask(1, Kind.KERNEL, part=5))
    bench.until(lambda: len(bench.server._kernel_asked) == 1)
    assert bench.probe is not None
    bench.probe.let.set()
    bench.until(lambda: bool(bench.answers()))
    assert [r.reading.reason for r in bench.records] == ["part 5"]


def test_a_defect_of_the_probe_ends_the_measurer(bench: Bench) -> None:
    bench.channel.send(Ask(1, Kind.KERNEL))
    bench.until(lambda: bench.probe is not None)
    assert bench.probe is not None
    bench.probe.error = ZeroDivisionError("defect")
    bench.probe.let.set()
    with pytest.raises(ZeroDivisionError):
        bench.until(lambda: bool(bench.answers()))


def test_a_thread_that_hangs_is_noticed_and_does_not_hold_up_the_end(bench: Bench) -> None:
    assert not bench.apart.stuck(time.monotonic() + 100, 60)
    bench.channel.send(Ask(1, Kind.KERNEL))
    bench.until(lambda: bench.apart._began > 0)
    assert not bench.apart.stuck(time.monotonic(), 60)
    assert bench.apart.stuck(time.monotonic() + 61, 60)
    began = time.monotonic()
    bench.apart.close(wait_s=0.05)
    assert time.monotonic() - began < 15
    assert bench.probe is not None
    bench.probe.let.set()


def test_files_are_identified_in_slices_and_asks_keep_most_of_the_time(bench: Bench) -> None:
    """Three owners' files of 0.2 s each; asks come at every moment and none waits long."""
    bench.channel.send(*[AskFile(10**9 + n, n) for n in range(3)])
    most, number = 0, 0
    while len([s for s in bench.answers() if s >= 10**9]) < 3:
        before = bench.measurer.registry.steps
        number += 1
        bench.channel.send(Ask(number, Kind.POSTURE))
        bench.channel.send(Ask(number + 100_000, Kind.POSTURE))
        bench.until(lambda wanted=number: wanted + 100_000 in bench.answers())  # type: ignore[misc]
        most = max(most, bench.measurer.registry.steps - before)
    assert most < 50
    assert bench.measurer.registry.steps == 300
    assert number > 50


def test_a_files_steps_do_not_wait_for_asks_to_end_nor_asks_for_files(bench: Bench) -> None:
    bench.channel.send(AskFile(1000, 1))
    bench.until(lambda: 1000 in bench.answers())
    assert bench.measurer.registry.steps == 100


def test_hints_go_to_who_is_connected_and_keeps_up(bench: Bench) -> None:
    bench.server.hint(KERNEL)
    bench.server.hint(process_of(VM))
    bench.until(lambda: len(bench.records) == 2)
    assert bench.records == [Hint(Kind.KERNEL), Hint(Kind.PROCESS, VM)]
    for _ in range(100_000):
        bench.server.hint(KERNEL)
    assert bench.server._channel is not None, "a vault that does not read is not cut off for hints"
    bench.channel.close()
    bench.channel = bench.connect()
    bench.until(lambda: any(isinstance(r, Hello) for r in bench.records))
