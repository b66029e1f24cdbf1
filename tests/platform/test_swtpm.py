"""The embedded TPM and its provisioning."""

from __future__ import annotations

import datetime
import os
import signal
import ssl
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support_tpm import NOW, Embedded

from guestlib.attest.ekcert import verify_ek_certificate
from guestlib.attest.tpm2 import parse_attest, parse_public
from hostd.platform import swtpm
from hostd.platform.tpm_errors import TpmCommandError, TpmIdentityError, TpmUnavailableError
from hostd.platform.tpm_esys import ESYS_TR, Esys
from hostd.platform.tpm_files import name_of
from hostd.platform.tpm_provision import AK_HANDLE, SRK_HANDLE, provision, trim_der
from hostd.platform.tpm_tcti import SocketLink
from hostd.platform.tpm_templates import storage_key_template


def test_is_certified_by_its_own_maker(host: Embedded) -> None:
    root = ssl.PEM_cert_to_DER_cert((host.state / swtpm.CA_FILE).read_text())
    assert host.record.ek_certificate is not None
    verify_ek_certificate(
        host.record.ek_certificate, host.record.ek_public, roots=(root,), intermediates=(), now=NOW
    )


def test_has_only_the_sha256_bank(host: Embedded) -> None:
    from tpm2_pytss.constants import TPM2_CAP

    esys = Esys(host.connect, 20)
    _more, data = esys.call("GetCapability", lambda e: e.get_capability(TPM2_CAP.PCRS, 0, 16))
    banks = {int(bank.hash): bytes(bank.pcrSelect)[:3] for bank in data.data.assignedPCR}
    esys.close()
    assert {bank for bank, bits in banks.items() if any(bits)} == {0x000B}


def test_its_platform_hierarchy_is_closed(host: Embedded) -> None:
    esys = Esys(host.connect, 20)
    with pytest.raises(TpmCommandError):
        esys.call("CreatePrimary", lambda e: e.create_primary(None, storage_key_template(), ESYS_TR.PLATFORM))
    esys.close()


def test_is_never_made_over_another(host: Embedded) -> None:
    with pytest.raises(FileExistsError):
        swtpm.manufacture(host.state, now=NOW)


