"""A worker as the broker sees it: its process, its control socket, its end of the vault channel."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hostd
from hostd.gateway import control
from hostd.gateway.listeners import watch_process
from hostd.ipc.channel import Channel

if TYPE_CHECKING:
    from hostd.gateway.limits import Limits

_ROOT: Final = str(Path(hostd.__file__).resolve().parent.parent)
"""The worker runs the code that the broker runs, installed or not."""
_PROGRAM: Final = (
    "import sys; sys.argv[1] in sys.path or sys.path.insert(0, sys.argv[1]); "
    "from hostd.gateway.worker import main; "
    "sys.exit(main(int(sys.argv[2]), int(sys.argv[3])))"
)


def worker_command(control_fd: int, vault_fd: int) -> list[str]:
    """`-I`: no environment, no user site, no current directory decides what code runs."""
    return [sys.executable, "-I", "-c", _PROGRAM, _ROOT, str(control_fd), str(vault_fd)]


@dataclass(slots=True)
class WorkerProcess:
    """One running worker. The broker kills and reaps it; nobody else does."""

    process: subprocess.Popen[bytes]
    control: Channel[control.FromWorker]
    pidfd: int

    def kill(self) -> None:
        """Ends the worker, and with it every connection it has."""
        self.process.send_signal(signal.SIGKILL)


def spawn(limits: Limits, seccomp: bytes) -> tuple[WorkerProcess, socket.socket]:
    """Starts a worker. Returns it and the vault's end of its channel.

    Raises:
        OSError: no process or descriptor to be had.
        ChannelError: the worker was gone at once.
    """
    ours, theirs = socket.socketpair()
    vault_end, worker_end = socket.socketpair()
    try:
        process = subprocess.Popen(
            worker_command(theirs.fileno(), worker_end.fileno()),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), worker_end.fileno()),
            cwd="/",
            env={},
        )
    except OSError:
        ours.close()
        vault_end.close()
        raise
    finally:
        theirs.close()
        worker_end.close()
    # Not reaped yet, so the number is still its own.
    pidfd = watch_process(process.pid)
    channel: Channel[control.FromWorker] = Channel(ours, control.FromWorker, max_record=4096)
    if pidfd is None:
        process.kill()
        process.wait()
        channel.close()
        vault_end.close()
        raise OSError("cannot watch the worker")
    worker = WorkerProcess(process, channel, pidfd)
    channel.send(control.Start(limits, seccomp))
    return worker, vault_end
