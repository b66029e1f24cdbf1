"""L2: a guest of the lab's host under libvirt and KVM, with vsock and an agent of its own.

    install_guest_image(host, packages)     # once for each disk of L1
    with Guest(host, "alice", cid=7) as guest:
        guest.start()
        guest.run(["python3", "-m", "guestlib.cli", ...])

The guest is driven from outside through L1: its agent's port is a unix socket there.
"""

from __future__ import annotations

import re
import string
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from qemu.channel import Channel, Command
from qemu.errors import BootError, LabError, PowerStateError, Result
from qemu.host import LabHost
from qemu.initramfs import cpio, tree

TEMPLATE: Final = Path(__file__).with_name("guest-domain.xml")
FOLDER: Final = "/var/lib/hostd-lab"  # in L1; guest-base.cpio and vmlinuz are there
INITRAMFS: Final = f"{FOLDER}/guest.cpio"
SITE_PACKAGES: Final = "usr/local/lib/python3.11/dist-packages"  # on sys.path of the guest's python3
START_LIMIT: Final = 90.0  # seconds for virsh, and again for the agent's answer; some 15 under emulation
NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,30}")
CIDS: Final = range(3, 1 << 32)  # 0 to 2 have meanings of their own (vsock(7))


def install_guest_image(host: LabHost, *packages: Path) -> None:
    """Put the guests' initramfs into L1; ``packages`` are site-packages folders to have in it.

    Guests that run keep what they booted with.
    """
    extra = cpio(file for folder in packages for file in tree(folder, SITE_PACKAGES))
    host.put(extra, f"{FOLDER}/guest-extra.cpio")
    host.run(f"cd {FOLDER} && cat guest-base.cpio guest-extra.cpio >guest.new && mv guest.new {INITRAMFS}")


class Guest:
    """One guest. Its name, UUID and CID are fixed; it may be started again after ``destroy``."""

    def __init__(
        self, host: LabHost, name: str, cid: int, *, memory_mib: int = 512, identity: uuid.UUID | None = None
    ) -> None:
        """Describe a guest; nothing happens in L1 before ``define`` or ``start``."""
        if not NAME.fullmatch(name):
            raise ValueError(f"guest name {name!r}")
        if cid not in CIDS:
            raise ValueError(f"guest CID {cid}")
        self.host = host
        self.name = name
        self.cid = cid
        self.uuid = identity or uuid.uuid4()
        self._memory_mib = memory_mib
        self._channel: Channel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def channel(self) -> Channel:
        """The agent's channel of this run of the guest."""
        if self._channel is None:
            raise PowerStateError(f"guest {self.name} is not running")
        return self._channel

    @property
    def running(self) -> bool:
        """Whether the guest, or what is left of it, still answers for its port."""
        return self._channel is not None and self._channel.alive

    @property
    def qemu_pid(self) -> int:
        """The process id, in L1, of the guest's QEMU."""
        return int(self.host.get(f"/run/libvirt/qemu/{self.name}.pid"))

    @property
    def console(self) -> str:
        """What the guest's kernel has said."""
        return self.host.run(["cat", self._console], check=False).text

    def xml(self) -> str:
        """The libvirt domain."""
        template = string.Template(TEMPLATE.read_text())
        return template.substitute(
            name=self.name,
            uuid=self.uuid,
            cid=self.cid,
            memory_mib=self._memory_mib,
            kernel=f"{FOLDER}/vmlinuz",
            initrd=INITRAMFS,
            socket=self._socket,
            console=self._console,
        )

    def define(self) -> None:
        """Make the domain known to libvirt (again, if it is)."""
        self.host.put(self.xml().encode(), self._file)
        self.host.run(["virsh", "--quiet", "define", self._file])

    def start(self, limit: float = START_LIMIT) -> None:
        """Define and start the guest; return when its agent answers.

        A guest that stays silent is destroyed and, saying so, started once more.

        Raises:
            BootError: no answer the second time either.
        """
        self.power_on(limit)
        try:
            self.wait_up(limit)
        except BootError as error:
            print(f"lab: WARNING: {error}\nlab: WARNING: starting {self.name} once more", file=sys.stderr)
            self.power_on(limit)
            self.wait_up(limit)

    def power_on(self, limit: float = START_LIMIT) -> None:
        """Define and start the guest; return when its QEMU runs. ``wait_up`` is next."""
        if self.running:
            raise PowerStateError(f"guest {self.name} is already running")
        self.host.put(self.xml().encode(), self._file)
        self.host.run(["virsh", "--quiet", f"define {self._file}; start {self.name}"], limit)

    def wait_up(self, limit: float = START_LIMIT) -> None:
        """Wait for the agent's answer.

        Raises:
            BootError: none in time; the guest is destroyed.
        """
        channel = Channel(self.host.connect(self._socket))
        if not channel.greeted(limit):
            channel.close()
            console = self.console[-2000:]
            with suppress(LabError):  # what matters is why the guest did not come up
                self.host.run(["virsh", "--quiet", "destroy", self.name], check=False)
            raise BootError(f"guest {self.name}: no agent within {limit:g} s; the console:\n{console}")
        self._channel = channel

    def run(
        self,
        argv: Sequence[str] | str,
        timeout: float = 60.0,
        *,
        check: bool = True,
        stdin: bytes | BinaryIO = b"",
    ) -> Result:
        """Run a command in the guest; as ``LabHost.run``."""
        return self.channel.run(argv, timeout, check=check, stdin=stdin)

    def start_command(self, argv: Sequence[str] | str) -> Command:
        """Start a command in the guest and return at once."""
        return self.channel.start(argv)

    def put(self, local: Path | bytes, remote: str, *, mode: int = 0o644) -> None:
        """Write a file in the guest."""
        self.channel.put(local, remote, mode=mode)

    def get(self, remote: str) -> bytes:
        """Read a file of the guest."""
        return self.channel.get(remote)

    def destroy(self) -> None:
        """Stop the guest at once, as a power cut does; it stays defined."""
        self.channel.close()
        self._channel = None
        self.host.run(["virsh", "--quiet", "destroy", self.name])

    def undefine(self) -> None:
        """Make libvirt forget the guest."""
        self.host.run(["virsh", "--quiet", "undefine", self.name])

    def close(self) -> None:
        """Stop and forget the guest, whatever state it and its host are in."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self.host.running:
            self.host.run(["virsh", "--quiet", f"destroy {self.name}"], check=False)
            self.host.run(["virsh", "--quiet", f"undefine {self.name}"], check=False)

    @property
    def _file(self) -> str:
        return f"{FOLDER}/{self.name}.xml"

    @property
    def _socket(self) -> str:
        return f"/run/libvirt/qemu/{self.name}.agent"

    @property
    def _console(self) -> str:
        return f"/var/log/libvirt/qemu/{self.name}.console"
