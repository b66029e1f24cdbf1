"""A whole hostd on this machine: state directory, `hostd run`, officers' commands, clients.

Nothing here is a simulation: the roles are processes under the supervisor, the TPM is the embedded
swtpm, the hypervisors are QEMU processes of a binary of our own, so that others on this machine are
not looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from guestlib.attest.bundle import parse_bundle
from guestlib.client import Client
from guestlib.errors import HostdError, TransportError
from guestlib.trust import Trust
from hostd.admin.link import Link
from hostd.config import Config, load_config
from hostd.ipc import operating as adm
from hostd.platform import program
from tests.support import officers, qemu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

T = TypeVar("T")
ROLES = ("measurer", "vault", "gateway", "metrics")
READY_S = 30.0
"""For a start, or for service to be back: this machine may be busy."""
POLL_S = 0.02
VM = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0001"

CONFIG = """\
[host]
state_dir = "{directory}/state"
run_dir = "{directory}/run"

[hypervisor]
binaries = ["{binary}"]
provider = "proc"
allow_jit = true

[measure]
require = ["posture", "files"]
survey = ["{binary}"]
{measure}
[gateway]
vsock_port = 0
{gateway}
[metrics]
port = 0
{more}
"""


def until(condition: Callable[[], T | None], what: str, seconds: float = READY_S) -> T:
    """Waits until `condition` gives something true, and gives it back."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(POLL_S)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [below for child in found for below in descendants(child)]


@dataclass
class Settings:
    """What differs from the plain development configuration, as TOML lines."""

    measure: str = ""
    gateway: str = ""
    more: str = ""
    uids: Mapping[str, int] = field(default_factory=dict)
    """Role → uid; empty: all roles run as this user."""
    officers: tuple[str, ...] = ("officer",)
    """Names of officers; each gets a key."""
    quorum: int = 1


