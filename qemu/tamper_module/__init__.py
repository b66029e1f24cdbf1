"""The kernel module that stages attacks in L1: its source, and its build for L1's kernel.

Headers come from the archive the image came from (``apt-get download``, unpacked into the cache and not
installed), the compiler is this machine's. The module is neither signed nor in tree, so the kernel
that loads it says so in its taint.
"""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path
from typing import Final

from qemu.cache import build_once, key_of
from qemu.errors import LabError
from qemu.host import LabHost
from qemu.process import require_tools, run_tool, step

HERE: Final = Path(__file__).resolve().parent
SOURCES: Final = (HERE / "tamper.c", HERE / "Kbuild")
NAME: Final = "tamper"
REMOTE: Final = "/root/tamper.ko"
PARAMETER: Final = "/sys/module/tamper/parameters/attack"
_RELEASE: Final = re.compile(r"(\d+\.\d+)\.\d+-\d+-[a-z0-9-]+")
_LIMIT: Final = 120.0  # seconds for a download of 14 MB, and for a build of a second


def ensure_module(release: str) -> Path:
    """``tamper.ko`` for a Debian kernel, as ``uname -r`` names it: from the cache, or built now.

    Raises:
        LabError: this is no Debian kernel's name, or the archive has its headers no more.
    """
    match = _RELEASE.fullmatch(release)
    if match is None or platform.machine() != "x86_64":
        raise LabError(f"no headers are known for kernel {release!r}")
    abi, flavour = release.split("-")[:2], release.split("-", 2)[2]
    packages = (
        f"linux-headers-{release}",
        f"linux-headers-{'-'.join(abi)}-common",
        f"linux-kbuild-{match[1]}",
    )

    def build(work: Path) -> None:
        require_tools("apt-get", "dpkg-deb", "gcc", "make")
        with step(f"building {NAME}.ko for {release} ({flavour})"):
            run_tool(["apt-get", "-q", "download", *packages], timeout=_LIMIT, cwd=work)
            for archive in work.glob("*.deb"):
                run_tool(["dpkg-deb", "-x", archive, work], timeout=_LIMIT)
                archive.unlink()
            sources = work / "usr" / "src"
            headers = sources / packages[0]
            # It names the other package's place in an installed system.
            (headers / "Makefile").write_text(f"include {sources / packages[1]}/Makefile\n")
            module = work / "module"
            module.mkdir()
            for source in SOURCES:
                shutil.copy(source, module)
            run_tool(["make", "-s", "-C", headers, f"M={module}", "modules"], timeout=_LIMIT)
            (module / f"{NAME}.ko").rename(work / f"{NAME}.ko")
            shutil.rmtree(work / "usr")
            shutil.rmtree(module)

    return build_once("module", key_of([release], SOURCES), build) / f"{NAME}.ko"


class Tamper:
    """The module in L1. Loading it is an attack already; the taint stays until the next boot."""

    def __init__(self, host: LabHost) -> None:
        self._host = host

    def load(self) -> None:
        """Load it; it does nothing yet."""
        release = self._host.run(["uname", "-r"]).text
        self._host.put(ensure_module(release), REMOTE)
        self._host.run(["insmod", REMOTE])

    def unload(self) -> None:
        """Remove it."""
        self._host.run(["rmmod", NAME])

    def flip_page(self, path: str, offset: int, xor: int) -> None:
        """Change a byte of a file's page cache. The same again puts it back."""
        self._say(f"page {path} {offset:x} {xor:x}")

    def flip_text(self, address: int, xor: int) -> None:
        """Change a byte of the kernel's or a module's memory. The same again puts it back."""
        self._say(f"text {address:x} {xor:x}")

    def _say(self, line: str) -> None:
        self._host.run(f"echo {line!r} > {PARAMETER}")
