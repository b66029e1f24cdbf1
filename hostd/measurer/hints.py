"""Hints for the vault: something happened that a reading may show.

From process events, libvirt's domain events, and the count of the IMA log. Hints for one component are
sent at most every `COALESCE_S`, and events cost a bounded share of the time: after each full turn of reading
them comes a pause. Nothing is trusted because no hint came, so every source may be missing; that is said.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostd.core.findings import GUESTS, IMA, Component, domain_of, process_of, relro_of
from hostd.measurer.events import EventsError, ProcessEvents

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.ipc.loop import Loop
    from hostd.measurer.domain_events import DomainEvents
    from hostd.measurer.guests import GuestsProbe

COALESCE_S: Final = 0.01
PAUSE_S: Final = 0.01
"""After a full turn of events (some 0.3 ms): a storm costs some 3 % of one core."""
MAX_MARKED: Final = 256
"""Components hinted at in one go; what is over is dropped."""
COUNT_S: Final = 0.1
"""How often the IMA log's count is looked at; it cannot be waited for. 15 us."""
COUNT_PATH: Final = Path("/sys/kernel/security/ima/runtime_measurements_count")
DELETED: Final = " (deleted)"


class Hints:
    """Turns what happens into hints."""

    def __init__(
        self,
        loop: Loop,
        guests: GuestsProbe,
        binaries: tuple[str, ...],
        send: Callable[[Component], None],
        *,
        processes: ProcessEvents | None,
        domains: DomainEvents | None,
        count_path: Path = COUNT_PATH,
    ) -> None:
        self._loop = loop
        self._guests = guests
        self._binaries = frozenset(binaries) | {os.path.realpath(path) for path in binaries}
        self._send = send
        self._marked: dict[Component, None] = {}
        self._processes = processes
        self._behind = False
        if processes is not None:
            loop.watch(processes, self._on_processes)
        if domains is not None:
            loop.watch(domains, lambda _events: self._on_domains(domains))
        self._count = -1
        try:
            self._count_fd = os.open(count_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._count_fd = -1
        else:
            loop.every(COUNT_S, self._look_at_count)

    def mark(self, component: Component) -> None:
        """Something may have happened to this component."""
        if component in self._marked or len(self._marked) >= MAX_MARKED:
            return
        if not self._marked:
            self._loop.call_after(COALESCE_S, self._flush)
        self._marked[component] = None

    def _flush(self) -> None:
        marked, self._marked = self._marked, {}
        for component in marked:
            self._send(component)

    # ── Processes ─────────────────────────────────────────────────────────────────────────────────

    def _on_processes(self, _events: int) -> None:
        processes = self._processes
        assert processes is not None
        try:
            turn = processes.read()
        except OSError as error:
            self._processes = None
            self._loop.forget(processes)
            say(f"no process events any more: {error}")
            return
        vms = {guest.hypervisor.pid: guest.hypervisor.vm for guest in self._guests.guests}
        for event in turn.events:
            vm = vms.get(event.pid)
            if vm is not None:
                if event.what == "exit":
                    self.mark(GUESTS)
                else:
                    self.mark(process_of(vm))
                    self.mark(relro_of(vm))
                if event.what == "exec":
                    self.mark(GUESTS)
            elif event.what == "exec" and self._is_hypervisor(event.pid):
                self.mark(GUESTS)
        self._behind |= turn.lost
        # The kernel tells of a loss once, and goes on losing until all that is there has been taken
        # (net/netlink/af_netlink.c, NETLINK_S_CONGESTED): so at its beginning, and at its end.
        if turn.lost or (self._behind and not turn.more):
            self.mark(GUESTS)
        if turn.more:
            self._pause(processes)
        else:
            self._behind = False

    def _pause(self, processes: ProcessEvents) -> None:
        self._loop.forget(processes)

        def again() -> None:
            if self._processes is not None:
                self._loop.watch(processes, self._on_processes)

        self._loop.call_after(PAUSE_S, again)

    def _is_hypervisor(self, pid: int) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/exe").removesuffix(DELETED) in self._binaries
        except OSError:
            return False

    # ── libvirt, IMA ──────────────────────────────────────────────────────────────────────────────

    def _on_domains(self, domains: DomainEvents) -> None:
        for vm in domains.take():
            self.mark(GUESTS)
            if vm:
                self.mark(domain_of(vm))

    def _look_at_count(self) -> None:
        try:
            count = int(os.pread(self._count_fd, 32, 0) or b"-1")
        except (OSError, ValueError):
            return
        if count != self._count:
            if self._count >= 0:
                self.mark(IMA)
            self._count = count

    def close(self) -> None:
        if self._count_fd >= 0:
            os.close(self._count_fd)
        if self._processes is not None:
            self._processes.close()


def process_events() -> ProcessEvents | None:
    """The kernel's process events; None, said once, where they cannot be had."""
    try:
        return ProcessEvents()
    except EventsError as error:
        say(f"no process events: {error}; readings come by themselves, if later")
        return None


def say(text: str) -> None:
    print(f"hostd measurer: {text}", file=sys.stderr, flush=True)
