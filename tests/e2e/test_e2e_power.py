"""Promise: what was acknowledged survives everything stopping at once, at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import TYPE_CHECKING

import pytest

from hostd.ipc import operating as adm
from tests.e2e.harness import Host, adopted, descendants, prepared
from tests.e2e.load import Load, keys_work

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
MOMENTS = 3


def agrees(host: Host) -> None:
    found = host.ask(adm.VerifyLedger(), adm.LedgerVerified)
    assert found.problem == ""


def test_everything_is_killed_while_writing(host: Host) -> None:
    for _ in range(MOMENTS):
        with Load(host, threads=4, timeout_s=3) as load:
            load.answered_after(time.monotonic(), 20, count=20)
            host.kill()
        host.start()
        host.wait_open()
        client = host.client()
        host.serves(client)
        load.check()
        keys_work(client, load.created)
        agrees(host)


def test_copy_of_the_disk(binary: Path) -> None:
    """The state directory as it is between two instructions of the vault starts elsewhere, with every key
    that was acknowledged by then."""
    with adopted(binary) as host, Load(host, threads=4) as load:
        load.answered_after(time.monotonic(), 20, count=20)
        with prepared(binary) as other:
            shutil.rmtree(other.state)
            assert host.supervisor is not None
            pids = [host.supervisor.pid, *descendants(host.supervisor.pid)]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            acknowledged = load.created
            shutil.copytree(host.state, other.state)
            shutil.copy(host.directory / "trust.json", other.directory)
            # The same officers, or the store would not open.
            text = other.config_path.read_text()
            other.config_path.write_text(text.replace(other.officers_section(), host.officers_section()))
            for pid in reversed(pids):
                os.kill(pid, signal.SIGCONT)
            other.start()
            other.wait_open()
            client = other.client()
            other.serves(client)
            assert acknowledged
            keys_work(client, acknowledged)
            agrees(other)
            other.stop()


def test_torn_last_line(host: Host) -> None:
    """A line that was being written when the power went was never acknowledged; the rest stands."""
    client = host.client()
    key = client.create_key().key.id
    host.kill()
    ledger = host.state / "ledger.jsonl"
    before = ledger.read_bytes()
    with ledger.open("ab") as file:
        file.write(b'{"seq":%d,"time":17,"event":"operation","outco' % before.count(b"\n"))
    host.start()
    host.wait_open()
    keys_work(client, [key])
    agrees(host)
    after = ledger.read_bytes()
    assert after.startswith(before)
    assert b'"time":17,' not in after
    entries = host.ledger()
    assert [e["seq"] for e in entries] == list(range(len(entries)))
