"""The vault's end of the measurer: asks, deadlines, appraisal.

The vault asks and takes the time of its own asking as the reading's start; the measurer's clock is
never trusted for freshness. There are two lanes, because the measurer reads the kernel in a thread of its
own: one reading of the kernel, and at most `MAX_READINGS` of other components, are asked for at
once, so that the measurer never idles while somebody waits and nothing piles up. One more may be, if it is
the `relro` of a VM whose `process` is being read: the two are cheaper together (`hostd.platform.vmas`). A
reading that misses its deadline, or a record that does not fit what was asked, ends the connection: every
stamp is lost, and the measurer is connected to again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from hostd.core.findings import KERNEL, Component, Kind, Status, Verdict, process_of
from hostd.core.reading_boot import BootReading
from hostd.core.reading_domain import DomainReading
from hostd.core.reading_kernel import KernelReading
from hostd.core.reading_relro import RelroReading
from hostd.core.reading_self import SelfReading
from hostd.core.readings import (
    FileIdentity,
    FilesReading,
    GuestsReading,
    ImaReading,
    Missing,
    PostureReading,
    ProcessReading,
    Reading,
)
from hostd.ipc import measuring
from hostd.ipc.channel import Channel, ChannelError
from hostd.ipc.connect import Connector
from hostd.vault.asking import Asked, Asks
from hostd.vault.identifying import Identifying

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hostd.core.appraisal import Appraiser
    from hostd.ipc.loop import Loop

MAX_READINGS: Final = 2
"""Of other components than the kernel."""
MAX_LOG_BYTES: Final = 64 << 20
"""About 450,000 entries; over it the log is no longer held and IMA is not good."""
MAX_SURVEYED: Final = 500_000
"""Files of one survey; a Debian host has some 15,000."""
MAX_PARTS: Final = 256
"""Of one reading of the kernel."""
IDENTIFY_DEADLINE_S: Final = 120.0
"""Hashing four large files in turn, between other readings, from a cold disk, on a slow machine."""
SURVEY_DEADLINE_S: Final = 600.0
SUSPEND_DEADLINE_S: Final = 60.0
"""The measurer itself gives libvirt up before (`hostd.measurer.suspender`)."""

EXPECTED: Final[dict[Kind, type]] = {
    Kind.GUESTS: GuestsReading,
    Kind.POSTURE: PostureReading,
    Kind.IMA: ImaReading,
    Kind.FILES: FilesReading,
    Kind.PROCESS: ProcessReading,
    Kind.BOOT: BootReading,
    Kind.KERNEL: KernelReading,
    Kind.RELRO: RelroReading,
    Kind.DOMAIN: DomainReading,
    Kind.SELF: SelfReading,
}


class Listener(Protocol):
    """Who is told (the vault)."""

    def measurer_ready(self) -> None: ...

    def measurer_lost(self, reason: str) -> None: ...

    def on_verdict(
        self, verdict: Verdict, reading: Reading, started: int, ended: int, cost_ns: int
    ) -> None: ...

    def on_hint(self, component: Component) -> None: ...


class Measuring:
    """The connection to the measurer and the appraiser of its readings.

    `log_attested` false: the TPM is not the one that the kernel extends (the embedded one), so that its
    log proves nothing here, and `ima` is absent.
    """

    def __init__(
        self,
        loop: Loop,
        path: Path,
        *,
        uid: int,
        deadline_s: float,
        log_attested: bool,
        new_appraiser: Callable[[], Appraiser | None],
        listener: Listener,
    ) -> None:
        self._loop = loop
        self._deadline_s = deadline_s
        self._log_attested = log_attested
        self._new_appraiser = new_appraiser
        self._listener = listener
        self._asks = Asks()
        self._seq = 0
        self._files = Identifying()
        self._channel: Channel[measuring.Response] | None = None
        self._greeted = False
        self.appraiser = new_appraiser()
        """None: there are no reference values to judge against, and nothing is read."""
        self.ima_log = bytearray()
        """The log as far as it was read since the measurer's last greeting; verifiers ask for it."""
        self._connector = Connector(
            loop, path, uid=uid, record_type=measuring.Response, connected=self._on_connected
        )
        self._connector.start()
        self._watchdog()

    # ── Connection ────────────────────────────────────────────────────────────────────────────────

    def _on_connected(self, channel: Channel[measuring.Response]) -> None:
        self._channel = channel
        self._greeted = False
        self._hello_by = time.monotonic() + self._deadline_s
        self._loop.watch(channel, self._on_events)

    @property
    def ready(self) -> bool:
        return self._channel is not None and self._greeted

    def _lose(self, reason: str) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        self._loop.forget(channel)
        channel.close()
        lost = self._asks.clear()
        self._files.clear()
        self._listener.measurer_lost(reason)
        for asked in lost:
            if asked.raw is not None:
                asked.raw(Missing(reason="the measurer was lost", absent=False))
            if asked.survey is not None:
                asked.survey(None)
            if asked.suspended is not None:
                asked.suspended(False, "the measurer was lost")
        self._connector.start()

    def restart(self) -> None:
        """New reference values: appraise everything from nothing."""
        self.appraiser = self._new_appraiser()
        self._lose("reference values changed")

    def _watchdog(self) -> None:
        now = time.monotonic()
        if self._channel is not None:
            if not self._greeted and now > self._hello_by:
                self._lose("the measurer did not greet")
            late = self._asks.late(now)
            if late is not None:
                self._lose(f"a reading missed its deadline: {late.component or 'file or survey'}")
        self._loop.call_after(self._deadline_s / 4, self._watchdog)

    # ── Asking ────────────────────────────────────────────────────────────────────────────────────

    def _send(self, asked: Asked, request: measuring.Request) -> None:
        """Sends a request, or keeps it until the measurer has answered enough of the others."""
        if self._channel is not None:
            self._asks.add(asked, request)
            self._send_ready()

    def _send_ready(self) -> None:
        channel, requests = self._channel, self._asks.ready(time.monotonic())
        if channel is None or not requests:
            return
        try:
            channel.send(*requests)
        except ChannelError as error:
            self._lose(str(error))
            return
        self._loop.watch(channel, self._on_events, write=channel.wants_write)

    def _next(self, within_s: float, *, started: int | None = None) -> Asked:
        self._seq += 1
        return Asked(self._seq, time.monotonic_ns() if started is None else started, within_s)

    @property
    def busy(self) -> frozenset[Component]:
        """Components that are being read."""
        return self._asks.components

    @property
    def has_room(self) -> bool:
        return self.ready and self.appraiser is not None and len(self.busy) <= MAX_READINGS + 1

    def takes(self, component: Component) -> bool:
        """Whether the component may be asked for now: it is not being read, and its lane has room."""
        busy = self.busy
        if component in busy:
            return False
        if component == KERNEL:
            return True
        rides = component.kind is Kind.RELRO and process_of(component.vm) in busy
        return len(busy - {KERNEL}) < MAX_READINGS + rides

    def ask(self, component: Component) -> None:
        """Asks for one reading of a component."""
        self._ask(component, self._next(self._deadline_s))

    def _go_on(self, before: Asked, component: Component, *, part: int = 0, cost_ns: int = 0) -> None:
        """Asks for more of a reading that is not complete; it started when its first part was asked for."""
        asked = self._next(self._deadline_s, started=before.started)
        asked.part, asked.cost_ns = part, cost_ns
        self._ask(component, asked)

    def _ask(self, component: Component, asked: Asked) -> None:
        asked.component = component
        judge = self.appraiser
        position = 0
        if judge is not None and component.kind in (Kind.IMA, Kind.BOOT):
            position = judge.ima.position if component.kind is Kind.IMA else judge.boot.position
        self._send(asked, measuring.Ask(asked.seq, component.kind, component.vm, position, asked.part))

    def who(self, cid: int, pid: int, told: Callable[[Reading], None]) -> None:
        """Which hypervisor process is at the other end of a channel."""
        self._raw(lambda seq: measuring.AskWho(seq, cid, pid), self._deadline_s, told)

    def read(
        self, component: Component, position: int, told: Callable[[Reading], None], *, part: int = 0
    ) -> None:
        """A reading for a manifest: nobody appraises it, no stamp moves."""
        kind, vm = component.kind, component.vm
        self._raw(lambda seq: measuring.Ask(seq, kind, vm, position, part), self._deadline_s, told)

    def identify(self, file: int, told: Callable[[Reading], None]) -> None:
        """Identity of one file, for a manifest."""
        self._raw(lambda seq: measuring.AskFile(seq, file), IDENTIFY_DEADLINE_S, told)

    def _raw(
        self, request: Callable[[int], measuring.Request], deadline_s: float, told: Callable[[Reading], None]
    ) -> None:
        if not self.ready:
            told(Missing(reason="the measurer is not connected", absent=False))
            return
        asked = self._next(deadline_s)
        asked.raw = told
        self._send(asked, request(asked.seq))

    def survey(self, prefixes: tuple[str, ...], told: Callable[[dict[str, bytes] | None], None]) -> None:
        """Digests of all code files under the prefixes; None if the measurer was lost meanwhile."""
        if not self.ready:
            told(None)
            return
        asked = self._next(SURVEY_DEADLINE_S)
        asked.survey = told
        self._send(asked, measuring.AskSurvey(asked.seq, prefixes))

    def suspend(self, vm: str, on: bool, told: Callable[[bool, str], None]) -> None:
        """Has a VM suspended (`on` false: resumed). Tells whether it is so now, and what was done."""
        if not self.ready:
            told(False, "the measurer is not connected")
            return
        asked = self._next(SUSPEND_DEADLINE_S)
        asked.suspended = told
        self._send(asked, measuring.AskSuspend(asked.seq, vm, on))

    def _identify(self) -> None:
        while (file := self._files.next()) is not None:
            asked = self._next(IDENTIFY_DEADLINE_S)
            asked.file = file
            self._send(asked, measuring.AskFile(asked.seq, file))

    # ── Answers ───────────────────────────────────────────────────────────────────────────────────

    def _on_events(self, _events: int) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            channel.flush()
            records = channel.receive()
        except ChannelError as error:
            self._lose(str(error))
            return
        self._loop.watch(channel, self._on_events, write=channel.wants_write)
        for record in records:
            self._on_record(record)
            if self._channel is not channel:
                return
        self._send_ready()

    def _on_record(self, record: measuring.Response) -> None:
        if isinstance(record, measuring.Hello):
            if self._greeted:
                self._lose("the measurer greeted twice")
                return
            self._greeted = True
            self.appraiser = self._new_appraiser()
            self.ima_log.clear()
            self._listener.measurer_ready()
            return
        if isinstance(record, measuring.Hint) and self._greeted:
            self._listener.on_hint(Component(record.kind, record.vm))
            return
        asked = None if isinstance(record, measuring.Hint) else self._asks.get(record.seq)
        if not self._greeted or asked is None or isinstance(record, measuring.Hint):
            self._lose("the measurer answered what was not asked")
        elif isinstance(record, measuring.SurveyPart):
            self._on_survey(asked, record)
        elif isinstance(record, measuring.Suspended) and asked.suspended is not None:
            self._asks.done(asked)
            asked.suspended(record.done, record.detail)
        elif asked.survey or asked.suspended or isinstance(record, measuring.Suspended):
            self._lose("the measurer answered what was not asked")
        else:
            self._asks.done(asked)
            self._on_answer(asked, record)

    def _on_survey(self, asked: Asked, part: measuring.SurveyPart) -> None:
        if asked.survey is None:
            self._lose("the measurer answered what was not asked")
            return
        asked.surveyed.update(part.files)
        if len(asked.surveyed) > MAX_SURVEYED:
            self._lose(f"a survey of over {MAX_SURVEYED} files")
            return
        if part.done:
            self._asks.done(asked)
            asked.survey(asked.surveyed)

    def _on_answer(self, asked: Asked, answer: measuring.Answer) -> None:
        reading = answer.reading
        if asked.component is not None:
            self._on_reading(asked, asked.component, answer)
        elif asked.raw is not None:
            asked.raw(reading)
        elif isinstance(reading, FileIdentity | Missing):
            if self.appraiser is not None:
                self.appraiser.learn(asked.file, reading)
            self._files.done(asked.file)
            self._identify()
        else:
            self._lose("the measurer answered what was not asked")

    def _on_reading(self, asked: Asked, component: Component, answer: measuring.Answer) -> None:
        reading = answer.reading
        if not isinstance(reading, EXPECTED[component.kind] | Missing):
            self._lose("the measurer answered what was not asked")
            return
        if self.appraiser is None:
            return
        if component.kind in (Kind.IMA, Kind.BOOT) and not self._log_attested:
            reading = Missing(reason="the kernel does not extend this TPM", absent=True)
        verdict = self.appraiser.appraise(component, reading)
        if answer.freeze:
            verdict = replace(verdict, claims=(*verdict.claims, ("freeze", answer.freeze)))
        if isinstance(reading, ImaReading) and reading.offset == len(self.ima_log):
            self.ima_log += reading.data
            if len(self.ima_log) > MAX_LOG_BYTES:
                self._lose(f"the IMA log is over {MAX_LOG_BYTES} bytes")
                return
        if isinstance(reading, ImaReading) and reading.more and verdict.status is not Status.DRIFTED:
            self._go_on(asked, component)
            return
        cost_ns = answer.cost_ns + asked.cost_ns
        if isinstance(reading, KernelReading) and verdict.status is not Status.DRIFTED:
            if reading.part != asked.part or reading.parts > MAX_PARTS:
                self._lose("the measurer answered what was not asked")
                return
            if reading.part + 1 < reading.parts:
                self._go_on(asked, component, part=reading.part + 1, cost_ns=cost_ns)
                return
        # What a drifted component has mapped besides is nobody's concern until an officer has been there.
        if verdict.identify and verdict.status is not Status.DRIFTED:
            self._files.want(component, verdict.identify)
            self._identify()
            if not self.ready:  # it was lost in the asking: no verdict outlives it
                return
        self._listener.on_verdict(verdict, reading, asked.started, time.monotonic_ns(), cost_ns)
