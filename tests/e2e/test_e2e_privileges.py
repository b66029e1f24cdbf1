"""Promise: each role's socket answers its one peer; everybody else is closed or cannot connect."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import Host, Settings, adopted, prepared, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
UIDS = {"vault": 64001, "gateway": 64002, "metrics": 64003, "measurer": 0}
STRANGER = 64099
ANSWERED, CLOSED, REFUSED = "open", "closed", "refused"
NETWORKED = ("libcurl", "libldap", "libkrb5", "libtss2-fapi")
"""What comes into the process with a tpm2-pytss that was built with FAPI (qemu/lean_pytss.py)."""
_PROBE = """
import os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
s = socket.socket(socket.AF_UNIX)
s.settimeout(1.0)
try:
    s.connect(path)
except PermissionError:
    print("refused"); sys.exit()
try:
    print("closed" if s.recv(1) == b"" else "open")
except ConnectionResetError:
    print("closed")
except TimeoutError:
    print("open")
"""


@pytest.fixture(scope="module")
def shared(binary: Path) -> Iterator[Host]:
    with adopted(binary, Settings(uids=UIDS)) as host:
        yield host


def knock(host: Host, name: str, uid: int) -> str:
    """What happens to a connection of a user that says nothing."""
    return subprocess.run(
        [sys.executable, "-I", "-c", _PROBE, str(host.run / name), str(uid)],
        capture_output=True, text=True, timeout=20, check=True,
    ).stdout.strip()  # fmt: skip


def test_it_serves(shared: Host) -> None:
    client = shared.client()
    key = client.create_key().key.id
    assert client.decrypt(client.encrypt(key, b"x").ciphertext).plaintext == b"x"


def test_roles_run_as_their_users(shared: Host) -> None:
    for role, uid in UIDS.items():
        status = Path(f"/proc/{shared.pid(role)}/status").read_text()
        assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
        assert f"Gid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
        # Whoever is not dumpable has its files in /proc owned by root: no core, no debugger of its user.
        if role != "measurer":
            assert Path(f"/proc/{shared.pid(role)}/environ").stat().st_uid == 0
            assert "CapEff:\t0000000000000000" in status
    for worker in shared.workers():
        status = Path(f"/proc/{worker}/status").read_text()
        assert f"Uid:\t{UIDS['gateway']}\t" in status
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status


def test_the_vault_has_no_library_that_speaks_to_networks(shared: Host) -> None:
    maps = Path(f"/proc/{shared.pid('vault')}/maps").read_text()
    mapped = {line.rpartition("/")[2] for line in maps.splitlines()}
    assert any(name.startswith("libtss2-esys") for name in mapped)
    assert [name for name in mapped if name.startswith(NETWORKED)] == []


@pytest.mark.parametrize("name", ["measurer.sock", "broker.sock", "metrics.sock", "swtpm.sock", "admin.sock"])
@pytest.mark.parametrize("who", ["vault", "gateway", "metrics", "stranger"])
def test_only_its_peer(shared: Host, name: str, who: str) -> None:
    peers = {
        "measurer.sock": "vault",
        "broker.sock": "gateway",
        "metrics.sock": "metrics",
        "swtpm.sock": "vault",
        "admin.sock": "root",
    }
    if peers[name] == who:
        pytest.skip("its peer")
    assert knock(shared, name, UIDS.get(who, STRANGER)) in (CLOSED, REFUSED)


def test_guests_socket_is_open_to_every_user(shared: Host) -> None:
    assert knock(shared, "guest.sock", STRANGER) == ANSWERED


def test_state_is_the_vaults_alone(shared: Host) -> None:
    assert (shared.state.stat().st_uid, shared.state.stat().st_mode & 0o777) == (UIDS["vault"], 0o700)
    for path in shared.state.rglob("*"):
        assert path.stat().st_uid == UIDS["vault"] or path.parent.name == "swtpm", path
    for uid in (UIDS["gateway"], UIDS["metrics"], STRANGER):
        done = subprocess.run(
            ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "ls", str(shared.state)],
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode != 0


@pytest.mark.parametrize("name", ["measurer.sock", "broker.sock", "metrics.sock", "admin.sock"])
def test_a_socket_of_somebody_else_is_not_the_role(binary: Path, name: str) -> None:
    """Somebody who got there first and listens in a role's place: the role replaces it or does not speak
    to it, and nothing is answered by the impostor."""
    with prepared(binary, Settings(uids=UIDS)) as host:
        place = host.run / name
        impostor = socket.socket(socket.AF_UNIX)
        impostor.bind(str(place))
        os.chown(place, STRANGER, STRANGER)
        place.chmod(0o666)
        impostor.listen(8)
        impostor.settimeout(0.5)
        with impostor, contextlib.suppress(AssertionError):
            host.start(seconds=3)
            until(lambda: (s := host.status()) and s.keys_unlocked, "it runs in spite of it", 3)
        # Whoever connected to the impostor sent it nothing.
        with contextlib.suppress(OSError):
            connection, _ = impostor.accept()
            assert connection.recv(1) == b""
        host.kill()
