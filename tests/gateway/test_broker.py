"""Callers, workers and the vault's coming and going: real processes, killed for real."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostd.gateway.listeners import listen_unix, vsock_caller
from tests.gateway.conftest import GatewayProcess, Guest
from tests.gateway.support_vault import SimulatedVault, readable, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

RANDOM = {"id": 1, "op": "GenerateRandom", "args": {"length": 2}}


@pytest.mark.parametrize(
    ("cid", "taken"),
    [
        (0, False),
        (1, False),
        (2, False),
        (3, True),
        (2**32 - 2, True),
        (2**32 - 1, False),
        (2**32, False),
        (-1, False),
    ],
)
def test_vsock_callers_that_are_no_guest(cid: int, taken: bool) -> None:
    assert (vsock_caller((cid, 1024)) is not None) == taken


def test_a_stale_socket_is_replaced_and_nothing_else(run_dir: Path) -> None:
    path = run_dir / "s"
    listen_unix(path).close()
    second = listen_unix(path)
    assert path.stat().st_mode & 0o777 == 0o666
    second.close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        listen_unix(path)
    assert path.read_text() == "precious"


def test_the_vault_is_told_what_the_kernel_says(guest: Guest, vault: SimulatedVault) -> None:
    (bind,) = vault.binds
    assert (bind.cid, bind.pid, bind.uid) == (0, os.getpid(), os.getuid())


def test_one_worker_per_calling_process(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    with Guest(gateway.path, vault.ca.pem), Guest(gateway.path, vault.ca.pem):
        assert len(gateway.workers()) == 1
        program = (
            f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(gateway.path)!r}); input()"
        )
        other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
        wait_for(lambda: len(vault.binds) == 2)
        assert vault.binds[1].pid == other.pid
        assert len(gateway.workers()) == 2
        other.communicate(b"\n")
        # Its number may be another process's next.
        wait_for(lambda: len(gateway.workers()) == 1)


def test_connections_are_bounded(start: Callable[..., GatewayProcess], vault: SimulatedVault) -> None:
    gateway = start(connections_per_caller=3)
    guests = [Guest(gateway.path, vault.ca.pem) for _ in range(3)]
    with pytest.raises((EOFError, OSError)):
        Guest(gateway.path, vault.ca.pem)
    guests.pop().tls.close()
    wait_for(lambda: _connects(gateway, vault))
    for guest in guests:
        guest.tls.close()


def _connects(gateway: GatewayProcess, vault: SimulatedVault) -> bool:
    try:
        with Guest(gateway.path, vault.ca.pem) as guest:
            return "ok" in guest.ask(RANDOM)
    except (EOFError, OSError):
        return False


def test_workers_are_bounded(start: Callable[..., GatewayProcess], vault: SimulatedVault) -> None:
    gateway = start(workers=1)
    with Guest(gateway.path, vault.ca.pem):
        program = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(1))"
        )
        command = [sys.executable, "-c", program, str(gateway.path)]
        other = subprocess.run(command, capture_output=True, timeout=10, check=True)
        assert other.stdout.strip() == b"b''"
        assert len(vault.binds) == 1


def test_workers_of_one_user_are_bounded(
    run_dir: Path, vault: SimulatedVault, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = "import hostd.gateway.broker as broker; broker.WORKERS_PER_USER = 2\nrun(Config"
    module = sys.modules[GatewayProcess.__module__]
    monkeypatch.setattr(module, "PROGRAM", module.PROGRAM.replace("run(Config", fewer))
    gateway = GatewayProcess(run_dir)
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(1))"
    )
    command = [sys.executable, "-c", program, str(gateway.path)]
    with Guest(gateway.path, vault.ca.pem) as guest:
        # It says nothing, so its worker waits for its handshake.
        second = subprocess.Popen(command, stdout=subprocess.PIPE)
        wait_for(lambda: len(vault.binds) == 2)
        third = subprocess.run(command, capture_output=True, timeout=10, check=True)
        assert third.stdout.strip() == b"b''"
        assert len(vault.binds) == 2
        assert len(gateway.workers()) == 2
        assert second.poll() is None
        assert "ok" in guest.ask(RANDOM)
        second.kill()
        second.communicate()
        wait_for(lambda: len(gateway.workers()) == 1)
        # The place of one that ended is another's.
        fourth = subprocess.Popen(command, stdout=subprocess.PIPE)
        wait_for(lambda: len(vault.binds) == 3)
        fourth.kill()
        fourth.communicate()
        assert "ok" in guest.ask(RANDOM)
    gateway.stop()


def test_a_flood_of_connections_leaves_the_gateway_serving(
    gateway: GatewayProcess, vault: SimulatedVault
) -> None:
    flood = []
    for _ in range(300):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect_ex(str(gateway.path))
        flood.append(sock)
    time.sleep(0.5)
    assert len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir())) < 60
    for sock in flood:
        sock.close()
    wait_for(lambda: _connects(gateway, vault))


def test_connections_wait_for_their_worker_in_bounded_number(
    gateway: GatewayProcess, vault: SimulatedVault
) -> None:
    vault.silent = True
    waiting = []
    for _ in range(20):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(gateway.path))
        waiting.append(sock)
    wait_for(lambda: sum(readable(sock, 0) for sock in waiting) == 4)
    assert len(gateway.workers()) == 1
    for sock in waiting:
        sock.close()


def test_waiting_connections_count_as_connections(
    start: Callable[..., GatewayProcess], vault: SimulatedVault
) -> None:
    gateway = start(connections_per_caller=3)
    vault.silent = True
    waiting = []
    for _ in range(10):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(gateway.path))
        waiting.append(sock)
    wait_for(lambda: sum(readable(sock, 0) for sock in waiting) == 7)
    for sock in waiting:
        sock.close()


def test_a_caller_nobody_knows_is_closed(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    vault.refuse = "no such VM"
    with pytest.raises((EOFError, OSError)):
        Guest(gateway.path, vault.ca.pem)
    wait_for(lambda: not gateway.workers())
    assert "no such VM" in gateway.log.read_text()


def test_unbound_closes_what_is_open(guest: Guest, gateway: GatewayProcess, vault: SimulatedVault) -> None:
    assert "ok" in guest.ask(RANDOM)
    vault.unbind(vault.binds[0].bind)
    assert guest.closed()
    wait_for(lambda: not gateway.workers())


def test_a_killed_worker_is_replaced(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    with Guest(gateway.path, vault.ca.pem) as guest:
        (worker,) = gateway.workers()
        os.kill(worker, signal.SIGKILL)
        assert guest.closed()
    wait_for(lambda: "died with status -9" in gateway.log.read_text())
    # Not at once: a guest that kills its worker does not get processes without end.
    assert not _connects(gateway, vault)
    wait_for(lambda: _connects(gateway, vault))
    assert gateway.workers() != [worker]
    assert len(vault.binds) == 2


def test_the_vault_goes_and_comes_back(run_dir: Path) -> None:
    with SimulatedVault(run_dir) as vault:
        gateway = GatewayProcess(run_dir)
        guest = Guest(gateway.path, vault.ca.pem)
    try:
        assert guest.closed()
        guest.tls.close()
        wait_for(lambda: not gateway.workers())
        with socket.socket(socket.AF_UNIX) as sock:  # it listens on, and closes
            sock.connect(str(gateway.path))
            assert sock.recv(1) == b""
        with SimulatedVault(run_dir) as vault:
            wait_for(lambda: _connects(gateway, vault))
    finally:
        gateway.stop()


def test_a_vault_of_another_user_is_not_accepted(run_dir: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from hostd.config import *; from hostd.gateway.main import run\n"
        "run(Config(host=Host(run_dir=sys.argv[2]), users=Users(vault=65534), gateway=Gateway(vsock_port=0)))"
    )
    root = str(Path(__file__).resolve().parents[2])
    with SimulatedVault(run_dir) as vault:
        process = subprocess.Popen(
            [sys.executable, "-c", program, root, str(run_dir)], stderr=subprocess.PIPE
        )
        wait_for(lambda: (run_dir / "guest.sock").exists())
        time.sleep(0.3)
        process.terminate()
        assert b"its user is uid" in process.communicate(timeout=10)[1]
        assert not vault.binds


def test_workers_die_with_the_broker(run_dir: Path, vault: SimulatedVault) -> None:
    gateway = GatewayProcess(run_dir)
    with Guest(gateway.path, vault.ca.pem) as guest:
        gateway.process.kill()
        gateway.process.wait()
        assert guest.closed()


def test_a_worker_retires_before_its_certificate_ends(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    vault.life_s = 8.0
    with Guest(gateway.path, vault.ca.pem) as old:
        (worker,) = gateway.workers()
        vault.life_s = 3600.0
        wait_for(lambda: _connects(gateway, vault) and len(vault.binds) == 2)
        with Guest(gateway.path, vault.ca.pem) as new:
            assert len(gateway.workers()) == 2
            assert "ok" in old.ask(RANDOM)
            assert old.closed()  # when its certificate ends
            assert "ok" in new.ask(RANDOM)
        wait_for(lambda: worker not in gateway.workers())


def test_another_channel_ca_ends_no_connection(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    """Open connections go on; new ones are a new worker's, with a certificate by the new CA."""
    with Guest(gateway.path, vault.ca.pem) as old:
        (worker,) = gateway.workers()
        before = vault.rotate()
        wait_for(lambda: _connects(gateway, vault))
        with pytest.raises(ssl.SSLCertVerificationError):
            Guest(gateway.path, before.pem)
        with Guest(gateway.path, vault.ca.pem) as new:
            assert len(vault.binds) == 2
            assert len(gateway.workers()) == 2
            for guest in (old, new, old):
                assert "ok" in guest.ask(RANDOM)
        assert worker in gateway.workers()
        assert "ok" in old.ask(RANDOM)


def test_an_encrypted_or_foreign_key_ends_the_worker(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    import msgspec

    vault.identity = msgspec.structs.replace(vault.ca.issue(), private_key=vault.ca.issue().private_key)
    with pytest.raises((EOFError, OSError)):
        Guest(gateway.path, vault.ca.pem)
    wait_for(lambda: not gateway.workers())
