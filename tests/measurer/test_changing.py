"""A process that changes while it is read: maps, unmaps, protects, executes itself, ends. No reading raises,
and none that lies wholly inside a time when something bad was mapped is good."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostd.core.findings import FILES, Kind, Status, process_of
from hostd.core.readings import EXEC, Missing, ProcessReading
from hostd.ipc.measuring import Ask
from hostd.measurer import process
from hostd.measurer.process import ProcessProbe
from hostd.platform import pages
from hostd.platform.vmas import MapsReader
from tests.support import qemu, tamper
from tests.support.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.qemu
SECONDS = 6.0

CHANGING = """
import ctypes, mmap, os, random, sys, time
seed, board_fd, unknown, known = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
board = mmap.mmap(board_fd, 4096)
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
rng = random.Random(seed << 32 | int.from_bytes(board[:8], "little"))
PRIVATE, ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS
def text():
    for line in open("/proc/self/maps"):
        if "libm" in line and " r-xp " in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            return start, end - start
code = text()
# An even count: nothing bad is mapped. An odd one: something is, from before the count moved until after.
def move():
    board[:8] = (int.from_bytes(board[:8], "little") + 1).to_bytes(8, "little")
def anonymous():
    area = mmap.mmap(-1, 8192, flags=PRIVATE | ANONYMOUS, prot=rng.choice((4, 5, 7)))
    return area.close
def stranger():
    with open(unknown, "rb") as file:
        area = mmap.mmap(file.fileno(), 4096, flags=PRIVATE, prot=5)
    return area.close
def writable():
    assert libc.mprotect(*code, 7) == 0
    return lambda: libc.mprotect(*code, 5)
def harmless():
    with open(known, "rb") as file:
        areas = [mmap.mmap(file.fileno(), 4096, flags=PRIVATE, prot=1) for _ in range(3)]
    areas.append(mmap.mmap(-1, 1 << 20))
    for area in areas:
        area.close()
board[8] = 1
while True:
    for _ in range(rng.randrange(20)):
        harmless()
    undo = rng.choice((anonymous, stranger, writable))()
    move()
    time.sleep(rng.uniform(0, 0.004))
    move()
    undo()
    time.sleep(rng.uniform(0, 0.002))
    match rng.randrange(60):
        case 0:
            os.execv(sys.executable, sys.orig_argv)
        case 1:
            os._exit(0)
"""


class Changing:
    """One such process, started again whenever it ends."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.uuid = str(uuid.uuid4())
        self._binary = binary
        self._script = directory / "changing.py"
        self._script.write_text(CHANGING)
        self._unknown = directory / "unknown.so"
        self._unknown.write_bytes(os.urandom(4096))
        self._board_fd = os.memfd_create("board", 0)
        os.ftruncate(self._board_fd, 4096)
        self._board = mmap.mmap(self._board_fd, 4096)
        self._seed = 0
        self.starts = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._seed += 1
        self.starts += 1
        count = int.from_bytes(self._board[:8], "little")
        self._board[:8] = (count + count % 2).to_bytes(8, "little")
        self._board[8] = 0
        known = os.path.realpath("/usr/lib/x86_64-linux-gnu/libm.so.6")
        arguments = [str(self._seed), str(self._board_fd), str(self._unknown), known, "-uuid", self.uuid]
        # -I -S: nothing but the standard library's own files.
        return subprocess.Popen(
            [str(self._binary), "-I", "-S", str(self._script), *arguments], pass_fds=[self._board_fd]
        )

    def again(self) -> None:
        if self.process.poll() is not None:
            self.process = self._start()

    def count(self) -> int:
        return int.from_bytes(self._board[:8], "little")

    def settled(self) -> bool:
        return bool(self._board[8])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._board_fd)


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Changing]:
    binary = tmp_path / "changing-python"
    shutil.copy(os.path.realpath("/usr/bin/python3"), binary)
    process = Changing(binary, tmp_path)
    yield process
    process.close()


