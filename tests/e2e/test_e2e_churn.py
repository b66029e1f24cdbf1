"""Promise: legitimate change is never refused as drift."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import VM, Host, adopted, machine, until
from tests.e2e.load import Load

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import qemu

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
STARTS = 100
NEIGHBOUR = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0002"


def test_a_hundred_starts_and_stops(binary: Path, vm: qemu.Vm) -> None:
    """One machine comes and goes while another runs and a client, who rests on all of them, keeps asking."""
    with adopted(binary) as host, Load(host, threads=2, timeout_s=15) as load:
        began = time.monotonic()
        lives = _come_and_go(host)
        # Enough is asked meanwhile to mean something, on a slow machine too.
        until(lambda: len(load.answers) > STARTS // 5, "enough was answered", 30)
        load.answered_after(time.monotonic(), 10)
        took = time.monotonic() - began
        assert host.drift() == {}
        counted = f"{len(load.answers)} answers, others {dict(load.errors)}"
        print(f"{STARTS} machines in {took:.1f} s ({lives}): {counted}")
        load.check()
        assert load.errors["refused_drift"] == 0
        assert "refused-drift" not in {entry["outcome"] for entry in host.ledger()}


def _come_and_go(host: Host) -> str:
    """Some are killed at once, some when they run, some after they were measured."""
    kinds = {"at once": 0, "running": 0, "measured": 0}
    for number in range(STARTS):
        kind = list(kinds)[number % 3]
        with machine(host.binary, vm=NEIGHBOUR, settle=kind != "at once"):
            if kind == "measured":
                _measured(host)
        kinds[kind] += 1
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _measured(host: Host) -> None:
    until_verified = time.monotonic() + 30
    while time.monotonic() < until_verified:
        status = host.status()
        assert status is not None
        if any(c.component == f"process:{NEIGHBOUR}" and c.status == "verified" for c in status.components):
            return
    raise AssertionError(f"{NEIGHBOUR} was never verified ({VM} was): {status}")
