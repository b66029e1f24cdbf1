"""Judges component `boot`: the boot event log against the TPM's PCRs and the reviewed host's (pure).

In this order; the first step that finds something ends it:

1. the log is one, whole, and the same as before;
2. it replays to the PCR values that every batch's quote is compared with (`pcrs`);
3. each PCR has a value that the reference values accept; one that has not is named with the first event
   that is another than on the reviewed host;
4. the running kernel's command line is the one that was measured, where the log holds one.

Without PCR values or without reference values nothing is verified: the component is absent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.attest.bootcommand import compare_command_line
from guestlib.attest.eventlog import (
    EventLog,
    MalformedEventLogError,
    first_difference,
    parse_log,
    replay_log,
)
from guestlib.attest.eventtext import type_name
from hostd.core.codes import Code
from hostd.core.findings import BOOT, Finding, Severity, Status, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guestlib.attest.eventlog import BootEvent
    from hostd.core.findings import Component
    from hostd.core.reading_boot import BootReading
    from hostd.core.reference import Reference
    from hostd.core.rule_boot import BootRule, EventRule

LOGGED_PCRS: Final = frozenset((*range(10), 14))
"""PCRs that only firmware and boot loaders extend, so that the log accounts for all of their value. The
kernel and systemd extend 10 to 13 and 15 later, without the firmware's log."""
_SHOWN_DIGITS: Final = 16


@dataclass(frozen=True, slots=True)
class _Log:
    digest: bytes
    parsed: EventLog
    values: dict[int, bytes]


class BootJudge:
    """Judges readings of `boot` and keeps what later ones must agree with.

    `pcrs`: the values of the SHA-256 bank that every quote is compared with, index → 32 bytes.
    """

    def __init__(self, pcrs: Mapping[int, bytes] | None = None) -> None:
        self.position = 0
        """Bytes of the log that were judged: what to ask from next."""
        self._pcrs = dict(pcrs or {})
        self._log: _Log | None = None

    @property
    def values(self) -> dict[int, bytes]:
        """Quoted PCRs that the log accounts for, once it replays to them; else empty. A rule is proposed
        from these."""
        return {pcr: value for pcr, value in self.replayed.items() if pcr in self._pcrs}

    @property
    def replayed(self) -> dict[int, bytes]:
        """All PCRs that the log accounts for, once it replays to those that are quoted; else empty. The
        others are only the log's word."""
        if self._log is None or not self._pcrs or self._mismatches(self._log):
            return {}
        return {pcr: value for pcr, value in self._log.values.items() if pcr in LOGGED_PCRS}

    @property
    def log(self) -> EventLog | None:
        """The log's events, as they were last read; None before."""
        return None if self._log is None else self._log.parsed

    def appraise(self, component: Component, reading: BootReading, reference: Reference) -> Verdict:
        """The verdict on one reading. PENDING if it has no data and none was judged before."""
        if not reading.data and reading.size and self._log is None:
            self.position = 0
            return Verdict(component, Status.PENDING)
        if reading.data or self._log is None:
            taken = self._take(reading)
            if isinstance(taken, Finding):
                return _drifted(component, [taken])
            self._log, self.position = taken, reading.size
        log = self._log
        if (reading.size, reading.sha256) != (self.position, log.digest):
            return _drifted(
                component,
                [_finding(Code.BOOT_LOG_CHANGED, "boot event log", log.digest.hex(), reading.sha256.hex())],
            )
        return self._judge(component, reading, log, reference.boot)

    def _take(self, reading: BootReading) -> _Log | Finding:
        digest = hashlib.sha256(reading.data).digest()
        if self._log is not None and self._log.digest != digest:
            return _finding(
                Code.BOOT_LOG_CHANGED, "boot event log", self._log.digest.hex(), reading.sha256.hex()
            )
        if len(reading.data) != reading.size or digest != reading.sha256:
            return _finding(
                Code.BOOT_MALFORMED,
                "boot event log",
                f"{reading.size} bytes with digest {reading.sha256.hex()}",
                f"{len(reading.data)} bytes with digest {digest.hex()}",
            )
        try:
            parsed = parse_log(reading.data)
        except MalformedEventLogError as error:
            return _finding(Code.BOOT_MALFORMED, "boot event log", "whole events", str(error))
        return _Log(digest, parsed, replay_log(parsed))

    def _judge(self, component: Component, reading: BootReading, log: _Log, rule: BootRule | None) -> Verdict:
        agreement = compare_command_line(log.parsed, reading.command_line)
        if not agreement.measured:
            command_line = "not in the log"
        else:
            command_line = "as measured in PCR " + str(agreement.measured[0].pcr)
        claims = [
            ("events", str(len(log.parsed.events))),
            ("boot log", log.digest.hex()),
            ("command line", command_line if agreement.agrees or not agreement.measured else "another"),
        ]
        found = self._mismatches(log)
        if not found and self._pcrs and rule is not None:
            for item in rule.pcrs:
                found += self._unaccepted(item.pcr, log, rule) or _altered(item.pcr, log, rule)
        if agreement.measured and not agreement.agrees:
            event = agreement.measured[-1]
            found.append(
                _finding(
                    Code.BOOT_COMMAND_LINE,
                    f"kernel command line, PCR {event.pcr}",
                    f"what {event} measured ({event.digest.hex()[:_SHOWN_DIGITS]}…)",
                    reading.command_line,
                )
            )
        if found:
            return _drifted(component, found, claims)
        if not self._pcrs:
            return Verdict(component, Status.ABSENT, claims=(*claims, ("PCRs", "none quoted")))
        replayed = ", ".join(str(pcr) for pcr in sorted(LOGGED_PCRS & self._pcrs.keys()))
        claims.append(("replay", f"PCRs {replayed}"))
        if rule is None:
            return Verdict(component, Status.ABSENT, claims=(*claims, ("reference", "none")))
        claims.append(("reference", "PCRs " + ", ".join(str(item.pcr) for item in rule.pcrs)))
        return Verdict(component, Status.VERIFIED, claims=tuple(claims))

    def _mismatches(self, log: _Log) -> list[Finding]:
        return [
            _finding(
                Code.BOOT_LOG_MISMATCH, f"PCR {pcr}", value.hex(), f"a log that gives {log.values[pcr].hex()}"
            )
            for pcr, value in sorted(self._pcrs.items())
            if pcr in LOGGED_PCRS and log.values[pcr] != value
        ]

    def _unaccepted(self, pcr: int, log: _Log, rule: BootRule) -> list[Finding]:
        accepted = rule.accepted(pcr)
        quoted = self._pcrs.get(pcr)
        if quoted is None:
            # PCR 6, say, to which nothing is sealed: its log is not proven either.
            return [_finding(Code.BOOT_PCR, f"PCR {pcr}", " or ".join(accepted), "not quoted")]
        if quoted.hex() in accepted:
            return []
        expected, seen = " or ".join(accepted), quoted.hex()
        row = [item for item in rule.events if item.pcr == pcr]
        events = [event for event in log.parsed.events if event.pcr == pcr and event.extends]
        where = ""
        if row and pcr in LOGGED_PCRS:
            difference = first_difference([(item.type, bytes.fromhex(item.digest)) for item in row], events)
            if difference is not None:
                index, event = difference
                expected, seen, where = _parted(row, index, event)
        return [_finding(Code.BOOT_PCR, f"PCR {pcr}", expected, seen, where)]