@pytest.mark.parametrize("query", [True, False])
def test_readings_of_a_process_that_changes(changing: Changing, tmp_path: Path, query: bool) -> None:
    if query and not MapsReader().query:
        pytest.skip("this kernel has no PROCMAP_QUERY")
    watched = Watched(tmp_path / "changing-python", allow_jit=False)
    watched.measurer.processes._maps = MapsReader(query=query)
    try:
        _approve(watched, changing)
        good = bad = gone = 0
        until = time.monotonic() + SECONDS
        component = process_of(changing.uuid)
        while time.monotonic() < until:
            changing.again()
            watched.measurer.answer(Ask(0, Kind.GUESTS))
            watched.appraiser.appraise(FILES, watched.files())
            before = changing.count()
            reading = watched.measurer.answer(Ask(0, Kind.PROCESS, changing.uuid))
            after = changing.count()
            verdict = watched.appraiser.appraise(component, reading)
            for number in verdict.identify:
                answer = watched.measurer.answer(Ask(0, Kind.FILES))
                watched.appraiser.learn(number, watched.measurer._identify(number))
                watched.appraiser.appraise(FILES, answer)
            if isinstance(reading, Missing):
                gone += 1
            elif before == after and before % 2:
                bad += 1
                assert verdict.status is not Status.VERIFIED, (reading, verdict)
            elif verdict.status is Status.VERIFIED:
                good += 1
        print(f"{good} good, {bad} inside something bad, {gone} gone, {changing.starts} starts")
        assert good > 20
        assert bad > 20
        assert changing.starts > 1
    finally:
        watched.close()


def _approve(watched: Watched, changing: Changing) -> None:
    """While something bad may be mapped: of what the process maps, the stranger's file is left out."""
    for _ in range(400):
        changing.again()
        if changing.settled():
            try:
                watched.approve("unknown.so")
            except (AssertionError, OSError):
                pass
            else:
                if any("libm" in path for path in watched.appraiser.reference.files):
                    return
        time.sleep(0.005)
    raise AssertionError("it never held still")


def test_both_ways_give_the_same_reading(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    measurer = watched.measurer
    if not MapsReader().query:
        pytest.skip("this kernel has no PROCMAP_QUERY")
    (guest,) = measurer.guests.guests
    known = measurer.processes
    readings = []
    for query in (True, False):
        probe = ProcessProbe(
            measurer.registry,
            known._tagger,
            known._own_pages,
            known._lane,
            maps=MapsReader(query=query),
        )
        for _ in range(2):
            readings.append(probe.read(guest.hypervisor, guest.found.handle))
    assert all(reading == readings[0] for reading in readings)
    assert len(readings[0].mappings) > 100


def test_a_renamed_binary_keeps_its_machine_good(watched: Watched, binary: Path, tmp_path: Path) -> None:
    """Names are not compared in every reading, but that of the executable is."""
    other = tmp_path / binary.name
    shutil.copy(binary, other)
    mine = Watched(other)
    try:
        with qemu.running(other) as vm:
            mine.approve()
            mine.assert_good(vm.uuid)
            shutil.copy(other, tmp_path / "new")
            (tmp_path / "new").rename(other)
            for _ in range(3):
                mine.assert_good(vm.uuid)
            reading = mine.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid))
            assert isinstance(reading, ProcessReading)
            assert any(mapping.name == f"{other} (deleted)" for mapping in reading.mappings)
    finally:
        mine.close()


