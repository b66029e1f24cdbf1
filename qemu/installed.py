"""A disk of L1 with hostd and the guests' image installed, and never started: cached by its sources.

A host made from it (``LabHost(disk=...)``) boots as a machine on which the packages were installed and
the power was then switched off: no configuration, no TPM objects, no store.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from qemu.cache import build_once, cache_root, key_of
from qemu.host import LabHost
from qemu.image import ensure_image
from qemu.install import REPO, install_guests, install_hostd
from qemu.machine import Settings
from qemu.process import step
from qemu.wheels import LEAN_PYTSS, SOURCES, ensure_dependencies

KIND: Final = "installed"
DISK: Final = "disk.qcow2"
KEPT: Final = 2  # older ones than these are removed
IN_USE: Final = 6 * 3600  # seconds after its last use during which a disk is not removed
RECIPE: Final = (
    *map(Path(__file__).with_name, ("install.py", "installed.py", "initramfs.py", "wheels.py")),
    LEAN_PYTSS,
)


def ensure_installed(repo: Path = REPO, settings: Settings | None = None) -> Path:
    """The disk: from the cache, or made now by booting the image and installing hostd on it."""

    def build(folder: Path) -> None:
        with step("making a disk with hostd installed"), LabHost(settings) as host:
            host.boot()
            install_hostd(host, repo)
            install_guests(host, repo)
            host.shutdown()
            host.keep_disk(folder / DISK)

    with ThreadPoolExecutor(1) as other:  # the two long builds of an empty cache, side by side
        dependencies = other.submit(ensure_dependencies, repo)
        image = ensure_image()
        dependencies.result()
    sources = [path for name in (*SOURCES, "systemd") if (path := repo / name).exists()]
    key = key_of([image.disk.parent.name], [*RECIPE, *sources])
    entry = build_once(KIND, key, build)
    os.utime(entry)
    _remove_old(entry)
    return entry / DISK


def _remove_old(used: Path) -> None:
    """Every change of the sources makes another disk."""
    entries = sorted(cache_root().glob(f"{KIND}-*"), key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in entries[KEPT:]:
        if entry != used and entry.stat().st_mtime < time.time() - IN_USE:
            shutil.rmtree(entry, ignore_errors=True)
