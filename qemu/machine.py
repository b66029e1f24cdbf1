"""One power-on of L1: a QEMU process, its swtpm, its memory and the agent's channel.

The firmware is OVMF with a TPM, so there is a TCG boot event log, and another kernel, initrd or
command line changes the PCRs (9 for the last two) as on a host with measured boot. QEMU loads the
kernel itself (``-kernel``): no boot loader, no menu.

Guest writes go through the build machine's page cache (``cache=writeback``). A killed QEMU is a power
cut for L1: what L1 had flushed is in that cache, or beyond, and the next QEMU reads it; what L1 still
held in its own memory is lost. Only a crash of the build machine would lose flushed data that
``cache=unsafe`` had not synced, so writeback costs little and is right in that case too.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qemu.channel import Channel, SocketTransport
from qemu.errors import BootError, LabError, MissingToolError
from qemu.image import Image
from qemu.process import spawn, tail

FIRMWARE: Final = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARS: Final = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
COMMAND_LINE: Final = (
    *("root=/dev/vda", "rw", "console=ttyS0", "panic=-1"),  # a panic ends QEMU (-no-reboot)
    # An emulated CPU may loop for ever at an instruction that the other one has just patched (QEMU 7.2; two
    # in some two hundred boots): after 40 s without progress that is a panic, and the lab is told.
    *("watchdog_thresh=20", "softlockup_panic=1"),
    *("ima_policy=tcb", "ima_hash=sha256"),
)
# Everything QEMU can emulate, SVM included, but for AVX: emulating its wide registers makes SHA-256 (the
# kernel's, OpenSSL's) half as fast as without.
EMULATED: Final = "max,-avx,-avx2"
SOCKET_LIMIT: Final = 10.0  # seconds for swtpm or QEMU to open its sockets
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """The machine's hardware.

    ``accel`` is ``tcg`` (emulation; works anywhere) or ``kvm`` (the build machine's, which must offer
    nested virtualisation); the default is ``$HOSTD_LAB_ACCEL``, or ``tcg``.
    """

    accel: str = field(default_factory=lambda: os.environ.get("HOSTD_LAB_ACCEL", "tcg"))
    cpus: int = 2
    memory_mib: int = 4096
    boot_limit: float = 180.0  # seconds until the agent answers; about 15 on an idle machine

    def __post_init__(self) -> None:
        if self.accel not in ("tcg", "kvm"):
            raise LabError(f"accel is {self.accel!r}, not tcg or kvm")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a machine is put together from, and what stays of it when it is off."""

    disk: Path  # qcow2 overlay
    firmware_vars: Path
    tpm_state: Path  # folder


