"""What a worker can no longer do once it serves: tried from inside a process closed in like it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.conftest import GatewayProcess, Guest

ROOT = str(Path(__file__).resolve().parents[2])
INSIDE = """
import ctypes, mmap, os, resource, signal, socket, sys, threading
sys.path.insert(0, sys.argv[1])
from hostd.platform import confine
target = socket.socket(socket.AF_UNIX)
libc = ctypes.CDLL(None, use_errno=True)
confine.confine(confine.compile_filter(), descriptors=40)
def attempt():
    {attempt}
try:
    attempt()
except (OSError, ValueError, RuntimeError, MemoryError) as error:
    print("refused", error)
else:
    print("done")
"""


def inside(attempt: str) -> subprocess.CompletedProcess[str]:
    program = INSIDE.format(attempt=attempt)
    return subprocess.run(
        [sys.executable, "-c", program, ROOT], capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd')",
        "open('/proc/self/mem')",
        "os.open('x', os.O_CREAT)",
        "os.stat('/')",
        "os.listdir('/')",
        "os.unlink('/nonexistent')",
        "os.chdir('/')",
        "socket.socket()",
        "socket.socketpair()",
        "target.connect('/nonexistent')",
        "target.bind('')",
        "os.kill(1, 0)",
        "os.setuid(1)",
        "os.memfd_create('x')",
        "os.pipe()",
        "os.dup(0)",
        "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))",
        "os.pidfd_open(os.getpid())",
        "bytearray(2 << 30)",
    ],
)
def test_refused(attempt: str) -> None:
    result = inside(attempt)
    assert result.stdout.startswith("refused"), (result.stdout, result.stderr)


@pytest.mark.parametrize(
    "attempt",
    [
        "os.execv('/bin/true', ['true'])",
        "os.fork()",
        "threading.Thread(target=print).start()",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.process_vm_readv(1, 0, 0, 0, 0, 0)",
        "libc.unshare(0)",
    ],
)
def test_fatal(attempt: str) -> None:
    assert inside(attempt).returncode == -signal.SIGSYS


def test_what_the_worker_needs_goes_on() -> None:
    assert inside("os.write(1, b'') ; bytearray(1 << 20)").stdout == "done\n"


def test_a_serving_worker_is_closed_in(guest: Guest, gateway: GatewayProcess) -> None:
    (worker,) = gateway.workers()
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines() if ":" in line
    )
    assert status["Seccomp"].strip() == "2"
    assert status["NoNewPrivs"].strip() == "1"
    assert Path(f"/proc/{worker}/limits").read_text().count("Max core file size        0") == 1
    held = {int(p.name): str(p.readlink()) for p in Path(f"/proc/{worker}/fd").iterdir()}
    kinds = [name for fd, name in held.items() if fd > 2]
    assert all(name.startswith(("socket:", "anon_inode:[eventpoll]")) for name in kinds), kinds
    assert Path(f"/proc/{worker}/environ").read_bytes() in (b"", b"LC_CTYPE=C.UTF-8\0")
