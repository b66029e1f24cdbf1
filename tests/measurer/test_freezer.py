"""The freezer's care: what it freezes, that it thaws, and what it leaves alone. For real: tests/lab."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hostd.core.findings import Kind
from hostd.ipc.measuring import Ask
from hostd.measurer import freezer as module
from hostd.measurer.freezer import NOTE, Freezer, scope_of, thaw_left
from hostd.measurer.probes import Measurer
from hostd.platform.procfs import ProcessGoneError

SCOPE = "machine.slice/machine-qemu\\x2d1\\x2dweb.scope"
CGROUP = f"0::/{SCOPE}/libvirt/emulator\n".encode()


class Handle:
    """A process of two threads that stand still at the third look."""

    def __init__(self, cgroup: bytes = CGROUP, *, looks: int = 3) -> None:
        self.cgroup = cgroup
        self.looks = looks

    def read(self, name: str, _limit: int) -> bytes:
        if name == "cgroup":
            return self.cgroup
        self.looks -= 1
        return b"get_signal" if self.looks < 0 else b"ep_poll"

    def list(self, _name: str) -> list[str]:
        return ["1", "2"]


class Bench:
    def __init__(self, tmp: Path) -> None:
        self.root, self.run = tmp / "cgroup", tmp / "run"
        self.run.mkdir()
        self.switch = self.root / SCOPE / "cgroup.freeze"
        self.switch.parent.mkdir(parents=True)
        self.switch.write_text("0\n")
        self.note = self.run / NOTE
        self.freezer = Freezer("always", self.run, root=self.root)

    def still(self, handle: Handle | None = None) -> Any:
        return self.freezer.still(cast("Any", handle or Handle()))

    @property
    def state(self) -> str:
        return self.switch.read_text().strip()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_frozen_while_it_is_read_and_not_after(bench: Bench) -> None:
    with bench.still() as how:
        assert how == "frozen"
        assert bench.state == "1"
        assert bench.note.read_text() == SCOPE
    assert bench.state == "0"
    assert not bench.note.exists()


def test_thawed_whatever_the_reading_raises(bench: Bench) -> None:
    with pytest.raises(ProcessGoneError), bench.still():
        raise ProcessGoneError("gone")
    assert bench.state == "0"
    assert not bench.note.exists()


def test_what_its_operator_has_frozen_stays_frozen(bench: Bench) -> None:
    bench.switch.write_text("1\n")
    with bench.still() as how:
        assert how == "frozen by others"
        assert not bench.note.exists()
    assert bench.state == "1"


def test_what_does_not_stop_is_read_all_the_same_and_said(bench: Bench) -> None:
    with bench.still(Handle(looks=10**9)) as how:
        assert how == "not frozen in time"
    assert bench.state == "0"


def test_noted_before_it_is_frozen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    real = Path.write_text

    def write(path: Path, text: str, *a: Any, **k: Any) -> int:
        if path == bench.switch:
            seen.append((text, bench.note.exists()))
        return real(path, text, *a, **k)

    monkeypatch.setattr(Path, "write_text", write)
    with bench.still():
        pass
    assert seen == [("1", True), ("0", True)]


def test_killed_in_the_middle_and_thawed_by_the_next(bench: Bench) -> None:
    child = os.fork()
    if child == 0:
        with bench.still():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert bench.state == "1"
    assert thaw_left(bench.run, root=bench.root) == SCOPE
    assert bench.state == "0"
    assert thaw_left(bench.run, root=bench.root) == ""


def test_a_vm_that_ended_meanwhile_is_no_trouble(bench: Bench) -> None:
    with bench.still():
        bench.switch.unlink()
        bench.switch.parent.rmdir()
    assert not bench.note.exists()
    bench.note.write_text(SCOPE)
    assert thaw_left(bench.run, root=bench.root) == SCOPE
    assert not bench.note.exists()


def test_a_scope_that_may_not_be_written(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.switch.unlink()
    bench.switch.symlink_to("/dev/full")
    # Reading /dev/full gives zeros, so the state is not "0" either; make it readable and unwritable.
    bench.switch.unlink()
    bench.switch.write_text("0")
    real = Path.write_text

    def write(path: Path, text: str, *a: Any, **k: Any) -> int:
        if path == bench.switch:
            raise OSError(30, "Read-only file system")
        return real(path, text, *a, **k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", write)
        for _ in range(3):
            with bench.still() as how:
                assert how == "not frozen: Read-only file system"
    assert capsys.readouterr().err.count("cannot freeze") == 1


GOOD = [
    (b"0::/machine.slice/machine-qemu\\x2d3\\x2da.scope", "/machine.slice/machine-qemu\\x2d3\\x2da.scope"),
    (
        b"1:name=systemd:/x\n0::/machine.slice/machine-qemu\\x2d3\\x2da.scope/libvirt/vcpu0\n",
        "/machine.slice/machine-qemu\\x2d3\\x2da.scope",
    ),
    (
        b"0::/machine.slice/machine-a.slice/machine-qemu-1-b.scope/libvirt",
        "/machine.slice/machine-a.slice/machine-qemu-1-b.scope",
    ),
]
BAD = [
    b"",
    b"0::/",
    b"0::/system.slice/hostd-measurer.service",
    b"0::/machine.slice",
    b"0::/machine.slice/x.service/machine-qemu-1.scope",
    b"0::/machine.slice/machine-lxc-1.scope",
    b"0::/machine.slice/machine-qemu-1.scopeX",
    b"0::/machine.slice/machine-qemu-1.scope/../../system.slice",
    b"0::/user.slice/machine.slice/machine-qemu-1.scope",
    b"1::/machine.slice/machine-qemu-1.scope",
    b"\xff\xff",
]


@pytest.mark.parametrize(("cgroup", "scope"), GOOD)
def test_the_scope_of_a_machine(cgroup: bytes, scope: str) -> None:
    assert scope_of(cgroup) == scope


@pytest.mark.parametrize("cgroup", BAD)
def test_nothing_but_a_machines_scope_is_ever_frozen(bench: Bench, cgroup: bytes) -> None:
    with pytest.raises(ValueError, match="no machine's scope"):
        scope_of(cgroup)
    with bench.still(Handle(cgroup)) as how:
        assert how == "not frozen: in no machine's scope"
    assert bench.state == "0"


@pytest.mark.parametrize("text", ["../../etc", "/etc", "system.slice/x.scope", "", "machine.slice/\0.scope"])
def test_a_note_that_names_something_else_thaws_nothing(bench: Bench, text: str) -> None:
    bench.note.write_text(text)
    assert thaw_left(bench.run, root=bench.root) == ""
    assert not bench.note.exists()


def test_a_link_in_the_notes_place_is_not_followed(bench: Bench, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    bench.note.symlink_to(target)
    assert thaw_left(bench.run, root=bench.root) == ""
    with bench.still() as how:
        assert how == "frozen"
    assert target.read_text() == "precious"


def test_another_users_note_is_not_believed(bench: Bench) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    bench.switch.write_text("1")
    bench.note.write_text(SCOPE)
    os.chown(bench.note, 65534, 65534)
    assert thaw_left(bench.run, root=bench.root) == ""
    assert bench.state == "1"


@pytest.mark.parametrize(
    ("mode", "altered", "frozen"),
    [
        ("never", 1, []),
        ("on-suspicion", 0, [False]),
        ("on-suspicion", 1, [False, True]),
        ("always", 0, [True]),
    ],
)
def test_when_it_is_frozen(bench: Bench, mode: Any, altered: int, frozen: list[bool]) -> None:
    bench.freezer.mode = mode
    measurer = Measurer.__new__(Measurer)
    measurer._freezer, measurer.freeze = bench.freezer, ""
    guest = SimpleNamespace(found=SimpleNamespace(handle=Handle()))
    measurer._named = lambda **_: guest  # type: ignore[method-assign, assignment, return-value]
    seen: list[bool] = []

    def read(*_: Any) -> Any:
        seen.append(bench.state == "1")
        return SimpleNamespace(altered_total=altered)

    measurer._read_process = read  # type: ignore[method-assign]
    measurer.answer(Ask(0, Kind.PROCESS, "vm"))
    assert seen == (frozen or [False])
    assert measurer.freeze == ("frozen" if True in frozen else "")
    assert bench.state == "0"


def test_the_wait_is_bounded() -> None:
    assert module.WAIT_S <= 0.01
