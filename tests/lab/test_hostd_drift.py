"""What root changes on the host closes the gate, is named, and stays closed until an officer decides."""

from __future__ import annotations

import hashlib
import time

from tests.lab.conftest import Running

OPEN_AGAIN = 60.0  # seconds from an officer's word to the next answer
PROGRAM = "/usr/bin/factor"  # of coreutils; nothing here runs it


def test_a_replaced_program_that_is_executed_closes_the_gate_and_is_named(running: Running) -> None:
    host, service = running.host, running.service
    python = running.python(running.alice)
    made = python.ask('client.create_key("AES-256-GCM").key.id')
    assert made.ok, made.shown
    good = host.get(PROGRAM)
    changed = good + b"\0"
    host.put(changed, "/usr/bin/factor.new", mode=0o755)
    host.run(["mv", "/usr/bin/factor.new", PROGRAM])

    # On disk only, it is no drift yet; executed, it is.
    assert host.run([PROGRAM, "15"]).text == "15: 3 5"
    refused = python.ask(f'client.encrypt({made.value!r}, b"x")')

    assert not refused.ok
    assert refused.code == "refused_drift", refused.shown
    (line,) = service.ctl_json("drift", "list")["drift"]
    assert line["component"] == "ima"
    (finding,) = line["findings"]
    assert (finding["code"], finding["severity"]) == ("ima-unknown", "critical")
    assert finding["subject"] == PROGRAM
    assert finding["expected"] == "sha256:" + hashlib.sha256(good).hexdigest()
    assert finding["seen"] == "sha256:" + hashlib.sha256(changed).hexdigest()
    status = service.ctl_json("status")
    assert status["gate"] != "open"
    assert not status["keys_unlocked"]

    # The old program put back changes nothing: what ran has run.
    host.put(good, "/usr/bin/factor.new", mode=0o755)
    host.run(["mv", "/usr/bin/factor.new", PROGRAM])
    host.run([PROGRAM, "15"])
    assert not python.ask(f'client.encrypt({made.value!r}, b"x")').ok

    service.ctl("drift", "clear", "ima", "--reason", "test of a replaced program")
    # The TPM unseals the root key again, and everything is read anew.
    deadline = time.monotonic() + OPEN_AGAIN
    while not (again := python.ask(f'client.encrypt({made.value!r}, b"x")')).ok:
        assert time.monotonic() < deadline, again.shown
    entries = service.ctl_json("ledger", "list", "-n", "20")["entries"]
    assert any("test of a replaced program" in str(entry) for entry in entries)
    service.ctl("ledger", "verify")
    python.close()
