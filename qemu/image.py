"""Builds the image of L1, the lab's host: Debian 12 with KVM, libvirt, TPM tools and the agent.

mmdebstrap fills a tree from the build machine's own apt sources, ``customize.sh`` adapts it and has
``mke2fs -d`` write it into a file: nothing is mounted outside a private namespace. The result is
cached by its recipe and never written to again; machines work on overlays (``qemu.host``).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu.cache import build_once, key_of
from qemu.errors import LabError
from qemu.process import require_tools, run_tool, step

HERE: Final = Path(__file__).resolve().parent
CODENAME: Final = "bookworm"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BUILD_LIMIT: Final = 1800  # seconds, for a slow archive

PACKAGES: Final = (
    # A small Debian that boots.
    *("linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd-sysv", "udev", "dbus", "kmod"),
    *("iproute2", "procps", "less", "busybox-static"),
    # A KVM host.
    *("qemu-system-x86", "libvirt-daemon-system", "libvirt-clients", "openssh-client"),
    # What hostd runs on: its Python, and the libraries its compiled dependencies load.
    *("python3", "libseccomp2", "tpm2-tools", "libtss2-esys-3.0.2-0", "libtss2-fapi1", "libtss2-rc0"),
    *("libtss2-mu0", "libtss2-sys1", "libtss2-tctildr0", "libtss2-tcti-device0"),
)
LEFT_OUT: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
RECIPE_FILES: Final = tuple(HERE / name for name in ("rootfs", "customize.sh", "guest-base.sh", "agent.py"))


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: read-only files in the cache."""

    disk: Path
    kernel: Path
    initrd: Path


def ensure_image() -> Image:
    """The image, from the cache or built now (under a minute with a near archive)."""
    key = key_of([CODENAME, *PACKAGES, *LEFT_OUT], RECIPE_FILES)
    entry = build_once("image", key, _build)
    return Image(entry / "disk.img", entry / "vmlinuz", entry / "initrd.img")


def apt_sources() -> str:
    """This machine's own sources for the image's release of Debian, one per line.

    apt is asked, not its files: it knows all their formats. ``$HOSTD_LAB_APT_SOURCES``, a file in
    sources.list format, is used instead where this machine runs something else.
    """
    own = os.environ.get("HOSTD_LAB_APT_SOURCES")
    if own:
        return Path(own).read_text()
    fields = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    known = run_tool(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"], timeout=60)
    releases = {CODENAME, f"{CODENAME}-updates", f"{CODENAME}-security"}
    options = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    lines = {f"deb {options}{line}\n" for line in known.splitlines() if line.split()[1] in releases}
    if not any(f" {CODENAME} " in line for line in lines):
        raise LabError(
            f"this machine's apt has no source for Debian {CODENAME}",
            hint="put suitable lines into a file and name it in HOSTD_LAB_APT_SOURCES",
        )
    return "".join(sorted(lines))


def _build(work: Path) -> None:
    require_tools("mmdebstrap", "mke2fs", "unshare")
    if os.geteuid() != 0:
        raise LabError("building the lab's image needs root", hint="sudo -E python3 -m qemu build")
    out, scratch = work, work / "scratch"
    scratch.mkdir()
    apt_conf = scratch / "apt.conf"
    apt_conf.write_text(_apt_settings())
    hook = shlex.join([str(HERE / "customize.sh"), "$1", str(HERE), str(out)]).replace("'$1'", '"$1"')
    options: Sequence[str] = (
        *("--variant=minbase", "--format=null", f"--include={','.join(PACKAGES)}"),
        *("--dpkgopt=force-unsafe-io", *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT)),
        *(f"--aptopt={apt_conf}", f"--customize-hook={hook}"),
    )
    with step(f"building the host image from Debian {CODENAME}"):
        run_tool(
            ["mmdebstrap", *options, CODENAME, "-", "-"],
            timeout=BUILD_LIMIT,
            stdin=apt_sources(),
            env={"TMPDIR": str(scratch), "LC_ALL": "C.UTF-8"},
        )
    apt_conf.unlink()
    scratch.rmdir()


def _apt_settings() -> str:
    """How this machine reaches its archive: proxies and the like, as apt.conf lines."""
    topics = ("Acquire::http", "Acquire::https", "Acquire::Retries", "Acquire::Check-Valid-Until")
    return run_tool(["apt-config", "dump", *topics], timeout=60)
