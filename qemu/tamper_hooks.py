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


# In L1: writes one byte of a file's block on the disk, beneath the file system. Arguments: path, offset,
# byte (hexadecimal). The file is held open, so that its inode stays and is not measured again. FIBMAP is in
# linux/fs.h.
_RAW: Final = """
import fcntl, mmap, os, struct, subprocess, sys, time
path, offset, byte = sys.argv[1], int(sys.argv[2]), int(sys.argv[3], 16)
held = os.open(path, os.O_RDONLY)
size = struct.unpack("i", fcntl.ioctl(held, 2, struct.pack("i", 0)))[0]
block = struct.unpack("i", fcntl.ioctl(held, 1, struct.pack("i", offset // size)))[0]
disk = subprocess.check_output(["findmnt", "-n", "-o", "SOURCE", "/"], text=True).strip()
raw = os.open(disk, os.O_RDWR | os.O_DIRECT)
buffer = mmap.mmap(-1, size)
assert os.preadv(raw, [buffer], block * size) == size
assert buffer[:] == os.pread(held, size, offset // size * size), "not this file's block"
old = buffer[offset % size]
buffer[offset % size] = byte
assert os.pwritev(raw, [buffer], block * size) == size
until = time.monotonic() + 90
while os.pread(held, 1, offset)[0] != byte:
    assert time.monotonic() < until, "the page cache keeps it: somebody has it mapped"
    os.posix_fadvise(held, 0, 0, os.POSIX_FADV_DONTNEED)
    time.sleep(0.5)
print(f"{old:x}", flush=True)
time.sleep(3600)
"""
# In L1: one byte of a process's code through its memory. Arguments: pid, path of the mapped file.
_TEXT: Final = """
import sys
pid, path = sys.argv[1:]
for line in open(f"/proc/{pid}/maps"):
    place, mode, offset, _device, _inode, *name = line.split()
    if mode == "r-xp" and name == [path]:
        break
else:
    sys.exit(f"{path} is not mapped")
start, end = (int(part, 16) for part in place.split("-"))
with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
    memory.seek(start)
    at = memory.read(end - start).find(bytes.fromhex("31c0c30f1f"))
    if at < 0:
        sys.exit("no suitable instruction")
    memory.seek(start + at)
    memory.write(bytes([0x33]))
print(at + int(offset, 16))
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


def write_raw(host: LabHost, path: str, offset: int, byte: int) -> tuple[int, Undo]:
    """Changes one byte of a file on the disk, past the file system, and has it read anew: neither its times
    nor IMA tell. Only while nobody has the file mapped. The byte that was there, and what lets the file go.
    """
    command = host.start(["python3", "-c", _RAW, path, str(offset), f"{byte:x}"])
    undo = _held(command, 120.0)
    return int(command.wait_for_line(0, 1.0), 16), undo


def write_text(host: LabHost, pid: int, path: str) -> int:
    """Changes one byte of a process's code as `qemu.tamper` does with QEMU's; its offset in the file."""
    return int(host.run(["python3", "-c", _TEXT, str(pid), path]).text)


def _probe(host: LabHost, file: str, line: str, name: str) -> Undo:
    host.run(f"cd {TRACING} && echo '{line}' >> {file} && echo 1 > events/hostd_lab/{name}/enable")

    def undo() -> None:
        off = f"echo 0 > events/hostd_lab/{name}/enable && echo '-:hostd_lab/{name}' >> {file}"
        host.run(f"cd {TRACING} && {off}")

    return undo


def _held(command: Command, within_s: float = 30.0) -> Undo:
    command.wait_for_line(0, within_s)

    def undo() -> None:
        command.kill()
        command.wait(30.0, check=False)

    return undo
