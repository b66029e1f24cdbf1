"""The lab for end-to-end tests: one bare host, and one with hostd running, each booted once if needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from qemu.errors import LabError, MissingToolError
from qemu.guest import Guest
from qemu.guest_python import GuestPython
from qemu.host import LabHost
from qemu.image import ensure_image
from qemu.install import install_guests
from qemu.installed import ensure_installed
from qemu.machine import FIRMWARE
from qemu.process import require_tools
from qemu.service import Service

TOOLS = ("mmdebstrap", "mke2fs", "qemu-img", "qemu-system-x86_64", "setpriv", "swtpm")
# What leaves a host as it found it comes before what does not.
ORDER = (
    "guest",
    "host",
    "hostd_demo",
    "hostd_units",
    "hostd_freeze",
    "hostd_kernel",
    "hostd_callers",
    "hostd_power",
    "hostd_drift",
    "hostd_suspend",
    "hostd_update",
    "hostd_innocents",
    "hostd_attacks",
)


REHEARSAL = frozenset(
    f"test_hostd_{name}" for name in ("attacks", "innocents", "freeze", "suspend", "update")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is a lab test, and comes in the order above.

    One that lost its host, to a panic of the emulated kernel, is run once more on the host booted again;
    the summary counts it. Nothing else is.
    """
    folder = __file__.rpartition("/")[0]
    lab = [item for item in items if item.path.is_relative_to(folder)]
    for item in lab:
        item.add_marker(pytest.mark.lab)
        item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=["ChannelClosedError"]))
        if item.path.stem in REHEARSAL:
            item.add_marker(pytest.mark.rehearsal)
    places = [number for number, item in enumerate(items) if item in lab]
    lab.sort(key=lambda item: ORDER.index(item.path.stem.removeprefix("test_")))
    for place, item in zip(places, lab, strict=True):
        items[place] = item


@pytest.fixture(scope="session")
def lab_tools() -> None:
    """Skip where the lab's tools are not installed; fail where they are and do not work."""
    try:
        require_tools(*TOOLS)
    except MissingToolError as error:
        pytest.skip(f"{error}; {error.hint}")
    if not FIRMWARE.exists():
        pytest.skip(f"no {FIRMWARE}; apt-get install ovmf")
    ensure_image()


@pytest.fixture(scope="session")
def hosts() -> list[LabHost]:
    """All hosts of this session; one is on at a time."""
    return []


@pytest.fixture(scope="session")
def host_session(lab_tools: None, hosts: list[LabHost]) -> Iterator[LabHost]:
    """The bare host; use ``lab``, which has it running."""
    with LabHost() as host:
        switch_off(hosts)
        hosts.append(host)
        host.boot()
        install_guests(host)
        yield host


@pytest.fixture
def lab(host_session: LabHost) -> LabHost:
    """The bare host, running: booted again if the test before left it off."""
    if not host_session.running:
        host_session.power_cut()
        host_session.boot()
    return host_session


@pytest.fixture
def make_guest(lab: LabHost) -> Iterator[Callable[[str, int], Guest]]:
    """Makes guests that have started, and removes them after the test."""
    made: list[Guest] = []

    def make(name: str, cid: int) -> Guest:
        guest = Guest(lab, name, cid)
        made.append(guest)
        guest.start()
        return guest

    yield make
    for guest in made:
        guest.close()


def switch_off(hosts: list[LabHost]) -> None:
    """Cut the power of all: two cores emulate one host at a time."""
    for host in hosts:
        host.power_cut()


@dataclass(frozen=True, slots=True)
class Running:
    """hostd on its host, and two guests of two tenants: alice of acme, bob of globex."""

    host: LabHost
    service: Service
    alice: Guest
    bob: Guest

    def vsock(self, *options: str) -> list[str]:
        """What ``ss`` says of vsock where the gateway is: in a network namespace of its own."""
        pid = self.service.pid_of("gateway")
        argv = ["nsenter", "-t", str(pid), "-n", "ss", "-H", "--vsock", *options]
        return self.host.run(argv).text.splitlines()

    def revive(self) -> None:
        """Boots the host again, and the guests, after it died under a test."""
        self.host.power_cut()
        self.host.boot()
        self.service.wait_active()
        for guest in (self.alice, self.bob):
            guest.close()
            guest.start()
            self.service.give_trust(guest)
        self.service.wait_measured()

    def python(self, guest: Guest) -> GuestPython:
        """A session in a guest, which is started first if it is not running."""
        if not guest.running:
            guest.start()
            self.service.give_trust(guest)
            self.service.wait_measured()
        return GuestPython(guest)


@pytest.fixture(scope="session")
def running(lab_tools: None, hosts: list[LabHost]) -> Iterator[Running]:
    """hostd as installed and started by systemd, with a manifest, tenants and guests."""
    disk = ensure_installed()
    with LabHost(disk=disk) as host:
        switch_off(hosts)
        hosts.append(host)
        host.boot()
        # Also at every boot: a module that the manifest does not have would be drift.
        host.put(b"vsock_loopback\n", "/etc/modules-load.d/vsock-loopback.conf")
        host.run(["modprobe", "vsock_loopback"])
        service = Service(host)
        service.set_up()
        service.start()
        alice, bob = Guest(host, "alice", 7), Guest(host, "bob", 8)
        for guest in (alice, bob):
            guest.start()
        try:
            service.baseline()
            service.wait_measured()
            service.adopt(alice, "acme")
            service.adopt(bob, "globex")
        except LabError as error:
            raise LabError(f"{error}\nthe roles' journal:\n{service.journal()[-6000:]}") from error
        yield Running(host, service, alice, bob)


@pytest.fixture(autouse=True)
def host_on(request: pytest.FixtureRequest) -> None:
    """The host of ``running`` is on at the start of each test that uses it, whatever the last one met."""
    if "running" in request.fixturenames:
        running: Running = request.getfixturevalue("running")
        if not running.host.running:
            running.revive()
