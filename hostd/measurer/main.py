"""The measurer role: reads the host, and tells the vault what it saw.

It holds no secret but the key of its own tags, decides nothing, and has no network. It needs
CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH and more (each probe's module says for what).
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from typing import TYPE_CHECKING, Final

from hostd.core.reacting import Step
from hostd.ipc.loop import Loop
from hostd.measurer.apart import Apart
from hostd.measurer.domain_events import DomainEvents
from hostd.measurer.files import MAX_FILES
from hostd.measurer.freezer import thaw_left
from hostd.measurer.hints import Hints, process_events, say
from hostd.measurer.kernel import KernelProbe
from hostd.measurer.probes import Measurer
from hostd.measurer.server import Server, listen
from hostd.measurer.suspender import Suspender
from hostd.platform import collector
from hostd.platform.notify import READY, STOPPING, WATCHDOG, notify, watchdog_interval

if TYPE_CHECKING:
    from hostd.config import Config

SOCKET_NAME: Final = "measurer.sock"
EPOCH_BYTES: Final = 16
LARGE_BYTES: Final = 1 << 20
"""Nothing that readings use again and again is as large: a QEMU's page table entries take 85 kB."""
SPARE_BYTES: Final = 8 << 20
"""Kept at the heap's end: readings that gave back and took again what they need would pay for page faults."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
STUCK_S: Final = 60.0
"""One part of the kernel takes milliseconds; on an emulated machine some hundred."""
OTHER_DESCRIPTORS: Final = 4608
"""One handle for each hypervisor process (4096), and some."""


def run(config: Config) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        ConfigError: the vault's user does not exist.
        PagesError: page frames are hidden from this process (CAP_SYS_ADMIN).
        OSError: the socket cannot be made.
    """
    give_memory_back()
    _raise_descriptor_limit(MAX_FILES + OTHER_DESCRIPTORS)
    uid = config.uid_of("vault")
    loop = Loop()
    loop.stop_on_signals()
    if left := thaw_left(config.run):
        say(f"thawed {left}, which a measurer before this one had frozen")
    measurer = Measurer(config)
    listener = listen(config.run / SOCKET_NAME, uid)
    kernel = Apart(lambda: KernelProbe(config))
    suspender = Suspender(
        config.hypervisor.libvirt_uri, config.run, allowed=config.drift.has(Step.SUSPEND_VM)
    )
    server = Server(loop, listener, measurer, kernel, suspender, vault_uid=uid, epoch=os.urandom(EPOCH_BYTES))
    hints = Hints(
        loop,
        measurer.guests,
        config.hypervisor.binaries,
        server.hint,
        processes=process_events(),
        domains=DomainEvents(config.hypervisor.libvirt_uri)
        if config.hypervisor.provider == "libvirt"
        else None,
    )
    _keep_watchdog(loop, kernel)
    collector.settle()
    notify(READY)
    try:
        loop.run()
    finally:
        notify(STOPPING)
        hints.close()
        kernel.close()
        measurer.close()
        listener.close()


def give_memory_back() -> None:
    """Has the allocator return large blocks with their last use. By itself it keeps ever larger ones for
    later (mallopt(3), "dynamic mmap threshold"), and this process needs them once: for a plan of the kernel,
    or a file's symbols."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, SPARE_BYTES)


def thaw(config: Config) -> None:
    """After the end of the role: no VM stays frozen because of it."""
    thaw_left(config.run)


def _keep_watchdog(loop: Loop, kernel: Apart) -> None:
    """Tells systemd that this process lives, unless the kernel's thread hangs: it is started again then."""
    interval = watchdog_interval()
    if interval is None:
        return

    def beat() -> None:
        if not kernel.stuck(time.monotonic(), STUCK_S):
            notify(WATCHDOG)
        loop.call_after(interval, beat)

    beat()


def _raise_descriptor_limit(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
