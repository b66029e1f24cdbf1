"""The event loop: timers in order, handlers that change what is watched, signals."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from hostd.ipc.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_timers_fire_in_order_of_time_then_of_setting(loop: Loop) -> None:
    fired: list[str] = []
    now = time.monotonic()
    for when, name in ((0.02, "late"), (0.0, "a"), (0.0, "b"), (0.01, "middle"), (0.0, "c")):
        loop.call_at(now + when, lambda name=name: fired.append(name))  # type: ignore[misc]
    while len(fired) < 5:
        loop.run_once(None)
    assert fired == ["a", "b", "c", "middle", "late"]
    assert time.monotonic() - now >= 0.02


def test_a_timer_does_not_fire_early(loop: Loop) -> None:
    fired: list[float] = []
    began = time.monotonic()
    loop.call_after(0.015, lambda: fired.append(time.monotonic()))
    while not fired:
        loop.run_once(None)
    assert fired[0] - began >= 0.015


def test_a_cancelled_timer_does_not_fire_nor_wake(loop: Loop) -> None:
    fired: list[str] = []
    early = loop.call_after(0.0, lambda: fired.append("early"))
    early.cancel()
    early.cancel()
    assert early.cancelled
    loop.call_after(0.03, lambda: fired.append("late"))
    loop.run_once(None)
    loop.run_once(0.1)
    assert fired == ["late"]
    done = loop.call_after(0.0, lambda: fired.append("once"))
    loop.run_once(0.1)
    assert done.cancelled
    done.fire()
    assert fired == ["late", "once"]


def test_one_timer_cancels_the_next_of_the_same_round(loop: Loop) -> None:
    fired: list[str] = []
    now = time.monotonic()
    loop.call_at(now, lambda: second.cancel())
    second = loop.call_at(now, lambda: fired.append("no"))
    loop.run_once(0.0)
    loop.run_once(0.01)
    assert fired == []


def test_every_calls_at_once_and_again(loop: Loop) -> None:
    calls: list[float] = []
    loop.every(0.005, lambda: calls.append(time.monotonic()))
    assert len(calls) == 1
    while len(calls) < 4:
        loop.run_once(None)
    assert all(b - a >= 0.005 for a, b in itertools.pairwise(calls))


def test_at_most_bounds_the_wait(loop: Loop) -> None:
    loop.call_after(60, lambda: None)
    began = time.monotonic()
    loop.run_once(0.01)
    assert time.monotonic() - began < 15


def test_watching_reading_writing_and_forgetting(loop: Loop) -> None:
    left, right = socket.socketpair()
    seen: list[int] = []
    loop.watch(left, seen.append)
    loop.run_once(0.0)
    assert seen == []
    right.send(b"x")
    loop.run_once(0.1)
    loop.run_once(0.1)
    assert seen == [1, 1]  # level-triggered
    seen.clear()
    loop.watch(left, seen.append, read=False, write=True)
    loop.run_once(0.1)
    assert seen == [4]
    loop.forget(left)
    loop.forget(left)
    loop.run_once(0.0)
    assert seen == [4]
    left.close()
    right.close()


def test_a_handler_may_forget_another_of_the_same_round(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    seen: list[int] = []

    def handler(mine: int) -> None:
        seen.append(mine)
        for left, _ in pairs:
            loop.forget(left)

    for i, (left, right) in enumerate(pairs):
        loop.watch(left, lambda _events, i=i: handler(i))  # type: ignore[misc]
        right.send(b"x")
    loop.run_once(0.1)
    assert len(seen) == 1
    for pair in pairs:
        for end in pair:
            end.close()


def test_a_defect_in_a_handler_is_not_survived(loop: Loop) -> None:
    def defect() -> None:
        raise ZeroDivisionError

    loop.call_after(0.0, defect)
    with pytest.raises(ZeroDivisionError):
        loop.run()


def test_stop_ends_run_after_the_round(loop: Loop) -> None:
    done: list[int] = []
    loop.call_after(0.0, loop.stop)
    loop.call_after(0.0, lambda: done.append(1))
    loop.run()
    assert done == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_loop_even_while_it_waits(number: signal.Signals) -> None:
    """In a child: handlers and the wakeup descriptor belong to a process."""
    ready, says = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            loop = Loop()
            loop.stop_on_signals()
            loop.call_after(0.0, lambda: os.close(says))
            loop.run()
            os._exit(42)
        finally:
            os._exit(1)
    os.close(says)
    assert os.read(ready, 1) == b""
    time.sleep(0.05)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    os.close(ready)
