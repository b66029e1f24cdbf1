"""A machine that has drifted is suspended by libvirt, if so configured, and runs again when it is cleared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from qemu import tamper_hooks
from qemu.service import CONFIG, MANIFEST
from qemu.tamper import patch_code
from tests.lab.conftest import Running
from tests.lab.stage import QEMU, Stage

REACTED = 240.0  # seconds from a finding to the end of the last step that follows
SUSPEND = b"""
[[drift.reactions]]
kinds = ["process", "relro"]
steps = ["suspend-vm"]
"""


@pytest.fixture(scope="module")
def suspending(running: Running) -> Iterator[Running]:
    """hostd that suspends a drifted VM, and as it was afterwards. To `self` each is another host."""
    before = running.host.get(CONFIG)
    configure(running, before + SUSPEND)
    yield running
    configure(running, before)


def configure(running: Running, config: bytes) -> None:
    running.host.run(["systemctl", "stop", "hostd-measurer", "hostd-vault"])
    running.host.put(config, CONFIG)
    running.host.run(["systemctl", "start", "hostd.target"])
    running.service.wait_active()
    running.host.run(f"rm -f {MANIFEST} {MANIFEST}.sig")
    running.service.baseline()
    clear_all(running, "configured anew")
    for guest in (running.alice, running.bob):
        if not guest.running:
            guest.start()
        running.service.give_trust(guest)


def clear_all(running: Running, reason: str) -> None:
    for line in running.service.ctl_json("drift", "list")["drift"]:
        running.service.ctl("drift", "clear", line["component"], "--reason", reason)


def state_of(running: Running, name: str) -> str:
    return running.host.run(["virsh", "domstate", name]).text.strip()


def until(condition: Callable[[], bool], what: str, limit: float = REACTED) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def reactions(running: Running, component: str) -> dict[str, str]:
    for line in running.service.ctl_json("drift", "list")["drift"]:
        if line["component"] == component:
            return {step["step"]: step["outcome"] for step in line["reactions"]}
    return {}


def test_a_drifted_vm_is_suspended_and_runs_again_when_it_is_cleared(suspending: Running) -> None:
    """By a breakpoint in QEMU, which is in every machine's process, and can be taken out again."""
    host, service = suspending.host, suspending.service
    guests = {guest.name: f"process:{guest.uuid}" for guest in (suspending.alice, suspending.bob)}
    for guest in (suspending.alice, suspending.bob):
        suspending.python(guest).close()
    undo = tamper_hooks.uprobe(host, QEMU, Stage(suspending).quiet_text()[0])
    try:
        service.ctl("measure", check=False)
        for component in guests.values():
            until(lambda c=component: reactions(suspending, c).get("suspend-vm") == "done", "suspended")  # type: ignore[misc]
        assert {state_of(suspending, name) for name in guests} == {"paused"}

        # Neither a measurer nor a vault that starts again forgets it, or resumes it.
        for role in ("measurer", "vault"):
            host.run(["kill", "-KILL", str(service.pid_of(role))])
            service.wait_active()
        for component in guests.values():
            until(lambda c=component: reactions(suspending, c).get("suspend-vm") == "done", "known again")  # type: ignore[misc]
        assert {state_of(suspending, name) for name in guests} == {"paused"}
    finally:
        undo()
    clear_all(suspending, "the breakpoint is gone")
    for name in guests:
        until(lambda n=name: state_of(suspending, n) == "running", f"{name} runs again")  # type: ignore[misc]
    service.wait_measured()
    python = suspending.python(suspending.alice)
    assert python.ask("client.random(8)").ok
    python.close()


def test_a_vm_that_its_operator_paused_stays_paused(suspending: Running) -> None:
    host, service, bob = suspending.host, suspending.service, suspending.bob
    suspending.python(bob).close()
    component = f"process:{bob.uuid}"
    host.run(["virsh", "--quiet", "suspend", "bob"])
    patch_code(host, bob.qemu_pid)
    service.ctl("measure", "--vm", str(bob.uuid), check=False)
    until(lambda: reactions(suspending, component).get("suspend-vm") == "done", "reacted to")
    bob.destroy()
    clear_all(suspending, "the machine was stopped")
    bob.start()
    service.give_trust(bob)
    service.wait_measured()
    assert "the VM had been paused by others" in str(
        service.ctl_json("ledger", "list", "-n", "50")["entries"]
    )
