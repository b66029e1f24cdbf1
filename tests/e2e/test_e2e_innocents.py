"""Promise: nothing that happens on a healthy host is taken for an attack, however much comes at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestlib.client import Client
from hostd.core.readings import EXEC, READ
from hostd.ipc import operating as adm
from tests.e2e.harness import VM, Host, adopted, machine, until
from tests.e2e.load import Load
from tests.support import qemu, tamper
from tests.support.innocents import Tally
from tests.support.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
LIBRARY = Path(os.path.realpath("/usr/lib/x86_64-linux-gnu/libpixman-1.so.0"))
STARTS = 1000
AT_ONCE = 3
MADV_PAGEOUT = 21
WATCH = f"6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a{0:04x}"


@pytest.fixture
def library() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        Path(name).chmod(0o755)
        yield Path(shutil.copy(LIBRARY, Path(name) / "libpixman-1.so.0"))


def test_a_thousand_machines_start_and_stop(
    binary: Path, vm: qemu.Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = Tally()

    def life(number: int) -> None:
        """Some end at once, some when they run, some are looked at first."""
        with machine(binary, vm=f"{WATCH[:-4]}{number:04x}", settle=number % 3 != 0):
            if number % 3 == 2:
                time.sleep(0.05)
        tally.add("machine started and stopped")

    with watched(binary, vm, tally, capsys), ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(life, range(STARTS)))
    assert tally.total == STARTS


def test_memory_files_and_machines_in_motion(
    binary: Path, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = Tally()
    env = {"LD_LIBRARY_PATH": str(library.parent)}
    with tempfile.TemporaryDirectory() as place:
        monitor = Path(place) / "monitor"
        control = ("-qmp", f"unix:{monitor},server=on,wait=off")
        with machine(binary, *control, env=env) as steady, watched(binary, steady, tally, capsys):
            for kind, times, event in _events(steady, binary, library, env, monitor):
                for _ in range(times):
                    event()
                    tally.add(kind)
    assert tally.total > 400


def _events(
    steady: qemu.Vm, binary: Path, library: Path, env: dict[str, str], monitor: Path
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    kernel = Path("/proc/sys/vm")
    compact, caches = kernel / "compact_memory", kernel / "drop_caches"
    if compact.exists():
        yield "memory compacted", 50, lambda: compact.write_text("1")
    yield "page cache dropped", 20, lambda: caches.write_text("1")
    yield "text of a machine paged out", 50, lambda: _page_out(steady)
    yield "file of a machine touched", 50, lambda: os.utime(library)
    yield (
        "file of a machine replaced by its equal, machine started",
        20,
        lambda: _replace(binary, library, env),
    )
    yield "process run", 200, lambda: subprocess.run(["/bin/true"], check=True)
    for command in ("stop", "cont", "system_reset"):
        yield f"machine told: {command}", 20, lambda command=command: _tell(monitor, command)


def _page_out(vm: qemu.Vm) -> None:
    text = tamper.mapping(vm.pid, "qemu-under-test", READ | EXEC)
    tamper.syscall(vm.pid, tamper.SYS_MADVISE, text.start, text.end - text.start, MADV_PAGEOUT)


def _replace(binary: Path, library: Path, env: dict[str, str]) -> None:
    other = library.with_name("new")
    shutil.copy(library, other)
    other.rename(library)
    with machine(binary, env=env, vm=WATCH):
        time.sleep(0.05)


def _tell(monitor: Path, command: str) -> None:
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(10.0)
        control.connect(str(monitor))
        with control.makefile("rw") as lines:
            lines.readline()
            for name in ("qmp_capabilities", command):
                lines.write(json.dumps({"execute": name}))
                lines.flush()
                while "return" not in json.loads(lines.readline()):
                    pass


@contextlib.contextmanager
def watched(binary: Path, vm: qemu.Vm, tally: Tally, capsys: pytest.CaptureFixture[str]) -> Iterator[Host]:
    """A host that serves machine `vm`, which asks all the while. At the end nothing was found, and no role
    has died."""
    with adopted(binary) as host, contextlib.ExitStack() as stack:
        host.ask(adm.BindVm(vm=VM, tenant="acme"), adm.Nothing)
        path = host.directory / "relay.sock"
        relay = Relay(path, vm.pid, host.guest_socket)
        stack.callback(relay.close)

        def client() -> Client:
            made = Client(host.trust(), f"unix:{path}", timeout_s=20.0)
            stack.callback(made.close)
            return made

        before = host.pids()
        with Load(host, threads=2, creating=False, client=client) as load:
            yield host
            assert host.drift() == {}, tally.report(-1, len(load.answers))
            load.answered_after(time.monotonic(), 20)
            until(lambda: len(load.answers) > 50, "enough was answered", 60)
        findings = sum(map(len, host.drift().values()))
        with capsys.disabled():
            print(f"\n{tally.report(findings, len(load.answers))}; other answers {dict(load.errors)}")
        assert findings == 0, host.drift()
        assert not [e for e in host.ledger() if e["event"] == "drift" or e["outcome"] == "refused-drift"]
        load.check()
        assert host.pids() == before, "a role died"
