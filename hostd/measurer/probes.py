"""All probes behind one question: a request of the vault in, one reading out.

Whatever a probe cannot read becomes `Missing`: never a guess, and never the end of the measurer
because of what a process did while it was looked at.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hostd.core.findings import Kind
from hostd.core.readings import Missing
from hostd.ipc.measuring import Ask, AskFile, AskWho
from hostd.measurer.boot import BootProbe
from hostd.measurer.contents import ContentsProbe
from hostd.measurer.domain import DomainProbe
from hostd.measurer.files import Registry, TooMuchError
from hostd.measurer.freezer import Freezer
from hostd.measurer.guests import Guest, GuestsProbe
from hostd.measurer.ima import ImaProbe
from hostd.measurer.itself import SelfProbe
from hostd.measurer.kernel import KernelProbe
from hostd.measurer.lane import Lane
from hostd.measurer.posture import PostureError, PostureProbe
from hostd.measurer.process import ProcessProbe
from hostd.measurer.relro import RelroProbe
from hostd.measurer.tags import Tagger
from hostd.platform.pages import OwnPages
from hostd.platform.procfs import MalformedProcError, ProcessGoneError
from hostd.platform.vmas import MapsReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.config import Config
    from hostd.core.readings import FileIdentity, FilesReading, ProcessReading, Reading


class Measurer:
    """The measuring side. Decides nothing.

    Raises:
        PagesError: this process may not see page frames.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._freezer = Freezer(config.gate.freeze, config.run)
        self.freeze = ""
        """How freezing went in the last reading; empty if it was not tried."""
        pages = OwnPages()
        tagger = Tagger()
        self._lane = Lane()
        maps = MapsReader()
        self.registry = Registry(tagger)
        self._contents = ContentsProbe(self.registry, tagger, pages, self._lane)
        self.guests = GuestsProbe(config.hypervisor)
        self.processes = ProcessProbe(self.registry, tagger, pages, self._lane, maps=maps)
        self._posture = PostureProbe()
        self._ima = ImaProbe()
        self._boot = BootProbe()
        self._kernel: KernelProbe | None = None
        step_s = config.measure.deadline_s / 100
        self._relro = RelroProbe(self.registry, tagger, self._lane, maps=maps, step_s=step_s)
        self._domain = DomainProbe(self.guests)
        self._self = SelfProbe(self.registry, self.processes)
        self.guests.look()

    def answer(self, request: Ask | AskFile | AskWho, taken: int | None = None) -> Reading:
        """One reading. Takes about a millisecond; a file's identification takes more, and the server has it
        done in slices (`hostd.measurer.identify.Turns`), and the kernel in a thread (`hostd.measurer.apart`).

        `taken`: when the request had been received (`time.monotonic_ns`). What was read of the same process
        since then, for the request before, need not be read again. None: everything is read now.
        """
        self.freeze = ""
        try:
            match request:
                case Ask(kind=Kind.GUESTS):
                    reading: Reading = self.guests.read()
                    self._forget()
                    return reading
                case Ask(kind=Kind.POSTURE):
                    return self._posture.read()
                case Ask(kind=Kind.IMA):
                    return self._ima.read(request.position)
                case Ask(kind=Kind.FILES):
                    return self._read_files()
                case Ask(kind=Kind.PROCESS):
                    guest = self._named(vm=request.vm)
                    return self._still(guest, taken, lambda since: self._read_process(guest, since))
                case Ask(kind=Kind.BOOT):
                    return self._boot.read(request.position)
                case Ask(kind=Kind.KERNEL):
                    self._kernel = self._kernel or KernelProbe(self._config)
                    return self._kernel.read(request.part)
                case Ask(kind=Kind.RELRO):
                    guest = self._named(vm=request.vm)
                    return self._still(guest, taken, lambda since: self._read_relro(guest, since))
                case Ask(kind=Kind.DOMAIN):
                    return self._domain.read(self._named(vm=request.vm))
                case Ask(kind=Kind.SELF):
                    return self._self.read()
                case AskFile():
                    return self._identify(request.file)
                case AskWho():
                    return self._who(request)
                case _:
                    return Missing(f"{request.kind} is not read here", absent=False)
        except (ProcessGoneError, MalformedProcError, TooMuchError, PostureError, OSError) as error:
            return Missing(str(error)[:512], absent=False)

    def _still(self, guest: Guest, taken: int | None, read: Callable[[int | None], Reading]) -> Reading:
        """A reading of a VM's process, which stands still meanwhile if `gate.freeze` says so. While it does,
        nothing counts that was read before."""
        freezer = self._freezer
        if freezer.mode != "always":
            reading = read(taken)
            if freezer.mode == "never" or not getattr(reading, "altered_total", 0):
                return reading
        with freezer.still(guest.found.handle) as self.freeze:
            return read(None)

    def _forget(self) -> None:
        alive = self.guests.alive() | self._self.alive()
        self.registry.release_ended(alive, time.monotonic())
        self.processes.forget_ended(alive)
        self._relro.forget_ended(alive)

    def _named(self, *, vm: str) -> Guest:
        matching = [guest for guest in self.guests.guests if guest.hypervisor.vm == vm]
        if not matching:
            matching = [guest for guest in self.guests.look() if guest.hypervisor.vm == vm]
        return _only(matching, f"VM {vm or '(unnamed)'}")

    def _who(self, request: AskWho) -> Reading:
        if bool(request.cid) == bool(request.pid):
            return Missing("asked for neither or both of cid and pid", absent=False)
        guests = self.guests.look()
        if request.cid:
            matching = [guest for guest in guests if guest.hypervisor.cid == request.cid]
            return self._read_process(_only(matching, f"CID {request.cid}"))
        matching = [guest for guest in guests if guest.hypervisor.pid == request.pid]
        if not matching and request.pid not in self.guests.nobody:
            return Missing(f"pid {request.pid} is no hypervisor process", absent=True)
        return self._read_process(_only(matching, f"pid {request.pid}"))

    def _read_process(self, guest: Guest, since: int | None = None) -> ProcessReading:
        fresh = self.guests.refresh(guest)
        return self.processes.read(fresh.hypervisor, fresh.found.handle, since)

    def _read_relro(self, guest: Guest, since: int | None) -> Reading:
        return self._relro.read(guest.hypervisor, guest.found.handle, since)

    def _read_files(self) -> FilesReading:
        self._self.enroll()
        for guest in self.guests.guests:
            if not self.registry.claimed(guest.found.key):
                try:
                    self.processes.enroll(guest.hypervisor, guest.found.handle)
                except (ProcessGoneError, MalformedProcError, TooMuchError, OSError):
                    # Its own reading says why; the files of the others are read all the same.
                    continue
        return self._contents.read()

    def _identify(self, number: int) -> FileIdentity | Missing:
        try:
            return self.registry.identify(number)
        except LookupError as error:
            return Missing(str(error)[:512], absent=False)

    def close(self) -> None:
        for probe in (self._posture, self._ima, self._boot, self._relro, self._domain, self._self):
            probe.close()
        if self._kernel is not None:
            self._kernel.close()
        self.guests.close()
        self.registry.close()
        self._lane.close()


def _only(matching: list[Guest], what: str) -> Guest:
    if len(matching) != 1:
        raise ProcessGoneError(
            f"{what} is no hypervisor process known here" if not matching else f"{what} is claimed twice"
        )
    return matching[0]
