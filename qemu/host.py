"""L1, the lab's host, over its whole life: booted, rebooted, cut off, rolled back.

    with LabHost() as host:
        host.boot()
        print(host.run(["uname", "-r"]).text)

A ``LabHost`` owns a disk (an overlay on the cached image), a TPM and firmware variables. They outlive
a power-off, and go with the object. Errors are those of ``qemu.errors``.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from qemu.cache import cache_root
from qemu.channel import Channel, Command, Transport
from qemu.errors import BootError, ChannelClosedError, LabError, PowerStateError, Result
from qemu.image import ensure_image
from qemu.machine import FIRMWARE_VARS, Machine, Parts, Settings
from qemu.process import run_tool, step
from qemu.workdir import WorkDir

SETTLE_LIMIT: Final = 120.0  # seconds from the agent's answer to the end of systemd's start-up
OFF_LIMIT: Final = 90.0  # seconds for a clean power-off; systemd's own limit for a unit that hangs
ENDS_LIMIT: Final = 10.0  # seconds from the loss of the channel to QEMU's end
COPY_LIMIT: Final = 600.0  # seconds for a tree
_boots = itertools.count(1)


class LabHost:
    """The lab's host. Not thread-safe, except ``run``, ``start``, ``put``, ``get``, ``connect``."""

    def __init__(
        self, settings: Settings | None = None, *, logs: Path | None = None, disk: Path | None = None
    ) -> None:
        """Make a machine that is off, with a fresh disk and TPM.

        ``logs`` gets the console logs. The disk starts as the image's, or as ``disk``, a qcow2 file that
        is not written to (``qemu.installed`` makes one).
        """
        self.settings = settings or Settings()
        self.image = ensure_image()
        self.logs = logs or cache_root() / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.console_log: Path | None = None
        self._work = WorkDir()
        self._machine: Machine | None = None
        work = self._work.path
        self._parts = Parts(work / "disk.qcow2", work / "vars.fd", work / "tpm")
        for folder in ("tpm", "run", "snapshots"):
            (work / folder).mkdir()
        shutil.copyfile(FIRMWARE_VARS, self._parts.firmware_vars)
        below = ("raw", self.image.disk) if disk is None else ("qcow2", disk)
        make = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", below[0], "-b", below[1])
        run_tool([*make, self._parts.disk], timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Power.

    def boot(self, *extra: str, settled: bool = True) -> None:
        """Power on, with ``extra`` words on the kernel's command line.

        Returns when systemd has started everything (``settled``), or as soon as the agent answers. An
        emulated host that dies on the way is, saying so, started once more.

        Raises:
            BootError: it does not come up, the second time either; or a unit failed.
        """
        if self._machine is not None:
            raise PowerStateError("the host is already on")
        try:
            self._power_on(extra, settled)
        except (BootError, ChannelClosedError) as error:
            if self.settings.accel != "tcg" or not self.ended():
                raise
            print(f"lab: WARNING: {error}\nlab: WARNING: booting once more", file=sys.stderr)
            self.power_cut()
            self._power_on(extra, settled)

    def _power_on(self, extra: Sequence[str], settled: bool) -> None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{self._work.path.name[-8:]}-{next(_boots)}.console.log"
        self.console_log = self.logs / name
        run = self._work.path / "run"
        with step(f"booting the host ({self.settings.accel})"):
            self._machine = Machine(self.image, self._parts, self.settings, extra, run, self.console_log)
            if settled:
                self.settle()

    def settle(self) -> None:
        """Wait until systemd has nothing left to start; raise if a unit failed."""
        state = self.run(["systemctl", "is-system-running", "--wait"], SETTLE_LIMIT, check=False).text
        if state != "running":
            failed = self.run(["systemctl", "--failed", "--plain", "--no-legend"]).text
            raise BootError(f"systemd says {state!r}; failed units:\n{failed}")

    def shutdown(self) -> None:
        """Power off cleanly: services stop, disks are written, the TPM is told."""
        machine = self._on()
        # It may be off before it could say that it was told to; `wait_off` knows.
        with contextlib.suppress(ChannelClosedError):
            self.run(["systemctl", "poweroff", "--no-block"], 30)
        machine.wait_off(OFF_LIMIT)
        self._machine = None

    def reboot(self, *extra: str, settled: bool = True) -> None:
        """Power off cleanly and on again, with a new QEMU and a reset TPM; state is kept."""
        self.shutdown()
        self.boot(*extra, settled=settled)

    def power_cut(self) -> None:
        """Pull the plug, if it is in: what L1 had not flushed to its disk is lost. ``boot`` is next."""
        if self._machine is not None:
            self._machine.kill()
            self._machine = None

    def close(self) -> None:
        """Cut the power if it is on, and remove disk, TPM and snapshots. Console logs stay."""
        self.power_cut()
        self._work.close()

    # Attacks from outside.

    def snapshot(self, name: str) -> None:
        """Copy disk and TPM state, while powered off, to come back to."""
        saved = self._snapshot(name)
        shutil.rmtree(saved, ignore_errors=True)
        saved.mkdir()
        run_tool(["cp", "--sparse=always", self._parts.disk, saved / "disk.qcow2"], timeout=COPY_LIMIT)
        shutil.copytree(self._parts.tpm_state, saved / "tpm")

    def keep_disk(self, path: Path) -> None:
        """Copy the disk, while powered off, for other hosts to start from."""
        if self._machine is not None:
            raise PowerStateError("the host is on: shut it down first")
        run_tool(["cp", "--sparse=always", self._parts.disk, path], timeout=COPY_LIMIT)

    def rollback(self, name: str, *, disk: bool = True, tpm: bool = True) -> None:
        """Put back an older disk, an older TPM state, or both; while powered off."""
        saved = self._snapshot(name)
        if not saved.is_dir():
            raise LabError(f"no snapshot {name!r}")
        if disk:
            run_tool(["cp", "--sparse=always", saved / "disk.qcow2", self._parts.disk], timeout=COPY_LIMIT)
        if tpm:
            shutil.rmtree(self._parts.tpm_state)
            shutil.copytree(saved / "tpm", self._parts.tpm_state)

    def memory(self) -> mmap.mmap:
        """L1's RAM as a shared mapping; see ``Machine.memory`` for addresses."""
        return self._on().memory()

    # Commands and files.

    @property
    def channel(self) -> Channel:
        """The agent's channel of this power-on."""
        return self._on().channel

    @property
    def running(self) -> bool:
        """Whether the host is on."""
        return self._machine is not None and self._machine.running

    def ended(self) -> bool:
        """Whether the host is off, or was just lost: its channel closes a moment before it ends."""
        return self._machine is None or self._machine.ended(ENDS_LIMIT)

    @property
    def tty(self) -> Path:
        """The unix socket of L1's second serial port, where root is logged in."""
        self._on()
        return self._work.path / "run" / "tty.sock"

    @property
    def pid(self) -> int:
        """The process id of L1's QEMU."""
        return self._on().pid

    def run(
        self,
        argv: Sequence[str] | str,
        timeout: float = 60.0,
        *,
        check: bool = True,
        stdin: bytes | BinaryIO = b"",
    ) -> Result:
        """Run a command as root to its end: a list is an argv, a string a line for ``/bin/sh``.

        Raises ``CommandFailedError`` unless it ends with 0 (``check``), ``CommandTimeoutError`` after killing
        one that takes too long, ``ChannelClosedError`` when the host goes off meanwhile.
        """
        return self.channel.run(argv, timeout, check=check, stdin=stdin)

    def start(self, argv: Sequence[str] | str) -> Command:
        """Start a command and return at once."""
        return self.channel.start(argv)

    def put(self, local: Path | bytes, remote: str, *, mode: int = 0o644) -> None:
        """Write a file in L1 from a local file or from bytes."""
        self.channel.put(local, remote, mode=mode)

    def get(self, remote: str) -> bytes:
        """Read a file of L1."""
        return self.channel.get(remote)

    def unpack(self, archive: Path, folder: str = "/") -> None:
        """Unpack a local tar file (uncompressed) into an existing folder of L1."""
        with archive.open("rb") as source:
            argv = ["tar", "--extract", "--no-same-owner", "--directory", folder]
            self.run(argv, COPY_LIMIT, stdin=source)

    def connect(self, path: str) -> Transport:
        """Connect to a unix socket of L1."""
        return self.channel.connect(path)

    def _on(self) -> Machine:
        if self._machine is None:
            raise PowerStateError("the host is off")
        return self._machine

    def _snapshot(self, name: str) -> Path:
        if self._machine is not None:
            raise PowerStateError("the host is on: shut it down or cut its power first")
        if not name.isidentifier():
            raise ValueError(f"snapshot name {name!r}")
        return self._work.path / "snapshots" / name
