"""Promise: no answer rests on a reading older than its request, by the trace of a whole hostd at work."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from hostd.core.readings import EXEC, READ
from tests.e2e.harness import Settings, alive, machine, until
from tests.e2e.load import Load
from tests.e2e.traced import TracedHost, traced
from tests.support import tamper

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import qemu
    from tests.support.freshness import Freshness

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
OTHER = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0002"


def sentence_holds(host: TracedHost, load: Load) -> Freshness:
    until(lambda: host.judged(load.answers).violations == [], "all is written down", 30)
    found = host.judged(load.answers)
    print(dict(found.counts))
    assert found.counts["released"] >= len(load.answers) > 0
    return found


@pytest.mark.parametrize("tpm", ["quote", "read"])
def test_machines_come_and_go(binary: Path, vm: qemu.Vm, tpm: str) -> None:
    with traced(binary, Settings(more=f'[gate]\ntpm = "{tpm}"\n')) as host:
        with Load(host, threads=3) as load:
            for _ in range(5):
                with machine(binary, vm=OTHER):
                    load.answered_after(time.monotonic(), 20)
        sentence_holds(host, load)
        load.check()


def test_the_measurer_dies_and_the_tpm_hangs(binary: Path, vm: qemu.Vm) -> None:
    with traced(binary) as host:
        with Load(host, threads=3, timeout_s=8) as load:
            load.answered_after(time.monotonic(), 20)
            measurer = host.pid("measurer")
            os.kill(measurer, signal.SIGKILL)
            until(lambda: not alive(measurer), "it is dead")
            load.answered_after(time.monotonic(), 20)
            tpm = host.swtpm()
            os.kill(tpm, signal.SIGSTOP)
            time.sleep(0.5)  # the fault's length
            os.kill(tpm, signal.SIGCONT)
            load.answered_after(time.monotonic(), 20)
        sentence_holds(host, load)


def test_the_checker_reads_a_drift_from_the_trace(binary: Path, vm: qemu.Vm) -> None:
    with traced(binary) as host:
        with Load(host, threads=3) as load:
            load.answered_after(time.monotonic(), 20)
            text = tamper.mapping(vm.pid, "qemu-under-test", READ | EXEC)
            tamper.write(vm.pid, text.start + 64, b"\xcc")
            until(lambda: load.errors["refused_drift"] > 10, "it is refused")
        found = sentence_holds(host, load)
        assert found.counts["readings drifted"] > 0
        assert found.counts["refused_drift"] > 0
