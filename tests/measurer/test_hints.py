"""What happens becomes a hint, a storm of it costs little, and nothing is needed for going on."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hostd.core.findings import GUESTS, IMA, Component, domain_of, process_of, relro_of
from hostd.ipc.loop import Loop
from hostd.measurer import events, hints
from hostd.measurer.events import MAX_AT_ONCE, Event, EventsError, ProcessEvents, Turn, events_in
from hostd.measurer.hints import COALESCE_S, MAX_MARKED, PAUSE_S, Hints

REPO = Path(events.__file__).parents[2]
VM = "aaaaaaaa-0000-4000-8000-000000000001"


class Bench:
    """Hints with a loop in the test's hands."""

    def __init__(
        self,
        processes: Any = None,
        *,
        count: Path = Path("/nonexistent"),
        domains: Any = None,
        program: str = sys.executable,
    ) -> None:
        self.loop = Loop()
        self.sent: list[tuple[float, Component]] = []
        self.guests = SimpleNamespace(guests=())
        self.hints = Hints(
            self.loop,
            cast("Any", self.guests),
            (program,),
            lambda component: self.sent.append((time.monotonic(), component)),
            processes=processes,
            domains=domains,
            count_path=count,
        )

    def run(self, pid: int) -> None:
        self.guests.guests = (SimpleNamespace(hypervisor=SimpleNamespace(pid=pid, vm=VM)),)

    def until(self, condition: Callable[[], bool], within_s: float = 30.0) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            self.loop.run_once(0.01)

    def turn(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.loop.run_once(0.01)

    @property
    def components(self) -> set[Component]:
        return {component for _, component in self.sent}


@pytest.fixture
def processes() -> Iterator[ProcessEvents]:
    try:
        made = ProcessEvents()
    except EventsError as error:
        pytest.skip(f"no proc connector here: {error}")
    yield made
    made.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a hypervisor, and executes another program when it is told to."""
    code = "import os,sys; sys.stdin.readline(); os.execv('/bin/sleep', ['sleep', '60'])"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    time.sleep(0.3)
    yield child
    child.kill()
    child.wait()
    assert child.stdin is not None
    child.stdin.close()


# ── Process events, for real ──────────────────────────────────────────────────────────────────────


def test_an_exec_of_a_hypervisor_is_a_hint(
    processes: ProcessEvents, sleeper: subprocess.Popen[bytes]
) -> None:
    bench = Bench(processes)
    bench.run(sleeper.pid)
    assert sleeper.stdin is not None
    sleeper.stdin.write(b"go\n")
    sleeper.stdin.flush()
    bench.until(lambda: {process_of(VM), relro_of(VM), GUESTS} <= bench.components)


def test_the_end_of_a_hypervisor_is_a_hint(
    processes: ProcessEvents, sleeper: subprocess.Popen[bytes]
) -> None:
    bench = Bench(processes)
    bench.run(sleeper.pid)
    sleeper.kill()
    bench.until(lambda: GUESTS in bench.components)


def test_a_tracer_is_a_hint(processes: ProcessEvents, sleeper: subprocess.Popen[bytes]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    bench = Bench(processes)
    bench.run(sleeper.pid)
    if libc.ptrace(16, sleeper.pid, None, None):  # PTRACE_ATTACH
        pytest.skip("tracing is forbidden here")
    os.waitpid(sleeper.pid, 0)
    libc.ptrace(17, sleeper.pid, None, None)
    bench.until(lambda: {process_of(VM), relro_of(VM)} <= bench.components)


def test_a_start_of_a_configured_program_is_a_hint_and_of_another_is_none(
    processes: ProcessEvents, tmp_path: Path
) -> None:
    program = shutil.copy("/bin/sleep", tmp_path / "hypervisor")  # which nobody else starts meanwhile
    bench = Bench(processes, program=str(program))
    subprocess.run(["/bin/true"], check=True)
    bench.turn(0.2)
    assert GUESTS not in bench.components
    child = subprocess.Popen([program, "5"])
    bench.until(lambda: GUESTS in bench.components)
    child.send_signal(signal.SIGKILL)
    child.wait()


def counted(processes: ProcessEvents, monkeypatch: pytest.MonkeyPatch) -> list[Turn]:
    """What its turns of reading give from now on."""
    turns: list[Turn] = []
    read = processes.read

    def reading() -> Turn:
        turns.append(read())
        return turns[-1]

    monkeypatch.setattr(processes, "read", reading)
    return turns


def test_a_fork_storm_costs_a_bounded_share(
    processes: ProcessEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of processes a second: so many events at once, and then a pause."""
    storm = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os\nwhile True:\n p=os.fork()\n if not p: os._exit(0)\n os.waitpid(p,0)",
        ]
    )
    try:
        bench = Bench(processes)
        time.sleep(0.5)
        turns = counted(processes, monkeypatch)
        began = time.monotonic()
        bench.until(lambda: sum(turn.more for turn in turns) > 20, within_s=30)
        took = time.monotonic() - began
    finally:
        storm.kill()
        storm.wait()
    print(f"fork storm: {len(turns)} turns in {took:.2f} s")
    assert all(len(turn.events) <= MAX_AT_ONCE for turn in turns)
    # After each full turn comes its pause.
    assert sum(turn.more for turn in turns) <= took / PAUSE_S + 1
    # And it is heard again when the storm is over.
    bench.sent.clear()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(5)"])
    bench.until(lambda: GUESTS in bench.components)
    child.kill()
    child.wait()


