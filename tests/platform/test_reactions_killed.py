"""kill -9 at each step of the reactions, on a real TPM: what was decided is done in the end, and said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support_tpm import Embedded

from hostd.core.keys import State
from hostd.platform.tpm_errors import TpmPolicyError
from hostd.platform.tpm_files import SealedBlob, encode_blob, encode_record, write_file
from hostd.vault.store import Store
from tests.vault.react_and_die import PCR, STEPS
from tests.vault.support_gate import VM_A

ROOT = Path(__file__).resolve().parents[2]
MOST = 60


def run(folder: Path, host: Embedded, at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.vault.react_and_die", folder, host.process.socket, str(at)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def entries(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "drift.jsonl").read_text().splitlines()]


def unseals(host: Embedded, blob: SealedBlob) -> bool:
    tpm = host.open()
    try:
        tpm.unseal(blob)
    except TpmPolicyError:
        return False
    finally:
        tpm.close()
    return True


@pytest.mark.slow
def test_a_vault_that_is_killed_anywhere_goes_on(tmp_path: Path, own_host: Embedded) -> None:
    tpm = own_host.open()
    blob = tpm.seal(bytes(range(32)), tpm.read_pcrs((0, 7, PCR)))
    tpm.close()
    killed = 0
    for at in range(1, MOST):
        folder = tmp_path / str(at)
        folder.mkdir()
        write_file(folder / "tpm.json", encode_record(own_host.record))
        write_file(folder / "root.json", encode_blob(blob))
        own_host.restart()
        assert unseals(own_host, blob)
        first = run(folder, own_host, at)
        if first.returncode == 0:
            assert killed == int(first.stdout)
            break
        assert first.returncode == -signal.SIGKILL, first.stderr
        killed += 1
        second = run(folder, own_host, 0)
        assert second.returncode == 0, second.stderr
        check(folder, own_host, blob, at)
        # Once more, after a reset of the machine: nothing is done again.
        before = entries(folder)
        own_host.restart()
        assert run(folder, own_host, 0).returncode == 0
        assert entries(folder) == before
        assert unseals(own_host, blob)
    else:
        raise AssertionError("it never came to an end")
    assert killed >= 2 * len(STEPS)


def check(folder: Path, host: Embedded, blob: SealedBlob, at: int) -> None:
    found = entries(folder)
    store = Store(folder / "drift.sqlite")
    latched = [name for name, *_ in store.drift()]
    states = {v.state for key in store.keys("red", "", 9) for v in key.versions}
    store.close()
    if not latched:
        # Killed before anything of the drift was durable: the next reading finds it again.
        assert at <= 1
        assert not found
        assert unseals(host, blob)
        return
    assert latched == [f"process:{VM_A}"]
    drifts = [e for e in found if e["event"] == "drift"]
    assert len(drifts) == 1
    done = [e["detail"].split(" | ")[0] for e in found if e["event"] == "reaction" and e["outcome"] == "done"]
    assert sorted(set(done)) == sorted(STEPS[1:])
    assert len(done) == len(STEPS) - 1, "each is said once"
    assert not unseals(host, blob)
    assert states == {State.DESTROYED}
    assert any(e["event"] == "shred" for e in found)
    machines = (folder / "machines").read_text().split("\n")
    assert f"{VM_A} suspended" in machines
