"""A real broker with real workers over unix sockets, and a simulated vault."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.support_vault import SimulatedVault, echo, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from hostd.config import Config, Gateway, Host
from hostd.gateway.main import run
run(Config(host=Host(run_dir=sys.argv[2]), gateway=Gateway(vsock_port=0, **json.loads(sys.argv[3]))))
"""


class GatewayProcess:
    def __init__(self, run: Path, **settings: Any) -> None:
        self.run = run
        self.path = run / "guest.sock"
        self.log = run / "gateway.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(ROOT), str(run), json.dumps(settings)], stderr=log
            )
        wait_for(lambda: "the vault is there" in self.log.read_text() or self.process.poll() is not None)

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split() if _is_worker(int(pid))]

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(10) == 0, self.log.read_text()


def _is_worker(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Guest:
    """A guest of the lowest kind: frames by hand over TLS."""

    def __init__(self, path: Path, pem: str, *, hello: bool = True) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=pem)
        raw = socket.socket(socket.AF_UNIX)
        raw.settimeout(10)
        raw.connect(str(path))
        try:
            self.tls = context.wrap_socket(raw, server_hostname="hostd.channel")
        except OSError:
            raw.close()
            raise
        if hello:
            assert "ok" in self.ask({"id": 0, "op": "hello", "args": {"versions": [1]}})

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.tls.close()

    def send(self, *messages: Any) -> None:
        self.tls.sendall(b"".join(map(frame, messages)))

    def receive(self) -> dict[str, Any]:
        (length,) = struct.unpack(">I", self._exactly(4))
        answer: dict[str, Any] = json.loads(self._exactly(length))
        return answer

    def ask(self, message: Any) -> dict[str, Any]:
        self.send(message)
        return self.receive()

    def closed(self) -> bool:
        """Whether the host closes the connection, having said nothing more."""
        try:
            return self.tls.recv(1) == b""
        except ConnectionError:
            return True

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.tls.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data


def frame(message: Any) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


@pytest.fixture
def run_dir() -> Iterator[Path]:
    # Short: a unix socket's path has 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="hostd-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def vault(run_dir: Path) -> Iterator[SimulatedVault]:
    with SimulatedVault(run_dir, echo) as vault:
        yield vault


@pytest.fixture
def start(vault: SimulatedVault, run_dir: Path) -> Iterator[Callable[..., GatewayProcess]]:
    """Starts the gateway with settings of its section."""
    started: list[GatewayProcess] = []

    def make(**settings: Any) -> GatewayProcess:
        started.append(GatewayProcess(run_dir, **settings))
        return started[-1]

    yield make
    for gateway in started:
        gateway.stop()


@pytest.fixture
def gateway(start: Callable[..., GatewayProcess]) -> GatewayProcess:
    return start()


@pytest.fixture
def guest(gateway: GatewayProcess, vault: SimulatedVault) -> Iterator[Guest]:
    with Guest(gateway.path, vault.ca.pem) as guest:
        yield guest
