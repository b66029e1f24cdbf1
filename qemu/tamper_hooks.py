"""Ways the kernel itself offers to change what runs in L1: probes, tracing, BPF programs, a stolen CID.

Each function stages one and gives what undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qemu.channel import Command
from qemu.host import LabHost

TRACING: Final = "/sys/kernel/tracing"
Undo = Callable[[], None]

# In L1: a raw tracepoint program of two instructions (r0 = 0; exit), attached until killed. bpf(2).
_BPF: Final = """
import ctypes, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    done = libc.syscall(321, command, attributes, len(attributes))
    if done < 0:
        sys.exit(f"bpf({command}): errno {ctypes.get_errno()}")
    return done
code = ctypes.create_string_buffer(bytes.fromhex("b7000000000000009500000000000000"))
text = ctypes.create_string_buffer(b"GPL")
load = struct.pack("<IIQQIIQII16s", 17, 2, ctypes.addressof(code), ctypes.addressof(text), 0, 0, 0, 0, 0,
                   b"hostd_lab")
program = bpf(5, ctypes.create_string_buffer(load, 128))
name = ctypes.create_string_buffer(b"sched_switch")
bpf(17, ctypes.create_string_buffer(struct.pack("<QI", ctypes.addressof(name), program), 128))
print("attached", flush=True)
time.sleep(3600)
"""
# In L1: holds a guest's CID without being a hypervisor. linux/vhost.h.
_CLAIM: Final = """
import fcntl, struct, sys, time
device = open("/dev/vhost-vsock", "r+b", buffering=0)
fcntl.ioctl(device, 0xAF01)
fcntl.ioctl(device, 0x4008AF60, struct.pack("<Q", int(sys.argv[1])))
print("claimed", flush=True)
time.sleep(3600)
"""


def uprobe(host: LabHost, path: str, offset: int) -> Undo:
    """A breakpoint at a file's offset, in every process that maps it."""
    return _probe(host, "uprobe_events", f"p:hostd_lab/user {path}:{offset:#x}", "user")


def kprobe(host: LabHost, symbol: str) -> Undo:
    """A probe at a kernel function."""
    return _probe(host, "kprobe_events", f"p:hostd_lab/kernel {symbol}", "kernel")


def trace(host: LabHost, symbol: str) -> Undo:
    """The function tracer on one kernel function."""
    host.run(
        f"cd {TRACING} && echo {symbol} > set_ftrace_filter && echo function > current_tracer"
        " && echo 1 > tracing_on"
    )

    def undo() -> None:
        host.run(f"cd {TRACING} && echo nop > current_tracer && echo > set_ftrace_filter")

    return undo


def attach_bpf(host: LabHost) -> Undo:
    """A BPF program that runs at every switch of tasks."""
    return _held(host.start(["python3", "-c", _BPF]))


def claim_cid(host: LabHost, cid: int) -> tuple[int, Undo]:
    """A program that is no hypervisor takes a guest's CID; its pid, and what ends it."""
    command = host.start(["python3", "-c", _CLAIM, str(cid)])
    undo = _held(command)
    pid = int(host.run(["pgrep", "-n", "-f", "0x4008AF60"]).text)
    return pid, undo


def _probe(host: LabHost, file: str, line: str, name: str) -> Undo:
    host.run(f"cd {TRACING} && echo '{line}' >> {file} && echo 1 > events/hostd_lab/{name}/enable")

    def undo() -> None:
        off = f"echo 0 > events/hostd_lab/{name}/enable && echo '-:hostd_lab/{name}' >> {file}"
        host.run(f"cd {TRACING} && {off}")

    return undo


def _held(command: Command) -> Undo:
    command.wait_for_line(0, 30.0)

    def undo() -> None:
        command.kill()
        command.wait(30.0, check=False)

    return undo