class Machine:
    """A running L1. Made by ``start``; ended by ``wait_off``, ``kill`` or its own power-off."""

    def __init__(
        self, image: Image, parts: Parts, settings: Settings, extra: Sequence[str], run: Path, log: Path
    ) -> None:
        self.memory_fd = os.memfd_create("hostd-lab-ram")
        os.ftruncate(self.memory_fd, settings.memory_mib * MIB)
        self._log = log
        self._run = run
        self._swtpm: subprocess.Popen[bytes] | None = None
        self._qemu: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        for leftover in run.iterdir():
            leftover.unlink()  # sockets of the last power-on
        try:
            self._start_tpm(parts.tpm_state)
            self._start_qemu(image, parts, settings, extra)
            self._channel = self._greet(settings.boot_limit)
        except BaseException:
            self.kill()
            raise

    @property
    def channel(self) -> Channel:
        """The agent's channel."""
        assert self._channel is not None
        return self._channel

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._qemu is not None
        return self._qemu.pid

    @property
    def running(self) -> bool:
        """Whether QEMU still runs."""
        return self._qemu is not None and self._qemu.poll() is None

    def ended(self, limit: float) -> bool:
        """Whether QEMU has ended, or does within so many seconds: its sockets close a moment before."""
        assert self._qemu is not None
        try:
            self._qemu.wait(limit)
        except subprocess.TimeoutExpired:
            return False
        return True

    def memory(self) -> mmap.mmap:
        """L1's RAM, to read and write behind its back: the kernel there cannot notice.

        Physical addresses below 2 GiB are offsets; from 4 GiB on subtract 2 GiB (QEMU's q35).
        """
        return mmap.mmap(self.memory_fd, 0)

    def wait_off(self, limit: float) -> None:
        """Wait for L1 to power itself off, then clean up."""
        assert self._qemu is not None
        try:
            self._qemu.wait(limit)
        except subprocess.TimeoutExpired as error:
            seen = tail(self._log)
            raise BootError(f"no power-off within {limit:g} s; the console's end:\n{seen}") from error
        self.kill()

    def kill(self) -> None:
        """Cut the power; also cleans up after a machine that is already off."""
        for child in (self._qemu, self._swtpm):
            if child is not None:
                child.kill()
                child.wait()
        if self._channel is not None:
            self._channel.close()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    def _start_tpm(self, state: Path) -> None:
        """Start swtpm afresh: that is the TPM reset of a power-on."""
        control = self._run / "tpm.sock"
        words = ("swtpm", "socket", "--tpm2", "--flags", "startup-clear", "--terminate")
        argv = [*words, "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
        self._swtpm = spawn(argv, self._run / "swtpm.log")
        self._await_socket(control, self._swtpm, self._run / "swtpm.log")

    def _start_qemu(self, image: Image, parts: Parts, settings: Settings, extra: Sequence[str]) -> None:
        if not FIRMWARE.exists():
            raise MissingToolError(f"no firmware {FIRMWARE}", hint="apt-get install ovmf")
        run = self._run
        ram = f"memory-backend-file,id=ram,size={settings.memory_mib}M,share=on"
        accel = "tcg,thread=multi" if settings.accel == "tcg" else "kvm"
        argv: list[str | Path] = [
            *("qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-nic", "none"),
            *("-machine", "q35,smm=off,memory-backend=ram", "-accel", accel),
            *("-cpu", EMULATED if settings.accel == "tcg" else "host", "-smp", str(settings.cpus)),
            *("-m", str(settings.memory_mib)),
            *("-object", f"{ram},mem-path=/proc/self/fd/{self.memory_fd}"),
            *("-drive", f"if=pflash,format=raw,readonly=on,file={FIRMWARE}"),
            *("-drive", f"if=pflash,format=raw,file={parts.firmware_vars}"),
            *("-kernel", image.kernel, "-initrd", image.initrd),
            *("-append", " ".join([*COMMAND_LINE, *extra])),
            *("-drive", f"if=virtio,format=qcow2,cache=writeback,file={parts.disk}"),
            *("-chardev", f"socket,id=tpm,path={run / 'tpm.sock'}"),
            *("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={run / 'agent.sock'},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=org.hostd.lab"),
            *("-serial", f"file:{self._log}"),
            *("-serial", f"unix:{run / 'tty.sock'},server=on,wait=off"),
            *("-qmp", f"unix:{run / 'qmp.sock'},server=on,wait=off"),
        ]
        self._qemu = spawn(argv, run / "qemu.log", keep_fds=[self.memory_fd])
        self._await_socket(run / "agent.sock", self._qemu, run / "qemu.log")

    def _greet(self, limit: float) -> Channel:
        """Connect to the agent and wait for its answer, watching QEMU meanwhile."""
        assert self._qemu is not None
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(self._run / "agent.sock"))
        channel = Channel(SocketTransport(connected))
        deadline = time.monotonic() + limit
        while not channel.greeted(0.25):
            ended = self._qemu.poll() is not None
            if ended or time.monotonic() > deadline:
                channel.close()
                how = "QEMU ended" if ended else f"no answer from the agent within {limit:g} s"
                said, seen = tail(self._run / "qemu.log"), tail(self._log)
                raise BootError(f"{how}. QEMU said: {said}\nThe console's end:\n{seen}")
        return channel

    @staticmethod
    def _await_socket(path: Path, owner: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + SOCKET_LIMIT
        while not _listening(path):
            if owner.poll() is not None or time.monotonic() > deadline:
                raise BootError(f"no {path.name}; its owner said: {tail(log)}")
            time.sleep(0.01)


def _listening(path: Path) -> bool:
    """Whether somebody listens on a unix socket: it has a name some moments before it takes connections.

    /proc/net/unix (unix(7)): flags 00010000 is SO_ACCEPTCON; the path is the last of eight columns.
    """
    rows = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(len(row) == 8 and row[3] == "00010000" and row[7] == str(path) for row in rows)
