"""Promise: the metrics say how it stands, and stale numbers never look good."""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.request
from typing import TYPE_CHECKING

import pytest

from guestlib.errors import RefusedDriftError
from tests.e2e.harness import Host, adopted, until
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.slow]


def scrape(host: Host) -> dict[str, float]:
    port = int((host.run / "metrics.port").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_open_drifted_dead(binary: Path, vm: qemu.Vm) -> None:
    with adopted(binary) as host:
        client = host.client()
        host.serves(client)
        client.create_key()
        seen = scrape(host)
        assert seen["hostd_up"] == seen["hostd_gate_open"] == seen["hostd_keys_unlocked"] == 1
        assert seen["hostd_drifted_components"] == 0
        assert seen["hostd_hypervisors"] == 1
        assert seen['hostd_keys{state="active"}'] == 1
        assert seen['hostd_component_good{kind="process"}'] == 1
        assert seen['hostd_requests_total{op="CreateKey",outcome="released"}'] == 1
        assert seen["hostd_ledger_entries"] == len(host.ledger())

        text = tamper.mapping(vm.pid, "qemu-under-test", 5)
        tamper.write(vm.pid, text.start + 64, bytes([tamper.read(vm.pid, text.start + 64, 1)[0] ^ 1]))
        with pytest.raises(RefusedDriftError):
            client.create_key()
        seen = scrape(host)
        assert seen["hostd_drifted_components"] == 1
        assert seen['hostd_component_good{kind="process"}'] == 0
        assert seen['hostd_requests_total{op="CreateKey",outcome="refused_drift"}'] == 1
        assert any(name.startswith("hostd_findings_total") for name in seen)

        # The supervisor is held, so that the vault stays dead while we look.
        assert host.supervisor is not None
        os.kill(host.supervisor.pid, signal.SIGSTOP)
        try:
            os.kill(host.pid("vault"), signal.SIGKILL)

            def down() -> dict[str, float] | None:
                with contextlib.suppress(OSError):
                    found = scrape(host)
                    return found if found["hostd_up"] == 0 else None
                return None

            seen = until(down, "metrics say that the vault is down", 30)
            assert not [
                name
                for name in seen
                if name.startswith("hostd_") and name != "hostd_up" and "info" not in name
            ]
        finally:
            os.kill(host.supervisor.pid, signal.SIGCONT)
        until(lambda: scrape(host)["hostd_up"] == 1, "and up again")


def test_hung_vault_is_down(host: Host) -> None:
    pid = host.pid("vault")
    os.kill(pid, signal.SIGSTOP)
    try:
        assert scrape(host)["hostd_up"] == 0
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: scrape(host)["hostd_up"] == 1, "up again")
