"""Real QEMU processes, small and fast to start."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

QEMU = "/usr/bin/qemu-system-x86_64"
MODULES = "/usr/lib/x86_64-linux-gnu/qemu"
"""A copied binary would look beside itself."""
START_S = 20.0


@dataclass(frozen=True)
class Vm:
    process: subprocess.Popen[bytes]
    uuid: str
    name: str

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def copy_of_qemu(directory: Path) -> Path:
    """A binary of our own, so that other QEMUs on this machine are not looked at."""
    path = directory / "qemu-under-test"
    shutil.copy(QEMU, path)
    path.chmod(0o755)
    return path


def start(
    binary: str | Path,
    *extra: str,
    name: str = "tested",
    vm: str | None = None,
    env: Mapping[str, str] | None = None,
    settle: bool = True,
) -> Vm:
    """Starts a paused machine without devices; returns when its main loop runs."""
    vm = vm or str(uuid.uuid4())
    control = str(_monitors() / f"{vm}-{secrets.token_hex(4)}")
    process = subprocess.Popen(
        [
            str(binary), "-accel", "tcg", "-machine", "none", "-S", "-display", "none", "-nodefaults",
            "-uuid", vm, "-name", f"guest={name}", "-qmp", f"unix:{control},server=on,wait=off", *extra,
        ],
        env={**os.environ, "QEMU_MODULE_DIR": MODULES, **(env or {})},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    started = Vm(process, vm, name)
    if settle:
        try:
            _greeting(process, control)
        except BaseException:
            started.kill()
            raise
        finally:
            _close(process.stderr)
    _close(process.stderr)
    return started


@functools.cache
def _monitors() -> Path:
    """One directory for all: where a machine's sockets may be is part of what is reviewed."""
    directory = Path(tempfile.mkdtemp(prefix="hostd-monitors-"))
    atexit.register(shutil.rmtree, directory)
    return directory


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        pipe.close()


def _greeting(process: subprocess.Popen[bytes], control: str) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(f"QEMU ended: {process.stderr.read()!r}")
        with (
            contextlib.suppress(FileNotFoundError, ConnectionError, TimeoutError),
            socket.socket(socket.AF_UNIX) as s,
        ):
            # A command that comes while the monitor is being set up may be lost: ask again.
            s.settimeout(1.0)
            s.connect(control)
            s.sendall(b'{"execute": "qmp_capabilities"}')
            answer = b""
            while b'"return"' not in answer and (part := s.recv(4096)):
                answer += part
            if answer:
                return
        time.sleep(0.01)
    raise AssertionError("QEMU did not start")


@contextlib.contextmanager
def running(binary: str | Path, *extra: str, **options: object) -> Iterator[Vm]:
    vm = start(binary, *extra, **options)  # type: ignore[arg-type]
    try:
        yield vm
    finally:
        vm.kill()