# ── Scripted ──────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """Process events that the test makes up."""

    def __init__(self) -> None:
        self.event = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.turns: list[Turn | OSError] = []
        self.reads: list[float] = []

    def fileno(self) -> int:
        return self.event

    def read(self) -> Turn:
        self.reads.append(time.monotonic())
        turn = self.turns.pop(0) if self.turns else Turn([], lost=False, more=False)
        if isinstance(turn, OSError):
            raise turn
        return turn

    def close(self) -> None:
        os.close(self.event)


def test_full_turns_are_followed_by_a_pause() -> None:
    scripted = Scripted()
    scripted.turns = [Turn([Event("exec", 1)] * MAX_AT_ONCE, lost=True, more=True)] * 1000
    bench = Bench(scripted)
    began = time.monotonic()
    bench.until(lambda: len(scripted.reads) >= 20)
    assert time.monotonic() - began >= 19 * PAUSE_S
    assert GUESTS in bench.components


def test_what_was_lost_is_looked_for_when_all_that_is_there_was_taken() -> None:
    scripted = Scripted()
    full = Turn([Event("fork", 1)] * MAX_AT_ONCE, lost=False, more=True)
    scripted.turns = [full._replace(lost=True), *[full] * 10]
    bench = Bench(scripted)
    bench.until(lambda: bench.components == {GUESTS})
    bench.until(lambda: len(scripted.reads) >= 5)
    bench.sent.clear()
    bench.until(lambda: not scripted.turns)
    bench.until(lambda: bench.components == {GUESTS})
    bench.sent.clear()
    bench.turn(0.1)
    assert bench.sent == []


def test_a_source_that_fails_is_given_up_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    scripted = Scripted()
    scripted.turns = [OSError(5, "Input/output error")]
    bench = Bench(scripted)
    bench.turn(0.05)
    assert len(scripted.reads) == 1
    assert "no process events any more" in capsys.readouterr().err


def test_without_the_connector_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise EventsError("Operation not permitted")

    monkeypatch.setattr(hints, "ProcessEvents", refused)
    assert hints.process_events() is None
    assert capsys.readouterr().err.count("no process events") == 1


