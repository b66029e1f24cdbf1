"""The TPM's owner thread: jobs by priority, each with a deadline, results given back to the role's loop.

A job is a function that gets the `Tpm`; it runs in the owner thread. Its outcome is taken out by the
role's own thread when `fileno` is readable, and raised there, never here. A job that is not done
at its deadline fails with `TpmUnavailableError` then, even if the owner thread hangs in it.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from hostd.platform.tpm import Tpm
from hostd.platform.tpm_errors import TpmBusyError, TpmUnavailableError

T = TypeVar("T")
MAX_WAITING: Final = 1024
"""Jobs; the vault has one quote in flight, so this is never near."""


class Priority(enum.IntEnum):
    """What goes first when several jobs wait. Gaps are left for what may come between."""

    POISON = 10
    UNSEAL = 20
    QUOTE = 30
    OTHER = 40


class Job(Generic[T]):
    """One piece of work for the TPM. `done` is called with it in the loop's thread, once."""

    __slots__ = ("_outcome", "deadline", "done", "work")

    def __init__(self, work: Callable[[Tpm], T], done: Callable[[Job[T]], None], deadline: float) -> None:
        self.work = work
        self.done = done
        self.deadline = deadline
        self._outcome: tuple[T] | BaseException | None = None

    def result(self) -> T:
        """What the work returned; raises what it raised (a `TpmError`, or a defect).

        Raises:
            TpmUnavailableError: it was not done by its deadline.
        """
        if self._outcome is None:
            raise RuntimeError("the job is not finished")
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome[0]

    @property
    def finished(self) -> bool:
        return self._outcome is not None

    def settle(self, outcome: tuple[T] | BaseException) -> None:
        """Sets the outcome; the worker alone calls it, under its lock, once."""
        self._outcome = outcome


class TpmWorker:
    """Owns the `Tpm` that `open_it` gives; opens it in its own thread, again after a failure to open."""

    def __init__(self, open_it: Callable[[], Tpm]) -> None:
        self._open_it = open_it
        self._lock = threading.Condition()
        self._waiting: list[tuple[Priority, int, Job[Any]]] = []
        self._deadlines: list[tuple[float, int, Job[Any]]] = []
        self._finished: deque[Job[Any]] = deque()
        self._order = itertools.count()
        self._stopping = False
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Daemons: a thread stuck in a hung TPM must not keep the process from ending.
        self._owner = threading.Thread(target=self._own, name="tpm", daemon=True)
        self._watch = threading.Thread(target=self._expire, name="tpm-deadlines", daemon=True)
        self._owner.start()
        self._watch.start()

    # ── The loop's side ───────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        priority: Priority,
        work: Callable[[Tpm], T],
        done: Callable[[Job[T]], None],
        *,
        within_s: float,
    ) -> Job[T]:
        """Queues work that must be done `within_s` seconds from now.

        Raises:
            TpmBusyError: too much waits already, or the worker was stopped.
        """
        job = Job(work, done, time.monotonic() + within_s)
        with self._lock:
            if self._stopping or len(self._waiting) >= MAX_WAITING:
                raise TpmBusyError("the TPM's queue is full or closed")
            number = next(self._order)
            heapq.heappush(self._waiting, (priority, number, job))
            heapq.heappush(self._deadlines, (job.deadline, number, job))
            self._lock.notify_all()
        return job

    def fileno(self) -> int:
        """Readable when there are completions."""
        return self._event

    def completions(self) -> list[Job[Any]]:
        """Takes the finished jobs, in the order in which they finished; never blocks."""
        with self._lock:
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                return []
            jobs = list(self._finished)
            self._finished.clear()
        return jobs

    def dispatch(self, _events: int = 0) -> None:
        """Handler for the loop: calls `done` of each finished job."""
        for job in self.completions():
            job.done(job)

    def stop(self, timeout_s: float) -> bool:
        """Takes no more jobs, fails those that wait, and waits for the one that runs.

        False if the owner thread hangs: it is left behind. Forget `fileno` in the loop first.
        """
        with self._lock:
            self._stopping = True
            while self._waiting:
                _priority, _number, job = heapq.heappop(self._waiting)
                self._settle(job, TpmUnavailableError("the TPM's thread was stopped"))
            self._lock.notify_all()
        self._watch.join(timeout_s)
        self._owner.join(timeout_s)
        return not self._owner.is_alive()

    # ── The threads ───────────────────────────────────────────────────────────────────────────────

    def _settle(self, job: Job[Any], outcome: tuple[Any] | BaseException) -> None:
        """Under the lock. The first outcome counts."""
        if not job.finished:
            job.settle(outcome)
            self._finished.append(job)
            os.eventfd_write(self._event, 1)

    def _next(self) -> Job[Any] | None:
        with self._lock:
            while True:
                while self._waiting:
                    job = heapq.heappop(self._waiting)[2]
                    if not job.finished:
                        return job
                if self._stopping:
                    return None
                self._lock.wait()

    def _own(self) -> None:
        tpm: Tpm | None = None
        while (job := self._next()) is not None:
            outcome: tuple[Any] | BaseException
            try:
                tpm = tpm or self._open_it()
                tpm.limit(job.deadline)
                outcome = (job.work(tpm),)
            except Exception as error:  # noqa: BLE001 - raised by result(), in the loop's thread
                outcome = error
            with self._lock:
                self._settle(job, outcome)
        if tpm is not None:
            tpm.close()

    def _expire(self) -> None:
        """Fails jobs at their deadline, whatever the owner thread is doing."""
        with self._lock:
            while not self._stopping:
                now = time.monotonic()
                while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].finished):
                    job = heapq.heappop(self._deadlines)[2]
                    self._settle(job, TpmUnavailableError("the TPM did not answer before the deadline"))
                self._lock.wait(self._deadlines[0][0] - now if self._deadlines else None)
