"""Identification in steps: from the same bytes, in turns, and fair to the others."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from hostd.core.findings import Kind, Status
from hostd.core.readings import FileIdentity, Missing, ProcessReading
from hostd.ipc.measuring import Ask, AskFile
from hostd.measurer import copies, files
from hostd.measurer.identify import Turns
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.watched import Watched

pytestmark = pytest.mark.qemu
LARGE = 96 << 20


def _numbers(watched: Watched, vm: qemu.Vm) -> dict[str, int]:
    """Path → number of what the machine maps."""
    reading = watched.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid))
    assert isinstance(reading, ProcessReading)
    return {item.name: item.file for item in reading.mappings if item.file is not None}


def _large(path: Path, *, size: int = LARGE) -> Path:
    with path.open("wb") as file:
        for number in range(size >> 20):
            file.write(number.to_bytes(4, "little") * (1 << 18))
    return path


def test_steps_are_short_and_give_what_one_go_gives(watched: Watched, vm: qemu.Vm, tmp_path: Path) -> None:
    large = _large(tmp_path / "large.so")
    tamper.map_file(vm.pid, large)
    number = _numbers(watched, vm)[str(large)]
    turns = Turns(watched.measurer.registry)
    turns.ask(5, number)
    assert turns.waiting == 1
    took, answer = [], None
    while answer is None:
        began = time.thread_time()
        answer = turns.step()
        took.append(time.thread_time() - began)
    assert len(took) > LARGE >> 20
    assert sorted(took)[len(took) // 2] < 0.01
    ticket, identity = answer
    assert ticket == 5
    assert isinstance(identity, FileIdentity)
    assert identity.sha256 == hashlib.sha256(large.read_bytes()).digest()
    (segment,) = identity.segments
    # The reading that comes after finds the very tag.
    assert segment in watched.files().segments
    assert turns.waiting == 0
    while not turns.idle:
        assert turns.step() is None
    assert watched.measurer.answer(AskFile(0, number)) == identity


def test_readings_go_on_meanwhile(watched: Watched, vm: qemu.Vm, tmp_path: Path) -> None:
    """Between any two steps everything else is read, and what was good stays good."""
    watched.approve()
    with qemu.running(watched.binary) as other:
        watched.assert_good(other.uuid)
        tamper.map_file(vm.pid, _large(tmp_path / "large.so"))
        number = next(n for path, n in _numbers(watched, vm).items() if path.endswith("large.so"))
        steps = watched.measurer.registry.identify_steps(number)
        for index, step in enumerate(steps):
            if step is not None:
                break
            if index % 16 == 0:
                watched.assert_good(other.uuid)
        assert index > 90


def test_change_between_two_steps_is_not_passed_over(
    watched: Watched, vm: qemu.Vm, memory_directory: Path
) -> None:
    """The digest and the tags are of the same bytes, so a byte that changed after it was hashed has
    another tag."""
    path = _large(memory_directory / "large.so", size=8 << 20)
    tamper.map_file(vm.pid, path)
    number = _numbers(watched, vm)[str(path)]
    before = path.read_bytes()
    steps = watched.measurer.registry.identify_steps(number)
    for _ in range(4):
        assert next(steps) is None
    tamper.flip_page_cache(path, 5)
    tamper.flip_page_cache(path, (8 << 20) - 1)
    identity = next(step for step in steps if step is not None)
    changed = bytearray(before)
    changed[-1] ^= 0xFF
    assert identity.sha256 == hashlib.sha256(changed).digest()
    (segment,) = identity.segments
    assert segment not in watched.files().segments
    tamper.flip_page_cache(path, 5)
    assert segment in watched.files().segments
    list(steps)


def test_file_dropped_between_two_steps(
    watched: Watched, binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor may be another file's by then."""
    with qemu.running(binary) as vm:
        large = _large(tmp_path / "large.so", size=8 << 20)
        tamper.map_file(vm.pid, large)
        number = _numbers(watched, vm)[str(large)]
        steps = watched.measurer.registry.identify_steps(number)
        assert next(steps) is None
        turns = Turns(watched.measurer.registry)
        turns.ask(1, number)
        assert turns.step() is None
    monkeypatch.setattr(files, "KEEP_S", 0.0)
    for _ in range(2):
        watched.measurer.answer(Ask(0, Kind.GUESTS))
    other = [os.open("/etc/passwd", os.O_RDONLY) for _ in range(80)]
    try:
        with pytest.raises((LookupError, OSError)):
            list(steps)
        answer = None
        while answer is None:
            answer = turns.step()
        assert isinstance(answer[1], Missing)
    finally:
        for fd in other:
            os.close(fd)


