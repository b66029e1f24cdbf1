"""Each role has the powers the design gives it and no more, and comes back when it is killed."""

from __future__ import annotations

import re
import time

import pytest

from qemu.service import ROLES
from tests.lab.conftest import Running

# `systemd-analyze security`, "overall exposure level"; lower is better. What is reached, not to be exceeded.
EXPOSURE = {"measurer": 3.9, "vault": 0.7, "gateway": 0.7, "metrics": 1.2}
USERS = {"measurer": "root", "vault": "hostd-vault", "gateway": "hostd-gateway", "metrics": "hostd-metrics"}
SYS_PTRACE, SYS_ADMIN, DAC_READ_SEARCH, CHOWN, SYS_RAWIO, SYSLOG, NET_ADMIN = 19, 21, 2, 0, 17, 34, 12
CAPABILITIES = {
    "measurer": {SYS_PTRACE, SYS_ADMIN, DAC_READ_SEARCH, CHOWN, SYS_RAWIO, SYSLOG, NET_ADMIN},
    "vault": set(),
    "gateway": set(),
    "metrics": set(),
}
LISTEN, UNCONNECTED = "0A", "07"  # states in /proc/net/tcp and /proc/net/udp
BACK = 90.0  # seconds for a role to come back and for a guest to be answered again


def test_exposure_of_the_units_stays_within_its_bound(running: Running) -> None:
    seen = {}
    for role in ROLES:
        said = running.host.run(["systemd-analyze", "security", "--no-pager", f"hostd-{role}"]).text
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
        assert found, said[-500:]
        seen[role] = float(found[1])
        lines = [line for line in said.splitlines() if line.startswith("✗")]
        print(f"hostd-{role}: {seen[role]}", *lines, sep="\n  ")
    assert all(seen[role] <= bound for role, bound in EXPOSURE.items()), seen


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_its_user_and_capabilities_and_no_more(running: Running, role: str) -> None:
    status = running.host.get(f"/proc/{running.service.pid_of(role)}/status").decode()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    uid = int(running.host.run(["id", "-u", USERS[role]]).text)
    assert fields["Uid"].split() == [str(uid)] * 4
    for which in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        mask = int(fields[which], 16)
        held = {bit for bit in range(64) if mask >> bit & 1}
        assert held <= CAPABILITIES[role], (which, held)
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"


def test_no_role_is_reachable_but_where_the_design_says(running: Running) -> None:
    """The metrics on loopback, guests on vsock: nothing else listens."""
    # Not with ss: the kernel would load tcp_diag for it, a module that the manifest does not have.
    tables = running.host.run(["cat", "/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp"]).text
    listening = [line.split()[1] for line in tables.splitlines() if line.split()[3] in (LISTEN, UNCONNECTED)]
    assert listening == ["0100007F:24F8"]  # 127.0.0.1:9464
    assert [line.split()[4] for line in running.vsock("-l")] == ["*:7700"]


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_role_comes_back_and_a_guest_is_answered_again(running: Running, role: str) -> None:
    python = running.python(running.alice)
    answer = python.ask('client.create_key("AES-256-GCM").key.id')
    assert answer.ok, answer.shown
    key = answer.value
    old = running.service.pid_of(role)

    running.host.run(["kill", "-KILL", str(old)])

    deadline = time.monotonic() + BACK
    while True:
        again = python.ask(f"client.describe_key({key!r}).key.id")
        used = again.ok and python.ask(f'client.encrypt({key!r}, b"x")')
        if used and used.ok:
            break
        assert time.monotonic() < deadline, f"no answer {BACK:g} s after {role} was killed: {again.shown}"
    assert again.value == key
    running.service.wait_active()
    assert running.service.pid_of(role) != old
    assert running.service.ctl_json("drift", "list")["drift"] == []
    python.close()