def _altered(pcr: int, log: _Log, rule: BootRule) -> list[Finding]:
    """Events whose digests are those of the reviewed host, and which say something else: nothing was
    booted that should not be, and somebody altered the log."""
    row = [item for item in rule.events if item.pcr == pcr]
    events = [event for event in log.parsed.events if event.pcr == pcr and event.extends]
    if [item.digest for item in row] != [event.digest.hex() for event in events]:
        return []  # of another boot that is accepted too
    return [
        _finding(
            Code.BOOT_MALFORMED,
            f"PCR {pcr}",
            f'{type_name(item.type)} "{item.text}"',
            f'{type_name(event.type)} "{event.text}", which its digest does not cover',
            f"event {event.number}",
        )
        for item, event in zip(row, events, strict=True)
        if item.type != event.type or (item.covered and not event.covered)
    ]


def _parted(row: list[EventRule], index: int, event: BootEvent | None) -> tuple[str, str, str]:
    """Expected, seen and where, of the first event of a PCR that is another."""
    expected = "no further event"
    if index < len(row):
        item = row[index]
        expected = f'{type_name(item.type)} "{item.text}" {item.digest[:_SHOWN_DIGITS]}…'
    if event is None:
        return expected, "no further event", f"its event {index}"
    seen = f'{type_name(event.type)} "{event.text}" {event.digest.hex()[:_SHOWN_DIGITS]}…'
    return expected, seen, f"event {event.number}"


def _finding(code: Code, subject: str, expected: str, seen: str, where: str = "") -> Finding:
    return Finding(str(BOOT), code.value, Severity.CRITICAL, subject, expected, seen, where)


def _drifted(
    component: Component, found: list[Finding], claims: list[tuple[str, str]] | None = None
) -> Verdict:
    return Verdict(component, Status.DRIFTED, tuple(found), claims=tuple(claims or ()))
