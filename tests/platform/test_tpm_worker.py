"""The owner thread: order, deadlines, errors in the right thread."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from support_tpm import Embedded

from hostd.ipc.loop import Loop
from hostd.platform.tpm_errors import TpmBusyError, TpmUnavailableError
from hostd.platform.tpm_worker import MAX_WAITING, Job, Priority, TpmWorker


def ignore(_job: Job[object]) -> None:
    pass


def wait(worker: TpmWorker, count: int, within_s: float = 30.0) -> list[Job[object]]:
    jobs: list[Job[object]] = []
    end = time.monotonic() + within_s
    while len(jobs) < count and time.monotonic() < end:
        select.select([worker], [], [], max(0.0, end - time.monotonic()))
        jobs += worker.completions()
    assert len(jobs) == count
    return jobs


@pytest.fixture
def worker(host: Embedded) -> Iterator[TpmWorker]:
    made = TpmWorker(host.open)
    yield made
    assert made.stop(10.0)


def test_results_come_through_the_loop(worker: TpmWorker) -> None:
    loop, seen = Loop(), []

    def done(job: Job[dict[int, bytes]]) -> None:
        seen.append((threading.current_thread(), job.result()))
        loop.stop()

    loop.watch(worker, worker.dispatch)
    worker.submit(Priority.OTHER, lambda tpm: tpm.read_pcrs((7,)), done, within_s=10)
    loop.run()
    loop.close()
    ((thread, values),) = seen
    assert thread is threading.main_thread()
    assert list(values) == [7]


def test_urgent_work_goes_first(worker: TpmWorker) -> None:
    order: list[str] = []
    started, gate = threading.Event(), threading.Event()

    def first(_tpm: object) -> None:
        started.set()
        gate.wait(10)

    worker.submit(Priority.OTHER, first, ignore, within_s=10)
    assert started.wait(10)
    for name, priority in (
        ("other 1", Priority.OTHER),
        ("quote 1", Priority.QUOTE),
        ("unseal", Priority.UNSEAL),
        ("quote 2", Priority.QUOTE),
    ):
        worker.submit(priority, lambda _tpm, n=name: order.append(n), ignore, within_s=10)
    gate.set()
    wait(worker, 5)
    assert order == ["unseal", "quote 1", "quote 2", "other 1"]


def test_errors_are_raised_by_result_only(worker: TpmWorker) -> None:
    worker.submit(Priority.OTHER, lambda _tpm: 1 // 0, ignore, within_s=10)
    worker.submit(Priority.OTHER, lambda _tpm: 7, ignore, within_s=10)
    broken, fine = wait(worker, 2)
    with pytest.raises(ZeroDivisionError):
        broken.result()
    assert fine.result() == 7


def test_an_unfinished_job_has_no_result(worker: TpmWorker) -> None:
    gate = threading.Event()
    job = worker.submit(Priority.OTHER, lambda _tpm: gate.wait(10), ignore, within_s=10)
    with pytest.raises(RuntimeError, match="not finished"):
        job.result()
    gate.set()
    wait(worker, 1)


def test_a_stuck_thread_does_not_hold_up_the_answer(host: Embedded) -> None:
    worker, gate, started = TpmWorker(host.open), threading.Event(), threading.Event()

    def stuck(_tpm: object) -> None:
        started.set()
        gate.wait(60)

    start = time.monotonic()
    worker.submit(Priority.OTHER, stuck, ignore, within_s=0.5)
    assert started.wait(10)
    worker.submit(Priority.UNSEAL, lambda _tpm: 1, ignore, within_s=0.2)
    jobs = wait(worker, 2, 5)
    assert time.monotonic() - start < 15
    for job in jobs:
        with pytest.raises(TpmUnavailableError, match="deadline"):
            job.result()
    assert not worker.stop(0.1)
    gate.set()
    assert worker.stop(10)
    # What the thread returned afterwards is not a second completion.
    assert worker.completions() == []


def test_a_hung_tpm_fails_jobs_at_their_deadline(own_host: Embedded) -> None:
    worker = TpmWorker(lambda: own_host.open(command_s=30))
    worker.submit(Priority.OTHER, lambda tpm: tpm.read_pcrs((7,)), ignore, within_s=10)
    wait(worker, 1)[0].result()
    os.kill(own_host.process.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        worker.submit(Priority.QUOTE, lambda tpm: tpm.quote(b"", (7,)), ignore, within_s=0.3)
        (job,) = wait(worker, 1)
        with pytest.raises(TpmUnavailableError):
            job.result()
        assert time.monotonic() - start < 15
    finally:
        os.kill(own_host.process.process.pid, signal.SIGCONT)
    worker.submit(Priority.QUOTE, lambda tpm: tpm.quote(b"", (7,)), ignore, within_s=10)
    wait(worker, 1)[0].result()
    assert worker.stop(10)


def test_opens_again_after_it_could_not(own_host: Embedded) -> None:
    own_host.process.kill()
    worker = TpmWorker(own_host.open)
    worker.submit(Priority.OTHER, lambda tpm: tpm.random(8), ignore, within_s=10)
    with pytest.raises(TpmUnavailableError):
        wait(worker, 1)[0].result()
    own_host.restart()
    worker.submit(Priority.OTHER, lambda tpm: tpm.random(8), ignore, within_s=10)
    assert wait(worker, 1)[0].result()
    assert worker.stop(10)


def test_an_expired_job_is_not_run(worker: TpmWorker) -> None:
    ran, gate = [], threading.Event()
    worker.submit(Priority.OTHER, lambda _tpm: gate.wait(10), ignore, within_s=10)
    worker.submit(Priority.OTHER, lambda _tpm: ran.append(1), ignore, within_s=0.1)
    (expired,) = wait(worker, 1)
    with pytest.raises(TpmUnavailableError):
        expired.result()
    gate.set()
    wait(worker, 1)
    worker.submit(Priority.OTHER, lambda _tpm: None, ignore, within_s=10)
    wait(worker, 1)
    assert ran == []


def test_the_queue_is_bounded_and_closes(host: Embedded) -> None:
    worker, gate, started = TpmWorker(host.open), threading.Event(), threading.Event()

    def first(_tpm: object) -> None:
        started.set()
        gate.wait(30)

    worker.submit(Priority.OTHER, first, ignore, within_s=30)
    assert started.wait(10)
    for _ in range(MAX_WAITING):
        worker.submit(Priority.OTHER, lambda _tpm: None, ignore, within_s=30)
    with pytest.raises(TpmBusyError):
        worker.submit(Priority.UNSEAL, lambda _tpm: None, ignore, within_s=30)
    stopping = threading.Thread(target=worker.stop, args=(10.0,))
    stopping.start()
    stopped = wait(worker, MAX_WAITING)
    gate.set()
    stopping.join()
    with pytest.raises(TpmUnavailableError, match="stopped"):
        stopped[0].result()
    with pytest.raises(TpmBusyError):
        worker.submit(Priority.OTHER, lambda _tpm: None, ignore, within_s=1)
