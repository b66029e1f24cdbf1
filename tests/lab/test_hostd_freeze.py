"""`gate.freeze` on a real control group: measured while frozen, thawed after, and after a kill as well."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.measurer.freezer import NOTE, ROOT, scope_of
from qemu.guest import Guest
from qemu.service import MANIFEST
from tests.lab.conftest import Running

CONFIG = "/etc/hostd/hostd.toml"
DROP_IN = "/etc/systemd/system/hostd-measurer.service.d"
BACK_S = 60.0


def switch_of(running: Running, guest: Guest) -> str:
    cgroup = running.host.get(f"/proc/{guest.qemu_pid}/cgroup")
    return str(ROOT / scope_of(cgroup)[1:] / "cgroup.freeze")


def state(running: Running, switch: str) -> str:
    return running.host.get(switch).decode().strip()


@pytest.fixture(scope="module")
def freezing(running: Running) -> Iterator[Running]:
    """hostd with `gate.freeze = "always"`, and as it was afterwards. Each is another host to `self`, so each
    has a manifest of its own."""
    before = running.host.get(CONFIG)
    after = before.replace(b"[gate]\n", b'[gate]\nfreeze = "always"\n', 1)
    assert after != before
    drop_in = f"mkdir -p {DROP_IN} && printf '[Service]\nProtectControlGroups=no\n' > {DROP_IN}/freeze.conf"
    configure(running, after, drop_in)
    yield running
    configure(running, before, f"rm -r {DROP_IN}")


def configure(running: Running, config: bytes, units: str) -> None:
    running.host.run(["systemctl", "stop", "hostd-measurer"])
    running.host.put(config, CONFIG)
    running.host.run(f"{units} && systemctl daemon-reload && systemctl start hostd-measurer")
    running.service.wait_active()
    running.host.run(f"rm -f {MANIFEST} {MANIFEST}.sig")
    running.service.baseline()
    for line in running.service.ctl_json("drift", "list")["drift"]:
        running.service.ctl("drift", "clear", line["component"], "--reason", "configured anew")
    for guest in (running.alice, running.bob):
        if not guest.running:
            guest.start()
        running.service.give_trust(guest)


def claims_of(running: Running, guest: Guest) -> dict[str, dict[str, str]]:
    report = running.service.ctl_json("measure", "--vm", str(guest.uuid))
    return {line["component"].partition(":")[0]: dict(line["claims"]) for line in report["components"]}


def test_a_vm_stands_still_while_it_is_read_and_runs_after(freezing: Running) -> None:
    alice = freezing.python(freezing.alice)
    assert alice.ask('client.create_key("AES-256-GCM").key.id').ok
    claims = claims_of(freezing, freezing.alice)
    print(json.dumps({kind: claims[kind].get("freeze") for kind in ("process", "relro")}))
    assert all("freeze" in claims[kind] for kind in ("process", "relro"))
    assert not claims["process"]["freeze"].startswith("not frozen:")
    assert state(freezing, switch_of(freezing, freezing.alice)) == "0"
    alice.close()


def test_a_vm_that_its_operator_froze_stays_frozen(freezing: Running) -> None:
    switch = switch_of(freezing, freezing.bob)
    freezing.host.run(f"echo 1 > {shlex.quote(switch)}")
    try:
        assert claims_of(freezing, freezing.bob)["process"]["freeze"] == "frozen by others"
        assert state(freezing, switch) == "1"
    finally:
        freezing.host.run(f"echo 0 > {shlex.quote(switch)}")


def test_no_vm_stays_frozen_when_the_measurer_is_killed(freezing: Running) -> None:
    """As if it had been killed while a VM stood still."""
    switch = switch_of(freezing, freezing.alice)
    scope = str(Path(switch).parent.relative_to(ROOT))
    freezing.host.put(scope.encode(), f"/run/hostd/{NOTE}")
    old = freezing.service.pid_of("measurer")
    freezing.host.run(f"echo 1 > {shlex.quote(switch)} && kill -KILL {old}")
    deadline = time.monotonic() + BACK_S
    while state(freezing, switch) != "0":
        assert time.monotonic() < deadline, "the VM is still frozen"
        time.sleep(0.5)
    freezing.service.wait_active()
    assert freezing.host.run(f"test ! -e /run/hostd/{NOTE}").text == ""
