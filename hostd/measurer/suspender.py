"""Suspends and resumes virtual machines through libvirt, for the reaction `suspend-vm`.

The one thing that the measurer does to a VM's run besides `gate.freeze`, and only if the configuration has a
reaction that suspends: a connection that may change something is opened for each deed, and closed after it.
libvirt's calls may hang with its daemon, or with the one VM that does not answer it, as a QEMU that was
taken over may choose. So each VM's are made in a thread of its own, and `expire` gives one up that takes over
`GIVE_UP_S`; while it hangs every other of this VM is refused at once, and those of other VMs are served.

What it suspended is noted in a file of the run directory before, with the run of the domain: only such a
run is resumed, so that a VM that an operator has paused stays paused. A file that outlives a measurer that
was killed is why a deed may be asked for twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

GIVE_UP_S: Final = 20.0
MAX_HANGING: Final = 16
"""Deeds given up that hang, over which all are refused: libvirt's daemon has 20 workers for such calls."""
MAX_TEXT: Final = 500
_NOTE: Final = "measurer.suspended-"
_RUN: Final = re.compile(rb"[0-9]{1,9}")


class Deed(NamedTuple):
    """What was asked for: by whom, of which VM; `on` suspends."""

    ticket: tuple[int, int]
    vm: str
    on: bool


class Outcome(NamedTuple):
    """How a deed ended: whether the VM is now as asked, and what was done or stood in the way."""

    ticket: tuple[int, int]
    done: bool
    detail: str


class Suspender:
    """Does one deed of a VM at a time, in a thread that lives as long as the VM has any."""

    def __init__(self, uri: str, run: Path, *, allowed: bool) -> None:
        """`allowed` false: nothing is suspended (what was, before, is still resumed)."""
        self._uri = uri
        self._run = run
        self._allowed = allowed
        self._asked: dict[str, deque[Deed]] = {}
        """VMs with a thread, and what is still to be done for each."""
        self._done: deque[Outcome] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], tuple[str, float]] = {}
        """Tickets without an outcome: of which VM, and when each is given up."""
        self._given_up: dict[tuple[int, int], str] = {}

    def fileno(self) -> int:
        """Readable when there are outcomes."""
        return self._event

    def ask(self, deed: Deed) -> None:
        """Has it done; the outcome follows with its ticket."""
        if not self._allowed and deed.on:
            self._tell(Outcome(deed.ticket, False, "no reaction of this configuration suspends"))
            return
        with self._lock:
            hanging = deed.vm in self._given_up.values() or len(self._given_up) >= MAX_HANGING
            serves = deed.vm in self._asked
            if not hanging:
                self._open[deed.ticket] = deed.vm, time.monotonic() + GIVE_UP_S
                self._asked.setdefault(deed.vm, deque()).append(deed)
        if hanging:
            self._tell(Outcome(deed.ticket, False, "libvirt does not answer"))
        elif not serves:
            # A daemon: one that hangs must not keep the process from ending.
            threading.Thread(target=self._serve, args=(deed.vm,), name="suspender", daemon=True).start()

    def expire(self) -> None:
        """Gives up what takes too long; called now and then."""
        now = time.monotonic()
        with self._lock:
            late = {ticket: vm for ticket, (vm, until) in self._open.items() if until <= now}
            for ticket in late:
                del self._open[ticket]
            self._given_up |= late
        for ticket in late:
            self._tell(Outcome(ticket, False, "libvirt does not answer"))

    def outcomes(self) -> list[Outcome]:
        """Takes out what there is; never blocks."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        found = []
        while self._done:
            found.append(self._done.popleft())
        return found

    def _tell(self, outcome: Outcome) -> None:
        self._done.append(outcome)
        os.eventfd_write(self._event, 1)

    def _serve(self, vm: str) -> None:
        while True:
            with self._lock:
                if not self._asked[vm]:
                    del self._asked[vm]
                    return
                deed = self._asked[vm].popleft()
            done, detail = self._do(deed.vm, deed.on)
            with self._lock:
                given_up = self._given_up.pop(deed.ticket, None) is not None
                self._open.pop(deed.ticket, None)
            if not given_up:
                self._tell(Outcome(deed.ticket, done, detail[:MAX_TEXT]))

    def _do(self, vm: str, on: bool) -> tuple[bool, str]:
        try:
            import libvirt
        except ImportError:
            return False, "libvirt-python is not installed"
        connection: Any = None
        try:
            libvirt.registerErrorHandler(lambda *_: None, None)
            connection = libvirt.open(self._uri)
            domain = _domain(libvirt, connection, vm)
            if domain is None or domain.ID() < 0:
                self._forget(vm)
                return True, "the VM does not run"
            paused = domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
            return self._suspend(domain, vm, paused) if on else self._resume(domain, vm, paused)
        except (libvirt.libvirtError, OSError) as error:
            return False, f"{error}"
        finally:
            if connection is not None:
                with contextlib.suppress(libvirt.libvirtError):
                    connection.close()

    def _suspend(self, domain: Any, vm: str, paused: bool) -> tuple[bool, str]:
        if paused:
            ours = self._noted(vm) == domain.ID()
            return True, "the VM was suspended before" if ours else "the VM had been paused by others"
        self._note(vm, domain.ID())
        domain.suspend()
        return True, "the VM is suspended"

    def _resume(self, domain: Any, vm: str, paused: bool) -> tuple[bool, str]:
        ours = self._noted(vm) == domain.ID()
        if ours and paused:
            domain.resume()
        self._forget(vm)
        if not ours:
            return True, "the VM was not suspended by hostd, and is left as it is"
        return True, "the VM runs again" if paused else "the VM had been resumed by others"

    # ── What was suspended ────────────────────────────────────────────────────────────────────────

    def _path(self, vm: str) -> Path:
        return self._run / f"{_NOTE}{vm}"

    def _note(self, vm: str, run: int) -> None:
        # Others may write to the run directory: a file of theirs, or a link, is not written through.
        self._path(vm).unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(self._path(vm), flags, 0o600), "wb") as file:
            file.write(b"%d" % run)

    def _noted(self, vm: str) -> int | None:
        """The run of the domain that was suspended; None if none was."""
        try:
            fd = os.open(self._path(vm), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with open(fd, "rb") as file:
            own = os.fstat(fd).st_uid == os.geteuid()
            text = file.read(16)
        return int(text) if own and _RUN.fullmatch(text) else None

    def _forget(self, vm: str) -> None:
        self._path(vm).unlink(missing_ok=True)


def _domain(libvirt: Any, connection: Any, vm: str) -> Any:
    try:
        return connection.lookupByUUIDString(vm)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise
