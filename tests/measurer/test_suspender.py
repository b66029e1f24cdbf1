"""Suspending and resuming through libvirt (its test driver): what was running, and only that."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostd.measurer import suspender
from hostd.measurer.suspender import Deed, Outcome, Suspender

libvirt = pytest.importorskip("libvirt")
URI = "test:///default"


@pytest.fixture
def domain() -> Iterator[Any]:
    """The test driver's one domain, running; it is shared by all connections while one is open."""
    connection = libvirt.open(URI)
    found = connection.lookupByName("test")
    yield found
    if found.isActive() and found.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        found.resume()
    connection.close()


@pytest.fixture
def doer(tmp_path: Path) -> Suspender:
    return Suspender(URI, tmp_path, allowed=True)


def do(doer: Suspender, vm: str, on: bool, ticket: int = 1) -> Outcome:
    doer.ask(Deed((1, ticket), vm, on))
    assert select.select([doer], [], [], 60)[0], "no outcome"
    (outcome,) = doer.outcomes()
    assert outcome.ticket == (1, ticket)
    return outcome


def paused(domain: Any) -> bool:
    return bool(domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)


def test_a_machine_is_suspended_and_resumed(doer: Suspender, domain: Any, tmp_path: Path) -> None:
    vm = domain.UUIDString()
    assert do(doer, vm, True) == ((1, 1), True, "the VM is suspended")
    assert paused(domain)
    assert do(doer, vm, True).detail == "the VM was suspended before"
    assert do(doer, vm, False) == ((1, 1), True, "the VM runs again")
    assert not paused(domain)
    assert not list(tmp_path.iterdir())
    assert do(doer, vm, False).done
    assert not paused(domain)


def test_a_measurer_that_was_killed_in_between_resumes_what_it_suspended(
    doer: Suspender, domain: Any, tmp_path: Path
) -> None:
    vm = domain.UUIDString()
    do(doer, vm, True)
    after = Suspender(URI, tmp_path, allowed=False)
    assert do(after, vm, False).detail == "the VM runs again"
    assert not paused(domain)


def test_what_an_operator_paused_stays_paused(doer: Suspender, domain: Any) -> None:
    vm = domain.UUIDString()
    domain.suspend()
    outcome = do(doer, vm, True)
    assert (outcome.done, outcome.detail) == (True, "the VM had been paused by others")
    assert do(doer, vm, False).done
    assert paused(domain)


def test_another_run_of_the_domain_is_not_resumed(doer: Suspender, domain: Any) -> None:
    vm = domain.UUIDString()
    do(doer, vm, True)
    domain.destroy()
    assert do(doer, vm, True).detail == "the VM does not run"
    domain.create()
    domain.suspend()
    do(doer, vm, False)
    assert paused(domain)


@pytest.mark.parametrize("made", ["content", "link", "folder"])
def test_a_note_of_somebody_else_counts_for_nothing(
    doer: Suspender, domain: Any, tmp_path: Path, made: str
) -> None:
    vm = domain.UUIDString()
    domain.suspend()
    note = tmp_path / f"measurer.suspended-{vm}"
    if made == "content":
        note.write_bytes(b"1x")
    elif made == "link":
        (tmp_path / "else").write_bytes(b"%d" % domain.ID())
        note.symlink_to(tmp_path / "else")
    else:
        note.mkdir()
    outcome = do(doer, vm, False)
    assert paused(domain)
    assert outcome.done is (made != "folder")


def test_a_note_is_not_written_through_a_link(doer: Suspender, domain: Any, tmp_path: Path) -> None:
    vm = domain.UUIDString()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"measurer.suspended-{vm}").symlink_to(victim)
    assert do(doer, vm, True).done
    assert victim.read_text() == "mine"
    assert do(doer, vm, False).detail == "the VM runs again"


def test_nothing_is_suspended_that_is_not_configured(domain: Any, tmp_path: Path) -> None:
    doer = Suspender(URI, tmp_path, allowed=False)
    outcome = do(doer, domain.UUIDString(), True)
    assert not outcome.done
    assert not paused(domain)


def test_a_machine_that_is_not_there(doer: Suspender, domain: Any) -> None:
    vm = "00000000-0000-4000-8000-000000000000"
    assert do(doer, vm, True) == ((1, 1), True, "the VM does not run")
    assert do(doer, vm, False).done


def test_a_libvirt_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    doer = Suspender("qemu:///system?socket=" + str(tmp_path / "none"), tmp_path, allowed=True)
    outcome = do(doer, "00000000-0000-4000-8000-000000000000", True)
    assert not outcome.done
    assert outcome.detail


def test_a_libvirt_that_hangs_is_given_up(
    doer: Suspender, domain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    go_on = threading.Event()
    do_it = doer._do

    def hang(vm: str, on: bool) -> tuple[bool, str]:
        go_on.wait(60)
        return do_it(vm, on)

    monkeypatch.setattr(doer, "_do", hang)
    monkeypatch.setattr(suspender, "GIVE_UP_S", 0.0)
    vm = domain.UUIDString()
    doer.ask(Deed((1, 1), vm, True))
    doer.expire()
    assert doer.outcomes() == [Outcome((1, 1), False, "libvirt does not answer")]
    monkeypatch.undo()
    assert do(doer, vm, False, 2) == Outcome((1, 2), False, "libvirt does not answer")
    go_on.set()
    # What was given up ends some time, and others are served again.
    import time

    deadline = time.monotonic() + 60
    while not (outcome := do(doer, vm, False, 3)).done:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not paused(domain), outcome


def test_a_machine_that_hangs_keeps_no_other_from_being_suspended(
    doer: Suspender, domain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    other = "00000000-0000-4000-8000-000000000000"
    go_on = threading.Event()
    do_it = doer._do

    def hang(vm: str, on: bool) -> tuple[bool, str]:
        if vm == other:
            go_on.wait(60)
        return do_it(vm, on)

    monkeypatch.setattr(doer, "_do", hang)
    vm = domain.UUIDString()
    with monkeypatch.context() as patch:
        patch.setattr(suspender, "GIVE_UP_S", 0.0)
        doer.ask(Deed((1, 1), other, True))
    # Before it is given up, and after.
    assert do(doer, vm, True, 2).detail == "the VM is suspended"
    doer.expire()
    assert doer.outcomes() == [Outcome((1, 1), False, "libvirt does not answer")]
    assert do(doer, vm, False, 3).detail == "the VM runs again"
    assert not do(doer, other, True, 4).done
    monkeypatch.setattr(suspender, "MAX_HANGING", 1)
    assert do(doer, vm, True, 5) == Outcome((1, 5), False, "libvirt does not answer")
    go_on.set()
