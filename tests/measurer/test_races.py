"""Processes that end, start and change while they are read."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from hostd.core.findings import Kind, Status
from hostd.core.readings import Missing, ProcessReading
from hostd.ipc.measuring import Ask, AskFile, AskWho
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.watched import Watched

pytestmark = pytest.mark.qemu


def test_killed_while_it_is_read(watched: Watched, binary: Path, vm: qemu.Vm) -> None:
    """At any moment of a reading: never a crash, never a finding, and never good once it is dead."""
    watched.approve()
    rng = random.Random(11)
    for _ in range(30):
        doomed = qemu.start(binary)
        watched.verdicts(doomed.uuid)
        delay = rng.uniform(0, 0.004)

        def kill(pid: int = doomed.pid, delay: float = delay) -> None:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        for _ in range(6):
            for verdict in watched.verdicts(doomed.uuid):
                assert not verdict.findings, verdict
        killer.join()
        doomed.process.wait()
        assert watched.verdicts(doomed.uuid)[3].status is Status.PENDING
        answer = watched.measurer.answer(Ask(0, Kind.PROCESS, doomed.uuid))
        assert isinstance(answer, Missing)
        assert not answer.absent
    watched.assert_good(vm.uuid)


def test_zombie_is_missing(watched: Watched, binary: Path) -> None:
    with qemu.running(binary) as vm:
        watched.approve()
        os.kill(vm.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert isinstance(watched.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid)), Missing)


def test_handle_does_not_slip_to_another_process(binary: Path) -> None:
    from hostd.platform.procfs import ProcessGoneError, ProcessHandle

    with qemu.running(binary) as vm:
        handle = ProcessHandle(vm.pid)
        assert handle.stat().start_time
    with pytest.raises(ProcessGoneError):
        handle.stat()
    with pytest.raises(ProcessGoneError):
        handle.open("maps")
    handle.close()


def test_exec_of_another_program(watched: Watched, binary: Path) -> None:
    """Same pid, same start time, another program: it is no hypervisor any more."""
    pid = os.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh", "-c", "sleep 60"])
    try:
        assert isinstance(watched.measurer.answer(AskWho(0, pid=pid)), Missing)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_who(watched: Watched, vm: qemu.Vm) -> None:
    answer = watched.measurer.answer(AskWho(0, pid=vm.pid))
    assert isinstance(answer, ProcessReading)
    assert answer.hypervisor.vm == vm.uuid
    assert answer.hypervisor.name == "tested"
    assert answer.hypervisor.accel == "tcg"
    for question in (AskWho(0), AskWho(0, cid=3, pid=vm.pid), AskWho(0, cid=77), AskWho(0, pid=os.getpid())):
        assert isinstance(watched.measurer.answer(question), Missing)


def test_a_uuid_claimed_twice_is_nobody(watched: Watched, binary: Path, vm: qemu.Vm) -> None:
    with qemu.running(binary, vm=vm.uuid):
        watched.measurer.answer(Ask(0, Kind.GUESTS))
        answer = watched.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid))
        assert isinstance(answer, Missing)
        assert "claimed twice" in answer.reason


def test_file_cut_short_while_it_is_read(watched: Watched, vm: qemu.Vm, tmp_path: Path) -> None:
    """By the process that mapped it, again and again: SIGBUS would end the measurer."""
    own = tmp_path / "own.so"
    size = 8 << 20
    own.write_bytes(os.urandom(size))
    os.chown(own, 65534, 65534)
    tamper.map_file(vm.pid, own)
    watched.approve()
    stop = time.monotonic() + 2
    cutter = os.fork()
    if cutter == 0:
        try:
            while time.monotonic() < stop:
                os.truncate(own, 4096)
                os.truncate(own, size)
        finally:
            os._exit(0)
    reader = os.fork()
    if reader == 0:
        code = 1
        try:
            while time.monotonic() < stop:
                watched.files()
                watched.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(cutter, 0)[1] == 0
    assert os.waitpid(reader, 0)[1] == 0


def test_numbers_are_not_reused_and_unused_files_go(
    watched: Watched, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hostd.measurer import files

    # Else the files of this very process, which counts as hostd's, are among them.
    monkeypatch.setattr(watched.measurer._self, "enroll", lambda: None)
    with qemu.running(binary):
        watched.approve()
        first = {segment.file for segment in watched.files().segments}
    watched.measurer.answer(Ask(0, Kind.GUESTS))
    assert watched.files().segments == ()
    # Kept for a while: the next VM finds them identified.
    with qemu.running(binary):
        watched.measurer.answer(Ask(0, Kind.GUESTS))
        assert {segment.file for segment in watched.files().segments} == first
    monkeypatch.setattr(files, "KEEP_S", 0.0)
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        watched.measurer.answer(Ask(0, Kind.GUESTS))
    assert len(os.listdir("/proc/self/fd")) <= open_before - len(first)
    assert isinstance(watched.measurer.answer(AskFile(0, min(first))), Missing)
    with qemu.running(binary):
        watched.measurer.answer(Ask(0, Kind.GUESTS))
        assert not {segment.file for segment in watched.files().segments} & first


def test_no_descriptors_leak(watched: Watched, binary: Path, vm: qemu.Vm) -> None:
    watched.approve()
    watched.assert_good(vm.uuid)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with qemu.running(binary) as other:
            watched.verdicts(other.uuid)
        watched.verdicts(other.uuid)
    assert len(os.listdir("/proc/self/fd")) == before
