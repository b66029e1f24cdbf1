"""Promise: whatever dies or hangs, nothing is answered without a pass, nothing acknowledged is lost,
and service comes back by itself."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import Host, Settings, adopted, alive, until
from tests.e2e.load import Load, keys_work

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import qemu

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
BACK_S = 20.0
"""The longest pauses are the restart's and the connectors' (2 s each) and the start of processes."""


@pytest.fixture
def host(binary: Path, vm: qemu.Vm) -> Iterator[Host]:
    with adopted(binary, Settings(measure="deadline_s = 1.0\n")) as made:
        yield made


def kill(pid: int) -> float:
    moment = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), f"{pid} is dead", 20)
    return moment


@pytest.mark.parametrize("role", ["measurer", "vault", "gateway", "metrics"])
def test_role_is_killed(host: Host, role: str) -> None:
    with Load(host) as load:
        load.answered_after(time.monotonic(), BACK_S)
        back = []
        for _ in range(2):
            moment = kill(host.pid(role))
            back.append(load.answered_after(moment, BACK_S))
            assert alive(host.pid(role))
    print(f"{role}: back after {', '.join(f'{b:.2f} s' for b in back)}; told meanwhile: {dict(load.errors)}")
    load.check()
    keys_work(host.client(), load.created)
    if role == "metrics":
        assert not load.errors


def test_worker_is_killed(host: Host) -> None:
    with Load(host) as load:
        load.answered_after(time.monotonic(), BACK_S)
        (worker,) = host.workers()
        back = load.answered_after(kill(worker), BACK_S)
    print(f"worker: back after {back:.2f} s; told meanwhile: {dict(load.errors)}")
    load.check()
    keys_work(host.client(), load.created)


def test_tpm_is_killed(host: Host) -> None:
    with Load(host) as load:
        load.answered_after(time.monotonic(), BACK_S)
        back = load.answered_after(kill(host.swtpm()), BACK_S)
    print(f"TPM: back after {back:.2f} s; told meanwhile: {dict(load.errors)}")
    load.check()
    keys_work(host.client(), load.created)


def test_measurer_hangs(host: Host) -> None:
    """Stopped for longer than a reading's deadline: nothing that is asked meanwhile is answered."""
    with Load(host, timeout_s=8) as load:
        load.answered_after(time.monotonic(), BACK_S)
        pid = host.pid("measurer")
        stopped = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            until(
                lambda: (s := host.status()) and "measurer" in s.reason and s.gate == "closed",
                "the vault misses the measurer",
                10,
            )
            time.sleep(1.0)  # the attack's length
        finally:
            resumed = time.monotonic()
            os.kill(pid, signal.SIGCONT)
        back = load.answered_after(resumed, BACK_S)
    assert not [a for a in load.answers if a.asked > stopped + 0.1 and a.told < resumed]
    print(f"stopped {resumed - stopped:.1f} s; back after {back:.2f} s; told meanwhile: {dict(load.errors)}")
    load.check()


def test_tpm_hangs(host: Host) -> None:
    """A TPM that does not answer: nothing is answered without its quote."""
    with Load(host, timeout_s=8) as load:
        load.answered_after(time.monotonic(), BACK_S)
        pid = host.swtpm()
        stopped = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3.0)  # the attack's length
        resumed = time.monotonic()
        os.kill(pid, signal.SIGCONT)
        back = load.answered_after(resumed, BACK_S)
    assert not [a for a in load.answers if stopped + 0.5 < a.told < resumed]
    print(f"back after {back:.2f} s; told meanwhile: {dict(load.errors)}")
    load.check()