class Host:
    """One hostd in a directory of its own."""

    def __init__(self, directory: Path, binary: Path, settings: Settings | None = None) -> None:
        self.directory = directory
        self.binary = binary
        self.settings = settings or Settings()
        self.supervisor: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def config_path(self) -> Path:
        return self.directory / "hostd.toml"

    @property
    def config(self) -> Config:
        return load_config(self.config_path)

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def guest_socket(self) -> Path:
        return self.run / "guest.sock"

    @property
    def log_path(self) -> Path:
        return self.directory / "log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def write_config(self) -> None:
        settings = self.settings
        users = "".join(f"{role} = {uid}\n" for role, uid in settings.uids.items())
        more = settings.more + (f"[users]\n{users}" if users else "") + self.officers_section()
        self.config_path.write_text(
            CONFIG.format(
                directory=self.directory,
                binary=self.binary,
                measure=settings.measure,
                gateway=settings.gateway,
                more=more,
            )
        )

    def officer(self, name: str) -> officers.Officer:
        """An officer's key; made when it is first asked for."""
        made = officers.Officer(self.directory / name)
        return made if made.path.exists() else officers.make(self.directory, name)

    def officers_section(self) -> str:
        keys = json.dumps([self.officer(name).line for name in self.settings.officers])
        return f"[officers]\nkeys = {keys}\nquorum = {self.settings.quorum}\n"

    def setup(self, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`hostd setup`; the run directory is as tmpfiles.d makes it: every role may add its sockets."""
        self.write_config()
        if not self.run.exists():
            self.run.mkdir()
            self.run.chmod(0o1777 if self.settings.uids else 0o755)
        return self.hostd("setup", check=check)

    def hostd(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            program.command("--config", str(self.config_path), *arguments),
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    # ── Processes ─────────────────────────────────────────────────────────────────────────────────

    def start(self, seconds: float = READY_S) -> None:
        """`hostd run`; returns when the officers' socket answers."""
        with self.log_path.open("ab") as log:
            self.supervisor = subprocess.Popen(
                program.command("--config", str(self.config_path), "run"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self.status, "the vault answers", seconds)

    def stop(self) -> None:
        """An orderly end."""
        self.close_clients()
        if self.supervisor is None:
            return
        below = descendants(self.supervisor.pid)
        self.supervisor.terminate()
        try:
            self.supervisor.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.supervisor = None
        until(lambda: not any(map(alive, below)), "all processes have ended", 30)

    def kill(self) -> None:
        """kill -9 of everything at once, as a power loss does (for the processes)."""
        assert self.supervisor is not None
        everything = [self.supervisor.pid, *descendants(self.supervisor.pid)]
        # Stopped first: the supervisor must not see its roles die before it.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in everything:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.supervisor.wait()
        self.supervisor = None
        until(lambda: not any(map(alive, everything)), "all processes are dead", 30)

    def pids(self) -> dict[str, int]:
        """Roles that run now, as the supervisor wrote them down."""
        lines = (self.run / "pids").read_text().split("\n")
        return {role: int(pid) for role, pid in (line.split() for line in lines if line)}

    def pid(self, role: str) -> int:
        return until(lambda: (p := self.pids().get(role)) and alive(p) and p, f"{role} runs")

    def workers(self) -> list[int]:
        return children(self.pid("gateway"))

    def swtpm(self) -> int:
        assert self.supervisor is not None
        for pid in descendants(self.supervisor.pid):
            with contextlib.suppress(FileNotFoundError):
                if "swtpm" in Path(f"/proc/{pid}/comm").read_text():
                    return pid
        raise AssertionError("no swtpm runs")

    # ── Officers ──────────────────────────────────────────────────────────────────────────────────

    def ask(self, command: Any, result: type[T], timeout_s: float = 30.0) -> T:
        """An officer's command, without the cost of a process."""
        link = Link(self.config, timeout_s=timeout_s)
        try:
            return link.ask(command, result)
        finally:
            link.close()

    def status(self) -> adm.StatusReport | None:
        with contextlib.suppress(TransportError):
            return self.ask(adm.Status(), adm.StatusReport, 5.0)
        return None

    def wait_open(self, seconds: float = READY_S) -> adm.StatusReport:
        return until(lambda: (s := self.status()) and s.gate == "open" and s, "the gate is open", seconds)

    def hostctl(
        self, *arguments: str, check: bool = True, given: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hostd.admin.hostctl", "--config", str(self.config_path), *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    def hostctl_json(self, *arguments: str) -> Any:
        return json.loads(self.hostctl("--json", *arguments).stdout)

    def drift(self) -> dict[str, list[dict[str, str]]]:
        """`hostctl --json drift list`: component → its findings by field."""
        return {
            line["component"]: [{"component": line["component"], **f} for f in line["findings"]]
            for line in self.hostctl_json("drift", "list")["drift"]
        }

    def ledger(self) -> list[dict[str, Any]]:
        """All entries, as they are on the disk."""
        return [json.loads(line) for line in (self.state / "ledger.jsonl").read_bytes().splitlines()]

    def install(self, manifest: Path) -> None:
        """Every officer signs, and it comes into force."""
        for name in self.settings.officers:
            self.hostctl("manifest", "sign", str(manifest), "-k", str(self.officer(name).path))
        self.hostctl("manifest", "install", str(manifest))

    def adopt(self, *tenants: tuple[str, int]) -> None:
        """Manifest of what runs now, tenants with one user each, and a trust bundle."""
        base = self.directory / "base.json"
        until(
            lambda: self.hostctl("manifest", "from-host", "-o", str(base), check=False).returncode == 0,
            "capture",
        )
        self.install(base)
        self.wait_open()
        for name, uid in tenants:
            self.ask(adm.CreateTenant(name=name), adm.Nothing)
            self.ask(adm.BindUser(uid=uid, tenant=name), adm.Nothing)
        self.hostctl("trust", "bundle", "-o", str(self.directory / "trust.json"))

    # ── Clients ───────────────────────────────────────────────────────────────────────────────────

    def trust(self, *, attested: bool = False) -> Trust:
        """Evidence on every connection, or (it connects to a drifted host too) the channel CA alone."""
        bundle = parse_bundle((self.directory / "trust.json").read_bytes())
        if attested:
            return Trust.attested(bundle)
        return Trust.channel_ca("".join(map(ssl.DER_cert_to_PEM_cert, bundle.channel_cas)))

    def client(self, *, attested: bool = False, timeout_s: float = 15.0) -> Client:
        """A client of this process's user."""
        trust = self.trust(attested=attested)
        client = Client(trust, f"unix:{self.guest_socket}", timeout_s=timeout_s)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    def serves(self, client: Client, seconds: float = READY_S) -> None:
        """Waits until a gated request is answered."""
        until(lambda: _answers(client), "a request is answered", seconds)

    def vm(self, *extra: str, vm: str = VM, **options: Any) -> qemu.Vm:
        return qemu.start(self.binary, *extra, vm=vm, **options)


def _answers(client: Client) -> bool:
    with contextlib.suppress(HostdError):
        client.random(8)
        return True
    return False


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory that other users may go through, with a path short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="hostd-e2e-"))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made)


@contextlib.contextmanager
def machine(binary: Path, *extra: str, **options: Any) -> Iterator[qemu.Vm]:
    with qemu.running(binary, *extra, **{"vm": VM, **options}) as vm:
        yield vm


@contextlib.contextmanager
def prepared(binary: Path, settings: Settings | None = None) -> Iterator[Host]:
    """A host that is set up and not started; whatever happens, nothing of it is left."""
    with directory() as place:
        host = Host(place, binary, settings)
        host.setup()
        try:
            yield host
        finally:
            host.close_clients()
            if host.supervisor is not None:
                host.kill()
            print(f"── log of the roles ──\n{host.log()}")


@contextlib.contextmanager
def adopted(
    binary: Path, settings: Settings | None = None, *, tenants: tuple[tuple[str, int], ...] = (("acme", 0),)
) -> Iterator[Host]:
    """A host that serves: started, manifest in force, user 0 in tenant acme. The VMs that run now are
    in its manifest."""
    with prepared(binary, settings) as host:
        host.start()
        until(lambda: (s := host.status()) and s.keys_unlocked, "the root key is unsealed")
        host.adopt(*tenants)
        host.wait_open()
        yield host
        host.stop()