def test_nothing_is_left_when_it_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(TpmUnavailableError, match="swtpm"):
        swtpm.manufacture(tmp_path / "tpm", now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_needs_a_state(tmp_path: Path) -> None:
    with pytest.raises(TpmUnavailableError, match="no embedded TPM"):
        swtpm.start(tmp_path, tmp_path / "sock")


def test_stale_sockets_go_live_ones_stay(own_host: Embedded) -> None:
    path = own_host.process.socket
    with pytest.raises(TpmUnavailableError, match="another process serves it"):
        swtpm.start(own_host.state, path)
    own_host.process.process.kill()
    own_host.process.process.wait()
    assert path.exists()
    own_host.process = swtpm.start(own_host.state, path)
    own_host.open().close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert own_host.state.stat().st_mode & 0o077 == 0


def test_stops_in_order(own_host: Embedded) -> None:
    own_host.process.stop()
    assert own_host.process.ended()
    assert not own_host.process.socket.exists()
    own_host.process.stop()
    own_host.process = swtpm.start(own_host.state, own_host.process.socket)
    tpm = own_host.open()
    # clockInfo.safe: the TPM was shut down before.
    assert parse_attest(tpm.quote(b"", (0,)).attest).safe
    tpm.close()


def test_a_hung_one_is_stopped_by_force(own_host: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swtpm, "_STOP_S", 0.2)
    os.kill(own_host.process.process.pid, signal.SIGSTOP)
    own_host.process.stop()
    assert own_host.process.ended()


PARENT = """
import sys, time
from pathlib import Path
from hostd.platform import swtpm
running = swtpm.start(Path(sys.argv[1]), Path(sys.argv[2]))
print(running.process.pid, flush=True)
time.sleep(60)
"""


def test_dies_with_its_parent(own_host: Embedded, tmp_path: Path) -> None:
    own_host.process.stop()
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, own_host.state, tmp_path / "s"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    end = time.monotonic() + 10
    while not _gone(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# ── Provisioning ──────────────────────────────────────────────────────────────────────────────────


def test_provisioning_again_changes_nothing(own_host: Embedded) -> None:
    assert provision(own_host.connect, command_s=20) == own_host.record
    own_host.restart()
    assert provision(own_host.connect, command_s=20) == own_host.record


def test_the_record_names_the_keys(host: Embedded) -> None:
    record = host.record
    assert (record.srk_handle, record.ak_handle) == (SRK_HANDLE, AK_HANDLE)
    assert parse_public(record.ak_public).name == record.ak_name == name_of(record.ak_public)
    assert parse_public(record.srk_public).name == record.srk_name


def test_an_attestation_key_of_another_parent_is_refused(own_host: Embedded) -> None:
    """Under the storage key the reset count in quotes is obfuscated."""
    from hostd.platform.tpm_templates import attestation_key_template

    esys = Esys(own_host.connect, 20)
    srk = esys.attach(SRK_HANDLE)
    private, public, *_ = esys.call("Create", lambda e: e.create(srk, None, attestation_key_template()))
    ak = esys.call("Load", lambda e: e.load(srk, private, public))
    with esys.flushing(ak):
        esys.call("EvictControl", lambda e: e.evict_control(ESYS_TR.OWNER, ak, 0x81010020))
    esys.close()
    with pytest.raises(TpmIdentityError, match="not a child of this endorsement key"):
        provision(own_host.connect, command_s=20, ak_handle=0x81010020)


def test_something_else_at_our_handles_is_refused(own_host: Embedded) -> None:
    with pytest.raises(TpmIdentityError, match="not an attestation key"):
        provision(own_host.connect, command_s=20, ak_handle=SRK_HANDLE)
    esys = Esys(own_host.connect, 20)
    ak, srk = esys.attach(AK_HANDLE), esys.attach(SRK_HANDLE)
    esys.call("EvictControl", lambda e: e.evict_control(ESYS_TR.OWNER, srk, SRK_HANDLE))
    del ak
    from hostd.platform.tpm_templates import attestation_key_template

    other, *_ = esys.call(
        "CreatePrimary", lambda e: e.create_primary(None, attestation_key_template(), ESYS_TR.OWNER)
    )
    with esys.flushing(other):
        esys.call("EvictControl", lambda e: e.evict_control(ESYS_TR.OWNER, other, SRK_HANDLE))
    esys.close()
    with pytest.raises(TpmIdentityError, match="not a storage key"):
        provision(own_host.connect, command_s=20)


@pytest.mark.parametrize("kind", ["another key's", "no certificate"])
def test_a_certificate_that_is_not_the_eks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from hostd.platform import tpm_maker

    issue = tpm_maker._issue

    def wrongly(_ek: bytes, now: datetime.datetime) -> tpm_maker.Made:
        other = ec.generate_private_key(ec.SECP256R1()).public_key()
        made = issue(other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo), now)
        if kind == "another key's":
            return made
        return tpm_maker.Made(bytes.fromhex("30820102") + bytes(258), made.ca_certificate)

    monkeypatch.setattr(tpm_maker, "_issue", wrongly)
    swtpm.manufacture(tmp_path / "tpm", now=NOW)
    running = swtpm.start(tmp_path / "tpm", tmp_path / "sock")
    try:
        with pytest.raises(TpmIdentityError, match="the EK certificate in the TPM"):
            provision(partial(SocketLink, running.socket), command_s=20)
    finally:
        running.stop()


@pytest.mark.slow
def test_other_kinds_of_endorsement_keys(tmp_path: Path) -> None:
    """A TPM as swtpm_setup makes it: RSA-2048 and P-384, certified by its own local CA; no P-256."""
    state, config = tmp_path / "state", tmp_path / "conf"
    state.mkdir()
    config.mkdir()
    (config / "localca.conf").write_text(
        f"statedir = {config}\nsigningkey = {config}/key.pem\nissuercert = {config}/ca.pem\n"
        f"certserial = {config}/serial\n"
    )
    (config / "localca.options").write_text(
        "--tpm-manufacturer IBM\n--tpm-model swtpm-libtpms\n--tpm-version 2\n"
        "--platform-manufacturer Fedora\n--platform-version 2.1\n--platform-model QEMU\n"
    )
    (config / "setup.conf").write_text(
        f"create_certs_tool = swtpm_localca\ncreate_certs_tool_config = {config}/localca.conf\n"
        f"create_certs_tool_options = {config}/localca.options\n"
    )
    made = subprocess.run(
        ["swtpm_setup", "--tpm2", "--tpm-state", state, "--pcr-banks", "sha256", "--lock-nvram",
         "--create-ek-cert", "--config", config / "setup.conf", "--runas", "root"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"swtpm_setup cannot make certificates here: {made.stdout[-300:]}")
    running = swtpm._spawn(state, tmp_path / "sock", None)
    try:
        record = provision(partial(SocketLink, running.socket), command_s=60)
        assert record.ek_certificate is not None
        assert parse_public(record.ek_public).key.__class__.__name__ == "RsaKey"
        assert provision(partial(SocketLink, running.socket), command_s=60) == record
    finally:
        running.stop()


def test_trim_der() -> None:
    der = bytes.fromhex("308203") + bytes([3]) + bytes(range(256)) * 3 + b"abc"
    for filling in (b"", b"\xff" * 20, bytes(20)):
        assert trim_der(der + filling) == der
    for broken in (
        b"",
        der[:-1],
        der + b"\x01",
        b"\x31" + der[1:],
        b"\x30\x80" + der[2:],
        b"\x30\x84" + bytes(9),
    ):
        with pytest.raises(TpmIdentityError, match="not DER"):
            trim_der(broken)
