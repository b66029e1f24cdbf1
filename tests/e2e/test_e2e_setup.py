"""Promise: a host is set up once, never over another, and its root key opens only where it was sealed."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from hostd.platform import swtpm
from hostd.platform.tpm import open_tpm
from hostd.platform.tpm_files import parse_record, read_file
from hostd.platform.tpm_tcti import open_link
from tests.e2e.harness import Host, Settings, directory, prepared, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow
PCR = 7


def kept(host: Host) -> dict[str, bytes]:
    names = ("root.json", "tpm.json", "store.sqlite", "swtpm/ek-ca.pem")
    return {name: (host.state / name).read_bytes() for name in names}


def test_twice_changes_nothing(binary: Path) -> None:
    with prepared(binary) as host:
        before = kept(host)
        again = host.setup()
        assert kept(host) == before
        assert "made" not in again.stdout


def test_missing_root_key_is_never_made_anew(binary: Path) -> None:
    with prepared(binary) as host:
        (host.state / "root.json").unlink()
        refused = host.setup(check=False)
        assert refused.returncode != 0
        assert "root.json is missing" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (host.state / "root.json").exists()


def closed_because(host: Host) -> str:
    """Why the gate is closed once the TPM has been asked, as `hostctl status` says it."""
    host.start()
    failed = until(lambda: [e for e in host.ledger() if e["event"] == "unseal"], "an attempt to unseal")
    assert failed[0]["outcome"] == "failed"
    status = host.hostctl_json("status")
    assert (status["gate"], status["keys_unlocked"]) == ("closed", False)
    return f"{status['reason']} | {failed[0]['detail']}"


def test_root_key_of_another_host(binary: Path) -> None:
    with prepared(binary) as host, prepared(binary) as other:
        shutil.copy(other.state / "root.json", host.state / "root.json")
        assert "another TPM" in closed_because(host)


def test_another_tpm(binary: Path) -> None:
    with prepared(binary) as host, prepared(binary) as other:
        shutil.rmtree(host.state / "swtpm")
        shutil.copytree(other.state / "swtpm", host.state / "swtpm")
        said = host.setup(check=False)
        assert said.returncode != 0
        assert "Traceback" not in said.stderr
        assert "TPM" in closed_because(host)


@contextmanager
def tpm_of(host: Host, socket: Path) -> Iterator[None]:
    running = swtpm.start(host.state / "swtpm", socket)
    try:
        yield
    finally:
        running.stop()


def test_other_pcr_value_is_named(binary: Path) -> None:
    with directory() as place, prepared(binary) as host:
        socket = place / "tpm.sock"
        host.settings = Settings(more=f'[tpm]\ndevice = "unix:{socket}"\n')
        host.write_config()
        with tpm_of(host, socket):
            record = parse_record(read_file(host.state / "tpm.json"))
            tpm = open_tpm(lambda: open_link(f"unix:{socket}"), record, command_s=10)
            expected = tpm.read_pcrs([PCR])[PCR].hex()
            tpm.extend(PCR, bytes(range(32)))
            seen = tpm.read_pcrs([PCR])[PCR].hex()
            tpm.close()
            said = closed_because(host)
            for part in said.split(" | "):
                assert f"PCR {PCR}" in part or f"{PCR}" in part
                assert expected in part, part
                assert seen in part, part
            host.stop()
        # The value is back after a reset of the TPM, and so is the key.
        with tpm_of(host, socket):
            host.start()
            until(lambda: (s := host.status()) and s.keys_unlocked, "it is unsealed")
            host.stop()
