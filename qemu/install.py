"""Puts the project into L1: files, users, systemd units. Configuring it is the caller's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from qemu.guest import install_guest_image
from qemu.host import LabHost
from qemu.process import step
from qemu.wheels import PREFIX, SITE_PACKAGES, build_trees, guest_packages

REPO: Final = Path(__file__).resolve().parent.parent
APT_HOOK: Final = "/etc/apt/apt.conf.d/90hostd"
SYSUSERS: Final = "hostd.sysusers"
TMPFILES: Final = "hostd.tmpfiles"
UNIT_PATTERNS: Final = ("*.service", "*.socket", "*.target", "*.slice", "*.timer", "*.path")
IMA_POLICY: Final = "/etc/ima/ima-policy"  # systemd loads it at boot
GROUP: Final = "hostd"  # of hostd's own files: the IMA policy has its number
OWN: Final = (
    *(f"{PREFIX}/{SITE_PACKAGES}/{package}" for package in ("hostd", "guestlib")),
    f"{PREFIX}/bin",
    f"{PREFIX}/pyvenv.cfg",
)
USERS: Final = ("hostd-vault", "hostd-gateway", "hostd-metrics")


def install_hostd(host: LabHost, repo: Path = REPO) -> None:
    """Install the project from ``repo`` and make its users and units known; start nothing."""
    with tempfile.TemporaryDirectory(prefix="hostd-build-") as scratch:
        archives = build_trees(repo, Path(scratch))
        with step("installing hostd in the host"):
            for archive in archives:
                host.unpack(archive)
            host.run("ln -sf /opt/hostd/bin/hostd /opt/hostd/bin/hostctl /usr/local/bin/")
            _make_users(host, repo / "systemd")
            _install_units(host, repo / "systemd")
            host.run(["mkdir", "-p", "/etc/ima"])
            # What is put there later has the group too.
            host.run(["install", "-d", "-m", "2755", "-g", GROUP, "/etc/hostd"])
            host.put(repo / "systemd" / "ima-policy", IMA_POLICY)
            # -h: not what a link leads to.
            host.run(["chgrp", "-R", "-h", GROUP, *OWN, IMA_POLICY])
            host.put(repo / "systemd" / "apt-hook.conf", APT_HOOK)


def install_guests(host: LabHost, repo: Path = REPO) -> None:
    """Put the guests' initramfs, with this ``repo``'s guestlib in it, into L1."""
    with tempfile.TemporaryDirectory(prefix="hostd-build-") as scratch:
        packages = guest_packages(repo, Path(scratch))
        with step("installing the guests' image in the host"):
            install_guest_image(host, packages)


def _make_users(host: LabHost, systemd: Path) -> None:
    """Users from the project's own sysusers.d file, or the three it is known to need."""
    own = systemd / SYSUSERS
    lines = own.read_text() if own.exists() else "".join(f'u {user} - "hostd"\n' for user in USERS)
    host.put(lines.encode(), "/usr/lib/sysusers.d/hostd.conf")
    host.run(["systemd-sysusers", "/usr/lib/sysusers.d/hostd.conf"])
    if (systemd / TMPFILES).exists():
        host.put(systemd / TMPFILES, "/usr/lib/tmpfiles.d/hostd.conf")
        host.run(["systemd-tmpfiles", "--create", "/usr/lib/tmpfiles.d/hostd.conf"])


def _install_units(host: LabHost, systemd: Path) -> None:
    units = sorted(unit.name for pattern in UNIT_PATTERNS for unit in systemd.glob(pattern))
    if units:
        sources = [f"{PREFIX}/systemd/{name}" for name in units]
        host.run(["install", "-m", "0644", "-g", GROUP, *sources, "/etc/systemd/system/"])
    host.run(["systemctl", "daemon-reload"])
