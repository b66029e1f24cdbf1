"""The lab for end-to-end tests. One host is booted for the session; guests are made as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from qemu.errors import MissingToolError
from qemu.guest import Guest
from qemu.host import LabHost
from qemu.image import ensure_image
from qemu.install import install_guests
from qemu.machine import FIRMWARE
from qemu.process import require_tools

TOOLS = ("mmdebstrap", "mke2fs", "qemu-img", "qemu-system-x86_64", "setpriv", "swtpm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is a lab test."""
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.lab)


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
def host_session(lab_tools: None) -> Iterator[LabHost]:
    """The session's host; use ``lab``, which has it running."""
    with LabHost() as host:
        host.boot()
        install_guests(host)
        yield host


@pytest.fixture
def lab(host_session: LabHost) -> LabHost:
    """The session's host, running: booted again if the test before left it off."""
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