def test_turns_are_fair(watched: Watched, binary: Path, vm: qemu.Vm, tmp_path: Path) -> None:
    """One machine that brings many large files waits for them; another's file needs its own steps, and as
    many of the first one's."""
    with qemu.running(binary) as other:
        own = _large(tmp_path / "own.so", size=8 << 20)
        tamper.map_file(other.pid, own)
        many = [_large(tmp_path / f"large-{index}.so", size=32 << 20) for index in range(4)]
        for path in many:
            tamper.map_file(vm.pid, path)
        watched.measurer.answer(Ask(0, Kind.GUESTS))
        greedy = _numbers(watched, vm)
        modest = _numbers(watched, other)
        turns = Turns(watched.measurer.registry)
        for path in many:
            turns.ask(greedy[str(path)], greedy[str(path)])
        turns.ask(1000, modest[str(own)])
        steps, order = 0, []
        while turns.waiting:
            steps += 1
            answer = turns.step()
            if answer is not None:
                order.append((answer[0], steps))
        assert order[0][0] == 1000
        assert order[0][1] <= 2 * (9 + 1)
        assert [ticket for ticket, _ in order[1:]] == [greedy[str(path)] for path in many]


def test_who_asked_is_gone(watched: Watched, vm: qemu.Vm) -> None:
    numbers = _numbers(watched, vm)
    turns = Turns(watched.measurer.registry)
    turns.ask(1, min(numbers.values()))
    turns.ask(2, 10**9)
    turns.clear()
    assert turns.waiting == 0
    assert turns.step() is None
    turns.ask(3, 10**9)
    assert turns.step() == (3, Missing("no such file", absent=False))


def test_ever_new_files_find_an_end(
    watched: Watched, binary: Path, vm: qemu.Vm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that maps and unmaps ever new files takes its own share of places, and nobody else's."""
    monkeypatch.setattr(files, "MAX_FILES", 120)
    monkeypatch.setattr(files, "FAIR_FILES", 60)
    monkeypatch.setattr(files, "MAX_FILES_PER_PROCESS", 70)
    monkeypatch.setattr(files, "SETTLE_S", 0.0)
    watched.approve()
    registry = watched.measurer.registry
    for index in range(80):
        path = tmp_path / f"new-{index}.so"
        path.write_bytes(os.urandom(4096))
        address = tamper.map_file(vm.pid, path)
        watched.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid))
        tamper.syscall(vm.pid, SYS_MUNMAP, address, 4096)
    assert len([1 for number in range(1, 400) if registry.get(number)]) <= 70
    with qemu.running(binary) as other:
        watched.assert_good(other.uuid)
    watched.assert_good(vm.uuid)


def test_more_than_its_share_is_not_verified(
    watched: Watched, binary: Path, vm: qemu.Vm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_FILES_PER_PROCESS", 56)
    watched.approve()
    watched.assert_good(vm.uuid)
    with qemu.running(binary) as other:
        watched.assert_good(other.uuid)
        for index in range(8):
            path = tmp_path / f"new-{index}.so"
            path.write_bytes(os.urandom(4096))
            tamper.map_file(vm.pid, path)
        assert isinstance(watched.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid)), Missing)
        assert watched.verdicts(vm.uuid)[3].status is Status.PENDING
        watched.assert_good(other.uuid)


def test_bytes_in_all_are_bounded(
    watched: Watched, binary: Path, vm: qemu.Vm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.approve()
    monkeypatch.setattr(files, "MAX_TAGGED", 50 << 20)
    with qemu.running(binary) as other:
        tamper.map_file(vm.pid, _large(tmp_path / "large.so", size=32 << 20))
        reading = watched.measurer.answer(Ask(0, Kind.PROCESS, vm.uuid))
        assert isinstance(reading, Missing)
        assert "in all processes" in reading.reason
        watched.assert_good(other.uuid)


def test_unidentified_content_is_not_read(watched: Watched, vm: qemu.Vm, tmp_path: Path) -> None:
    """It cannot be good anyway, and would slow everybody."""
    watched.approve()
    watched.assert_good(vm.uuid)
    large = _large(tmp_path / "large.so")
    tamper.map_file(vm.pid, large)
    number = _numbers(watched, vm)[str(large)]
    (segment,) = [item for item in watched.files().segments if item.file == number]
    assert segment.tag == bytes(16)
    watched.measurer.answer(AskFile(0, number))
    (segment,) = [item for item in watched.files().segments if item.file == number]
    assert segment.tag != bytes(16)


def test_copies_are_bounded(watched: Watched, vm: qemu.Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostd.measurer.identify.MAX_COPIES", 1 << 20)
    assert copies.MAX_COPIES_PER_OWNER <= copies.MAX_COPIES
    watched.approve()
    registry = watched.measurer.registry
    held = sum(
        copy.size
        for number in range(1, 200)
        if (file := registry.get(number))
        for copy in file.copies.values()
    )
    assert 0 < held <= 1 << 20
    watched.assert_good(vm.uuid)


def test_a_pass_pays_for_no_faults(watched: Watched, vm: qemu.Vm) -> None:
    import resource

    watched.approve()
    watched.files()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        watched.files()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 500


SYS_MUNMAP = 11
