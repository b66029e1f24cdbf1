"""What was acknowledged outlives reboots and power cuts; another boot state does not get the keys."""

from __future__ import annotations

import re
import time

from qemu.errors import LabError
from qemu.service import TRUST
from tests.lab.conftest import Running

OTHER_LINE = "hostd.lab=another-command-line"
UNSEAL_LIMIT = 60.0  # seconds after the roles are up
ACKNOWLEDGED = 8  # keys before the power is cut
# Runs in a guest: creates keys without end, and says each one that the host has acknowledged.
CREATE = """
import sys
from pathlib import Path
from guestlib.attest.bundle import parse_bundle
from guestlib.client import Client
from guestlib.trust import Trust
trust = Trust.attested(parse_bundle(Path(sys.argv[1]).read_bytes()))
with Client(trust, timeout_s=60.0) as client:
    while True:
        print(client.create_key("AES-256-GCM").key.id, flush=True)
"""


def _unsealed(running: Running) -> str:
    """Waits for the outcome of the vault's first try: empty if the keys are unsealed, else the reason."""
    deadline = time.monotonic() + UNSEAL_LIMIT
    while True:
        status = running.service.ctl_json("status")
        if status["keys_unlocked"]:
            return ""
        if "unseal" in status["reason"]:
            return str(status["reason"])
        assert time.monotonic() < deadline, (status, running.service.ctl("drift", "list", check=False).text)


def _assert_as_before(running: Running) -> None:
    """No drift, and the ledger from its first entry on is what its head says."""
    drift = running.service.ctl("drift", "list").text
    assert drift == "no drift", drift
    running.service.ctl("ledger", "verify")


def test_a_clean_reboot_keeps_keys_and_raises_no_drift(running: Running) -> None:
    python = running.python(running.alice)
    made = python.ask('client.create_key("AES-256-GCM").key.id')
    sealed = python.ask(f'client.encrypt({made.value!r}, b"kept").ciphertext')
    assert sealed.ok, sealed.shown
    before = running.service.ctl_json("ledger", "list", "-n", "1")["size"]
    for guest in (running.alice, running.bob):
        guest.close()

    running.host.reboot()

    running.service.wait_active()
    assert _unsealed(running) == ""
    opened = running.python(running.alice).ask(f"client.decrypt({sealed.shown}).plaintext")
    assert opened.shown == repr(b"kept")
    assert running.service.ctl_json("ledger", "list", "-n", "1")["size"] > before
    _assert_as_before(running)


def test_a_power_cut_loses_no_acknowledged_key_and_another_command_line_unseals_none(
    running: Running,
) -> None:
    running.python(running.alice).close()  # it runs, and trusts this host
    before = running.service.ctl_json("ledger", "list", "-n", "1")["size"]
    loop = running.alice.start_command(["python3", "-c", CREATE, TRUST])
    loop.wait_for_line(ACKNOWLEDGED - 1, 180)
    running.host.power_cut()
    acknowledged = loop.stdout.decode().split("\n")[:-1]
    assert len(acknowledged) >= ACKNOWLEDGED
    for guest in (running.alice, running.bob):
        guest.close()

    # Another kernel command line is in PCR 9: the TPM keeps the root key, and who asks is told why.
    running.host.boot(OTHER_LINE)
    running.service.wait_active()
    reason = _unsealed(running)
    assert re.search(r"PCR 9\b", reason), reason
    expected, seen = re.findall(r"\b[0-9a-f]{64}\b", reason)[:2]
    assert expected != seen
    said = running.host.run(["tpm2_pcrread", "sha256:9"]).text.lower()
    assert seen in said, (seen, said)
    entries = running.service.ctl_json("ledger", "list", "-n", "20")["entries"]
    failed = [entry for entry in entries if (entry.get("event"), entry["outcome"]) == ("unseal", "failed")]
    assert failed
    assert all("PCR 9" in entry["detail"] and seen in entry["detail"] for entry in failed)
    try:
        bundle = running.service.ctl("trust", "bundle", check=False)
        assert bundle.rc != 0
    except LabError:
        pass

    # The old command line: all that was acknowledged is there and works.
    running.host.reboot()
    running.service.wait_active()
    assert _unsealed(running) == ""
    python = running.python(running.alice)
    for key in acknowledged:
        used = python.ask(f'client.decrypt(client.encrypt({key!r}, b"x").ciphertext).plaintext')
        assert used.shown == repr(b"x"), (key, used.shown)
    assert running.service.ctl_json("ledger", "list", "-n", "1")["size"] > before + len(acknowledged)
    _assert_as_before(running)
    python.close()