def test_hints_are_coalesced_and_bounded() -> None:
    bench = Bench()
    for _ in range(1000):
        bench.hints.mark(IMA)
    for number in range(2 * MAX_MARKED):
        bench.hints.mark(process_of(f"{number}"))
    assert bench.sent == []
    bench.until(lambda: bool(bench.sent))
    assert len(bench.sent) == MAX_MARKED
    bench.hints.mark(IMA)
    bench.until(lambda: len(bench.sent) == MAX_MARKED + 1)
    assert bench.sent[-1][0] - bench.sent[0][0] >= COALESCE_S


def test_the_count_of_the_ima_log(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("7\n")
    bench = Bench(count=count)
    bench.turn(0.3)
    assert bench.sent == []
    count.write_text("8\n")
    bench.until(lambda: bench.components == {IMA})
    bench.sent.clear()
    count.write_text("rubbish")
    bench.turn(0.3)
    assert bench.sent == []
    bench.hints.close()


def test_domain_events() -> None:
    class Domains(Scripted):
        def take(self) -> list[str]:
            os.eventfd_read(self.event)
            return [VM, ""]

    bench = Bench(domains=Domains())
    bench.until(lambda: bench.components == {GUESTS, domain_of(VM)})


MESSAGES: list[tuple[dict[str, object], list[Event]]] = [
    ({"event": "PROC_EVENT_EXEC", "process_pid": 7, "process_tgid": 7}, [Event("exec", 7)]),
    ({"event": "PROC_EVENT_EXIT", "process_pid": 7, "process_tgid": 7}, [Event("exit", 7)]),
    ({"event": "PROC_EVENT_EXIT", "process_pid": 8, "process_tgid": 7}, []),
    (
        {"event": "PROC_EVENT_PTRACE", "process_pid": 8, "process_tgid": 7, "tracer_pid": 1},
        [Event("ptrace", 7)],
    ),
    ({"event": "PROC_EVENT_FORK", "parent_pid": 7, "parent_tgid": 7, "child_tgid": 7}, []),
    ({"event": "PROC_EVENT_FORK", "parent_pid": 7, "parent_tgid": 7, "child_tgid": 9}, [Event("fork", 7)]),
    ({"event": "PROC_EVENT_COMM", "process_pid": 7, "process_tgid": 7}, []),
    ({"event": "UNDEFINED"}, []),
    ({"event": "PROC_EVENT_EXEC"}, []),
    ({}, []),
]


@pytest.mark.parametrize(("message", "expected"), MESSAGES, ids=str)
def test_which_events_matter(message: dict[str, object], expected: list[Event]) -> None:
    assert list(events_in([message])) == expected


def test_pyroute2_missing_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyroute2.netlink.connector.cn_proc", None)
    with pytest.raises(EventsError, match="pyroute2"):
        events.ProcessEvents()


def test_of_pyroute2_only_the_connector_is_loaded() -> None:
    code = (
        "import sys\n"
        "from hostd.measurer.events import EventsError, ProcessEvents\n"
        "try:\n    ProcessEvents()\nexcept EventsError:\n    pass\n"
        "print(*(name for name in sys.modules if name.startswith('pyroute2.')), 'sqlite3' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    *loaded, database = run.stdout.split()
    assert "pyroute2.netlink.connector.cn_proc" in loaded
    assert not {"pyroute2.ndb", "pyroute2.iproute", "pyroute2.ipdb"}.intersection(loaded)
    assert database == "False"


def test_a_pyroute2_that_needs_its_own_init_is_loaded_whole(tmp_path: Path) -> None:
    package = tmp_path / "pyroute2/netlink/connector"
    package.mkdir(parents=True)
    (tmp_path / "pyroute2/__init__.py").write_text("needed = 1\n")
    (tmp_path / "pyroute2/netlink/__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "cn_proc.py").write_text("from pyroute2 import needed\n")
    code = "from hostd.measurer import events\nprint(events._connector().needed)\n"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    assert run.stdout == "1\n"
