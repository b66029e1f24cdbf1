"""hostd's own processes, for real: this interpreter and children of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostd.core.appraise_files import FileBook
from hostd.core.appraise_self import SelfJudge
from hostd.core.findings import SELF, Status, Verdict
from hostd.core.manifest import approve_next, new_document, retire
from hostd.core.reading_self import SelfReading
from hostd.core.reference import FORMAT, Reference
from hostd.measurer.contents import ContentsProbe
from hostd.measurer.files import Registry
from hostd.measurer.itself import LOOK_S, SelfProbe
from hostd.measurer.lane import Lane
from hostd.measurer.own_files import OwnFiles
from hostd.measurer.process import ProcessProbe
from hostd.measurer.roles import GRACE_S, ROLES, START_S, OwnProcesses, _groups, _starters
from hostd.measurer.tags import Tagger
from hostd.platform.pages import OwnPages

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for page frames")

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"


class Bench:
    """A probe of whatever stands in the control groups of a made-up tree: a child as the measurer at first.
    (This process may have loaded libraries that compile regular expressions, which units may not.)"""

    def __init__(self, folder: Path) -> None:
        self.groups = folder / "cgroup"
        for role in ROLES:
            (self.groups / f"hostd-{role}.service").mkdir(parents=True)
        self.measurer = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
        assert self.measurer.stdout is not None
        assert self.measurer.stdout.readline() == b"up\n"
        self.put("measurer", self.measurer.pid)
        self.root = folder / "opt"
        self.root.mkdir()
        (self.root / "a.py").write_bytes(b"pass\n")
        tagger, self.now = Tagger(), 100.0
        self.registry = Registry(tagger)
        self.lane = Lane()
        pages = OwnPages()
        self.processes = ProcessProbe(self.registry, tagger, pages, self.lane)
        self.contents = ContentsProbe(self.registry, tagger, pages, self.lane)
        self.own = OwnProcesses(lambda: self.now)
        found = _groups(b"0::/hostd-measurer.service\n", self.groups)
        assert found is not None
        self.own._groups = found
        roots = (f"{self.root}/",)
        self.probe = SelfProbe(
            self.registry, self.processes, own=self.own, files=OwnFiles(roots, [], []), roots=roots
        )

    def put(self, role: str, *pids: int) -> None:
        text = "".join(f"{pid}\n" for pid in pids)
        (self.groups / f"hostd-{role}.service/cgroup.procs").write_text(text)

    def read(self) -> SelfReading:
        time.sleep(LOOK_S)
        return self.probe.read()

    def close(self) -> None:
        self.measurer.kill()
        self.measurer.wait()
        assert self.measurer.stdout is not None
        self.measurer.stdout.close()
        self.probe.close()
        self.registry.close()
        self.lane.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*argv: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(argv or (sys.executable, "-c", SLEEPER), stdout=subprocess.PIPE)
        started.append(process)
        if not argv:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def judged(bench: Bench, judge: SelfJudge, files: FileBook, reference: Reference) -> Verdict:
    files.appraise(bench.contents.read(), reference, processes=0)
    return judge.appraise(SELF, bench.read(), reference, files)


def approve(bench: Bench, files: FileBook) -> Reference:
    """Reference values of everything that is there, and the identity of each file that is mapped."""
    approved = {f"{bench.root}/a.py": (OwnFiles([f"{bench.root}/"], [], []).read().files[0].sha256.hex(),)}
    bench.probe.enroll()
    for item in bench.registry.wanted():
        identity = bench.registry.identify(item.file)
        files.learn(item.file, identity)
        approved[identity.path] = (identity.sha256.hex(),)
    return Reference(format=FORMAT, version=1, created=0, host="h", files=approved)


def test_this_process_and_a_child_are_good_until_they_are_not(
    bench: Bench, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    role = child()
    bench.put("vault", role.pid)
    files, judge = FileBook(), SelfJudge()
    reference = approve(bench, files)
    verdicts = [judged(bench, judge, files, reference) for _ in range(4)]
    assert [verdict.findings for verdict in verdicts] == [()] * 4
    assert verdicts[-1].status is Status.VERIFIED
    assert dict(verdicts[-1].claims)["processes"] == "measurer 1, vault 1, gateway 0, metrics 0"
    assert bench.registry.claimed((role.pid, _start_time(role.pid)))
    _poke(role.pid)
    found = [judged(bench, judge, files, reference).findings for _ in range(2)]
    (altered,) = [item for findings in found for item in findings]
    assert altered.code == "code-altered"
    assert altered.subject.startswith(f"pid {role.pid} (hostd vault): ")
    assert altered.component == "self"


def test_a_changed_source_is_named(bench: Bench) -> None:
    files, judge = FileBook(), SelfJudge()
    reference = approve(bench, files)
    judged(bench, judge, files, reference)
    assert judged(bench, judge, files, reference).status is Status.VERIFIED
    (bench.root / "a.py").write_bytes(b"evil\n")
    (bench.root / "sitecustomize.py").write_bytes(b"evil\n")
    findings = [f for _ in range(3) for f in judged(bench, judge, files, reference).findings]
    assert {(f.code, f.subject) for f in findings} == {
        ("self-file-altered", f"{bench.root}/a.py"),
        ("self-file-unknown", f"{bench.root}/sitecustomize.py"),
    }


def test_a_removed_source_is_missed_unless_that_was_approved(bench: Bench) -> None:
    files, judge = FileBook(), SelfJudge()
    path = bench.root / "b.py"
    path.write_bytes(b"old\n")
    found = approve(bench, files)
    digests = {**found.files, str(path): (hashlib.sha256(b"old\n").hexdigest(),)}
    before = new_document(created=1, host="h", base=None, files=digests)
    approved = approve_next(before, {}, created=2, removals=[str(path)])

    def rounds(reference: Reference) -> list[Verdict]:
        return [judged(bench, judge, files, reference) for _ in range(3)]

    for reference in (before, approved):
        assert rounds(reference)[-1].status is Status.VERIFIED
    path.unlink()
    for reference in (approved, retire(approved, created=3)):
        verdicts = rounds(reference)
        assert [verdict.findings for verdict in verdicts] == [()] * 3
        assert verdicts[-1].status is Status.VERIFIED
    missed = {(f.code, f.subject) for verdict in rounds(before) for f in verdict.findings}
    assert missed == {("self-file-missing", str(path))}


def test_roles_restart_and_workers_come_and_go(
    bench: Bench, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    files, judge = FileBook(), SelfJudge()
    reference = approve(bench, files)
    for _ in range(6):
        workers = [child() for _ in range(3)]
        bench.put("gateway", *(worker.pid for worker in workers))
        for number in range(4):
            verdict = judged(bench, judge, files, reference)
            assert verdict.status is not Status.DRIFTED
            if number == 1:
                for worker in workers:
                    worker.kill()
        bench.put("gateway")
    assert bench.read().roles[2] == ("gateway", 0)
    assert len(bench.probe.alive()) == 1


def test_a_stranger_is_named_after_its_grace(
    bench: Bench, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    sleep = child("/bin/sleep", "600")
    bench.put("vault", sleep.pid)
    assert bench.read().strangers == ()
    bench.now += GRACE_S
    executable = os.path.realpath("/bin/sleep")
    assert bench.read().strangers == (f"pid {sleep.pid} ({executable}) in hostd's vault",)
    assert bench.read().roles[1] == ("vault", 0)
    bench.put("vault")
    assert bench.read().strangers == ()


def test_systemds_own_child_has_until_its_unit_should_have_started(
    bench: Bench, child: Callable[..., subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = child("/bin/sleep", "600")
    monkeypatch.setattr(bench.own, "_starters", frozenset({os.path.realpath("/bin/sleep")}))
    bench.put("vault", sleep.pid)
    for seconds in (0.0, GRACE_S, START_S - GRACE_S - 0.1):
        bench.now += seconds
        assert bench.read().strangers == ()
    bench.now += 0.2
    assert len(bench.read().strangers) == 1


def test_what_process_1_runs_starts_units(tmp_path: Path) -> None:
    first = tmp_path / "exe"
    first.symlink_to("/usr/lib/systemd/systemd (deleted)")
    assert _starters(first) == {"/usr/lib/systemd/systemd", "/usr/lib/systemd/systemd-executor"}
    assert _starters(tmp_path / "hidden") == frozenset()


def test_a_role_that_executes_another_program_becomes_a_stranger(
    bench: Bench, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    role = child(sys.executable, "-c", "import os, time; time.sleep(1); os.execv('/bin/sleep', ['s', '60'])")
    time.sleep(0.3)
    bench.put("vault", role.pid)
    assert bench.read().roles[1] == ("vault", 1)
    deadline = time.monotonic() + 20
    while bench.read().roles[1] != ("vault", 0):
        assert time.monotonic() < deadline
    bench.now += GRACE_S
    assert len(bench.read().strangers) == 1


@pytest.mark.parametrize(
    ("cgroup", "above"),
    [
        (b"0::/system.slice/hostd-measurer.service\n", "system.slice"),
        (b"1:name=x:/y\n0::/system.slice/hostd-measurer.service\n", "unified/system.slice"),
        (b"0::/user.slice/user-0.slice\n", None),
        (b"0::/system.slice/hostd-measurer.service/below\n", None),
        (b"", None),
    ],
)
def test_control_groups(tmp_path: Path, cgroup: bytes, above: str | None) -> None:
    if above is not None:
        for role in ROLES:
            (tmp_path / above / f"hostd-{role}.service").mkdir(parents=True)
            (tmp_path / above / f"hostd-{role}.service/cgroup.procs").write_text("")
    found = _groups(cgroup, tmp_path)
    expected = {role: tmp_path / str(above) / f"hostd-{role}.service/cgroup.procs" for role in ROLES}
    assert found == (None if above is None else expected)


def test_without_systemd_and_supervisor_there_is_this_process_alone() -> None:
    own = OwnProcesses(time.monotonic)
    ours, strangers = own.look()
    own.close()
    assert ("measurer", os.getpid()) in [(item.role, item.key[0]) for item in ours]
    assert strangers == []
    assert own.manager == "supervisor"


def _start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


def _poke(pid: int) -> None:
    """Writes a byte of the interpreter's code through /proc/PID/mem, the same byte that was there."""
    executable = os.path.realpath(sys.executable)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "r-xp" in line and line.endswith(executable):
            address = int(line.partition("-")[0], 16) + 4096
            with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
                memory.seek(address)
                byte = memory.read(1)
                memory.seek(address)
                memory.write(byte)
            return
    raise AssertionError(executable)