def test_pressure_is_innocent(watched: Watched, binary: Path, vm: qemu.Vm) -> None:
    """Pages that migrate, are reclaimed, dropped from the cache, or taken out of our own table and theirs,
    while readings run: never a finding."""
    watched.approve()
    stop = threading.Event()
    rng = random.Random(3)
    registry = watched.measurer.registry
    owns = [file.own for number in range(1, 200) if (file := registry.get(number)) and file.own]
    done = 0

    def press() -> None:
        nonlocal done
        texts = [vma for vma in tamper.maps(vm.pid) if vma.protection in (1, 4, 5) and vma.inode]
        pidfd = os.pidfd_open(vm.pid)
        while not stop.is_set():
            match rng.randrange(30):
                case 0:
                    _write("/proc/sys/vm/compact_memory", "1")
                case 1:
                    _write("/proc/sys/vm/drop_caches", "1")
                case 2 | 3 | 4 | 5 | 6:
                    own = rng.choice(owns)
                    pages._libc.madvise(own.address, own.length, rng.choice((4, 20, 21)))
                case _:
                    vma = rng.choice(texts)
                    tamper.process_madvise(pidfd, vma.start, vma.end - vma.start, rng.choice((20, 21)))
            done += 1
            time.sleep(0.001)
        os.close(pidfd)

    presser = threading.Thread(target=press)
    presser.start()
    readings = 0
    try:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            watched.assert_good(vm.uuid)
            readings += 1
    finally:
        stop.set()
        presser.join()
    print(f"{readings} rounds of readings, {done} times pressed")
    assert readings > 50
    assert done > 20


def test_without_reading_again_it_would_be_a_finding(
    watched: Watched, vm: qemu.Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That our own table lacks a page is one of the differences that pass."""
    watched.approve()
    watched.assert_good(vm.uuid)
    registry = watched.measurer.registry
    owns = [file.own for number in range(1, 200) if (file := registry.get(number)) and file.own]

    def drop() -> None:
        for own in owns:
            pages._libc.madvise(own.address, own.length, 4)
        time.sleep(0.02)

    drop()
    watched.assert_good(vm.uuid)
    monkeypatch.setattr(process, "RETRY_S", ())
    drop()
    reading = watched.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid))
    assert isinstance(reading, ProcessReading)
    assert reading.altered_total > 1000


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError:
        # Not every machine has it, or allows it here.
        assert sys.platform == "linux"


def test_mappings_are_shared_only_by_requests_that_were_there(watched: Watched, vm: qemu.Vm) -> None:
    """One reading of the mappings serves both components of a VM, unless it began before the ask."""
    watched.approve()
    measurer = watched.measurer
    maps = measurer.processes._maps
    kinds = (Kind.PROCESS, Kind.RELRO)
    for kind in kinds:
        while isinstance(measurer.answer(Ask(0, kind, vm.uuid)), Missing):
            time.sleep(0.002)
    for first, second in (kinds, kinds[::-1]):
        both = time.monotonic_ns()
        readings = [measurer.answer(Ask(0, first, vm.uuid), both)]
        latest = maps._latest
        readings.append(measurer.answer(Ask(0, second, vm.uuid), both))
        assert maps._latest is latest
        # An ask that came when they had been read, and one of which that is not known.
        for taken in (time.monotonic_ns(), None):
            readings.append(measurer.answer(Ask(0, second, vm.uuid), taken))
            assert maps._latest is not latest
            latest = maps._latest
        # Nor while a VM stands still that ran when they were read.
        measurer._freezer.mode = "always"
        readings.append(measurer.answer(Ask(0, second, vm.uuid), both))
        measurer._freezer.mode = "never"
        assert maps._latest is not latest
        assert not any(isinstance(reading, Missing) for reading in readings)
        assert all(reading == readings[1] for reading in readings[1:])


def test_what_differs_is_read_anew(watched: Watched, vm: qemu.Vm) -> None:
    """A page or a word that differs is looked at again with mappings as they are then."""
    watched.approve()
    measurer = watched.measurer
    maps = measurer.processes._maps
    reading = measurer.answer(Ask(0, Kind.PROCESS, vm.uuid))
    assert isinstance(reading, ProcessReading)
    code = next(mapping for mapping in reading.mappings if mapping.protection & EXEC)
    byte = tamper.read(vm.pid, code.start, 1)
    tamper.write(vm.pid, code.start, bytes([byte[0] ^ 1]))
    taken = time.monotonic_ns()
    maps.state(measurer.guests.guests[0].found.handle)
    latest = maps._latest
    altered = measurer.answer(Ask(0, Kind.PROCESS, vm.uuid), taken)
    assert isinstance(altered, ProcessReading)
    assert altered.altered_total == 1
    assert maps._latest is not latest
