"""Reads what libvirt runs for a VM, and what its process says of itself.

libvirt is asked in `Directory`'s thread; a reading waits for it `WAIT_S` at most, once for a daemon that
hangs. While it is silent, what it said last of this very process (pid, start time) stands: nobody but
libvirt gives a running machine other devices. Of a process that it has not spoken of nothing is known,
and the reading is `Missing`.

Under `provider = "proc"` the command line is all there is (`hostd.measurer.domain_line`).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from hostd.core.reading_domain import DomainReading
from hostd.core.readings import Missing
from hostd.core.reference import DELETED
from hostd.measurer.commandline import parse_claims
from hostd.measurer.domain_line import definition_of
from hostd.measurer.domain_xml import Definition, MalformedDomainError
from hostd.measurer.guests import WAIT_S
from hostd.platform.procfs import MAX_COMMAND_LINE_BYTES, ProcessGoneError

if TYPE_CHECKING:
    from hostd.measurer.directory import Directory, Key
    from hostd.measurer.guests import Guest, GuestsProbe

MAX_CLAIMS = 16


class DomainProbe:
    """Reads what libvirt runs for a VM."""

    def __init__(self, guests: GuestsProbe) -> None:
        self._guests = guests
        self._known: dict[Key, Definition] = {}
        self._lines: dict[Key, _Line] = {}
        self._looked: tuple[Guest, ...] = ()

    def read(self, guest: Guest) -> DomainReading | Missing:
        """One reading.

        Raises:
            ProcessGoneError: the process has ended.
            MalformedProcError: /proc gave what it should not.
        """
        self._forget()
        handle, key = guest.found.handle, guest.found.key
        data = handle.read("cmdline", MAX_COMMAND_LINE_BYTES)
        line = self._line(guest, data)
        directory = self._guests.directory
        try:
            if directory is None:
                definition: Definition | None = line.definition(guest, data)
                answered = True
            else:
                self._guests.recheck(guest)
                definition = self._ask(directory, guest)
                answered = definition is not None
        except MalformedDomainError as error:
            return Missing(str(error)[:512], absent=False)
        definition = definition or self._known.get(key)
        if definition is None:
            assert directory is not None
            return Missing(f"libvirt does not say ({directory.error or 'no answer yet'})"[:512], absent=False)
        stat = handle.stat()
        if stat.ended or stat.start_time != key[1]:
            raise ProcessGoneError("the process has ended")
        self._known[key] = definition
        return _reading(guest, definition, line, answered=answered)

    def _line(self, guest: Guest, data: bytes) -> _Line:
        """What this very text says: it is parsed again when it is another."""
        key = guest.found.key
        line = self._lines.get(key)
        if line is None or line.digest != hashlib.sha256(data).digest():
            line = self._lines[key] = _Line(data)
        return line

    def _ask(self, directory: Directory, guest: Guest) -> Definition | None:
        word = directory.define(guest.hypervisor.vm, WAIT_S)
        if word is None:
            return None
        if word.pid != guest.found.key[0]:
            raise ProcessGoneError(f"libvirt says that pid {word.pid} is the VM by now")
        return word.definition

    def _forget(self) -> None:
        if self._guests.guests is self._looked:
            return
        self._looked = self._guests.guests
        alive = self._guests.alive()
        for key in [key for key in self._known if key not in alive]:
            del self._known[key]
        for key in [key for key in self._lines if key not in alive]:
            del self._lines[key]
        if self._guests.directory is not None:
            vms = frozenset(guest.hypervisor.vm for guest in self._guests.guests)
            self._guests.directory.forget(vms)

    def close(self) -> None:
        self._known.clear()
        self._lines.clear()


class _Line:
    """What a command line says, worked out once."""

    def __init__(self, data: bytes) -> None:
        vms, _, cids = parse_claims(data)
        self.vms = tuple(sorted(vms)[:MAX_CLAIMS])
        self.cids = tuple(sorted(cids)[:MAX_CLAIMS])
        self.digest = hashlib.sha256(data).digest()
        self._definition: tuple[tuple[str, str], Definition] | None = None

    def definition(self, guest: Guest, data: bytes) -> Definition:
        """The machine that it, `data`, describes.

        Raises:
            MalformedDomainError: it says more than the bounds allow.
        """
        # An upgrade leaves running machines on the file of this path that was replaced.
        emulator, accel = guest.found.executable.removesuffix(DELETED), guest.hypervisor.accel
        if self._definition is None or self._definition[0] != (emulator, accel):
            self._definition = (emulator, accel), definition_of(data, emulator=emulator, accel=accel)
        return self._definition[1]


def _reading(guest: Guest, definition: Definition, line: _Line, *, answered: bool) -> DomainReading:
    return DomainReading(
        vm=definition.vm,
        name=definition.name,
        pid=guest.found.key[0],
        start_time=guest.found.key[1],
        source=guest.hypervisor.source,
        virt=definition.virt,
        emulator=definition.emulator,
        machine=definition.machine,
        boot=definition.boot,
        arguments=definition.arguments,
        environment=definition.environment,
        cid=definition.cid,
        labels=definition.labels,
        memory=definition.memory,
        devices=definition.devices,
        definition=definition.digest,
        said_vms=line.vms,
        said_cids=line.cids,
        said=line.digest,
        answered=answered,
    )
