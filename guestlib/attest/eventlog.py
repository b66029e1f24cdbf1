"""The firmware's boot event log: events, and their replay into the SHA-256 bank (pure).

Format of /sys/kernel/security/tpm0/binary_bios_measurements on a TPM 2.0 (TCG PC Client Platform
Firmware Profile 1.06, section 10; little-endian; drivers/char/tpm/eventlog/tpm2.c hands it out as it is):

    first event, SHA-1 form:  u32 PCR = 0 | u32 type = EV_NO_ACTION | 20 zero bytes | u32 length | data
    its data:  "Spec ID Event03" NUL | u32 platform class | u8 minor, major, errata, uintn size |
               u32 number of algorithms | (u16 algorithm | u16 digest length) each | u8 length | vendor bytes
    all others:  u32 PCR | u32 type | u32 number of digests | (u16 algorithm | digest) each |
                 u32 length | data

The header says which algorithms there are; every event has one digest of each of them, and SHA-256 is
among them, or the log is malformed. Events of type EV_NO_ACTION extend nothing. One of them,
`StartupLocality`, says what PCR 0 started from. Trailing bytes are malformed: the kernel hands out whole
events only.

What an event's data says is not proven by the PCR, unless its digest is the data's own hash
(`BootEvent.covered`): a name in `text` is for people.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.attest.eventtext import VARIABLES, describe, type_name, variable_content

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_LOG_BYTES: Final = 1 << 20
"""Firmware reserves 64 KiB to 256 KiB; a host with many disks and option ROMs has some 100 KiB."""
MAX_EVENTS: Final = 8192
MAX_ALGORITHMS: Final = 8
"""Banks of a TPM; five hashes are in use."""
MAX_EVENT_BYTES: Final = 256 << 10
"""The largest are signature databases (dbx, 30 KiB and growing)."""
PCRS: Final = 24

EV_NO_ACTION: Final = 3
EV_SEPARATOR: Final = 4
EV_EVENT_TAG: Final = 6
EV_IPL: Final = 13

_SHA256: Final = 11
_SIZES: Final = {4: 20, 11: 32, 12: 48, 13: 64, 18: 32, 39: 32, 40: 48, 41: 64}
"""TPM_ALG_ID → digest bytes (TCG Algorithm Registry). Of others the header's word is taken, up to 64."""
_HASHES: Final = {4: "sha1", 11: "sha256", 12: "sha384", 13: "sha512"}
_SIGNATURE: Final = b"Spec ID Event03\0"
_LOCALITY: Final = b"StartupLocality\0"
_FIRST: Final = struct.Struct("<II20sI")
_HEAD: Final = struct.Struct("<III")
_SPEC: Final = struct.Struct("<16sIBBBBI")
_PAIR: Final = struct.Struct("<HH")
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")


class MalformedEventLogError(Exception):
    """The bytes are not a boot event log. `offset` is where the event starts that is not one."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"event at byte {offset}: {what}")
        self.offset = offset


@dataclass(frozen=True, slots=True)
class BootEvent:
    """One event."""

    number: int
    """From 0, the header's own event."""
    pcr: int
    type: int
    digest: bytes
    """SHA-256 that extends the PCR, 32 bytes; ignored for EV_NO_ACTION."""
    data: bytes
    covered: bool
    """The digest is the hash of `data` (of a variable: of its content), so the PCR proves what it says."""

    @property
    def text(self) -> str:
        """What the data says, for people: printable, at most 200 characters."""
        return describe(self.type, self.data)

    @property
    def extends(self) -> bool:
        return self.type != EV_NO_ACTION

    def __str__(self) -> str:
        return f'event {self.number} {type_name(self.type)} "{self.text}"'


@dataclass(frozen=True, slots=True)
class EventLog:
    """A whole log."""

    events: tuple[BootEvent, ...]
    locality: int
    """Startup locality: 0, 3 (D-RTM capable), or 4 (H-CRTM)."""


def parse_log(data: bytes) -> EventLog:
    """The log's events, the header's included.

    Raises:
        MalformedEventLogError: not of the format, too large, or without a SHA-256 bank.
    """
    if len(data) > MAX_LOG_BYTES:
        raise MalformedEventLogError(0, f"a log of {len(data)} bytes")
    header, algorithms, at = _parse_header(data)
    events = [header]
    locality: int | None = None
    extended = False
    while at < len(data):
        if len(events) == MAX_EVENTS:
            raise MalformedEventLogError(at, f"over {MAX_EVENTS} events")
        event, end = _parse_event(data, at, algorithms, len(events))
        if event.type == EV_NO_ACTION and event.data.startswith(_LOCALITY):
            # PFP 10.4.5.3: before anything is measured, once, and only of PCR 0.
            if locality is not None or extended or event.pcr != 0 or len(event.data) != len(_LOCALITY) + 1:
                raise MalformedEventLogError(at, "StartupLocality out of its place")
            locality = event.data[-1]
            if locality not in (0, 3, 4):
                raise MalformedEventLogError(at, f"started from locality {locality}")
        extended = extended or (event.extends and event.pcr == 0)
        events.append(event)
        at = end
    return EventLog(tuple(events), locality or 0)


def _parse_header(data: bytes) -> tuple[BootEvent, dict[int, int], int]:
    if len(data) < _FIRST.size:
        raise MalformedEventLogError(0, "no header")
    pcr, type_, digest, length = _FIRST.unpack_from(data)
    body = data[_FIRST.size : _FIRST.size + length]
    if pcr != 0 or type_ != EV_NO_ACTION or digest != bytes(20):
        raise MalformedEventLogError(0, "the first event is not EV_NO_ACTION of PCR 0 without a digest")
    if len(body) != length or length < _SPEC.size:
        raise MalformedEventLogError(0, "the header is cut short")
    signature, platform, minor, major, _errata, uintn, count = _SPEC.unpack_from(body)
    if signature != _SIGNATURE:
        raise MalformedEventLogError(0, "the header is not `Spec ID Event03`")
    # Platform class 0 client, 1 server; family 2.0; UINTN of 4 or 8 bytes as 1 or 2.
    if platform > 1 or (major, minor) != (2, 0) or uintn not in (1, 2):
        raise MalformedEventLogError(0, "the header is of another version")
    if not 0 < count <= MAX_ALGORITHMS or len(body) < _SPEC.size + count * _PAIR.size + 1:
        raise MalformedEventLogError(0, f"a header of {count} algorithms")
    algorithms: dict[int, int] = {}
    at = _SPEC.size
    for _ in range(count):
        algorithm, size = _PAIR.unpack_from(body, at)
        at += _PAIR.size
        if algorithm in algorithms or not 0 < size <= 64 or _SIZES.get(algorithm, size) != size:
            raise MalformedEventLogError(0, f"algorithm {algorithm:#x} of {size} bytes")
        algorithms[algorithm] = size
    if _SHA256 not in algorithms:
        raise MalformedEventLogError(0, "no SHA-256 bank")
    if len(body) != at + 1 + body[at]:
        raise MalformedEventLogError(0, "vendor bytes do not end the header")
    return BootEvent(0, 0, EV_NO_ACTION, bytes(32), body, covered=False), algorithms, _FIRST.size + length


def _parse_event(data: bytes, start: int, algorithms: dict[int, int], number: int) -> tuple[BootEvent, int]:
    if len(data) - start < _HEAD.size:
        raise MalformedEventLogError(start, "cut short")
    pcr, type_, count = _HEAD.unpack_from(data, start)
    at = start + _HEAD.size
    # 0xFFFFFFFF: EV_NO_ACTION events that are of no PCR (PFP 10.4.5.2).
    if pcr >= PCRS and not (type_ == EV_NO_ACTION and pcr == 0xFFFFFFFF):
        raise MalformedEventLogError(start, f"PCR {pcr}")
    if count != len(algorithms):
        raise MalformedEventLogError(start, f"{count} digests instead of {len(algorithms)}")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        if len(data) - at < _U16.size:
            raise MalformedEventLogError(start, "cut short")
        (algorithm,) = _U16.unpack_from(data, at)
        size = algorithms.get(algorithm)
        if size is None or algorithm in digests:
            raise MalformedEventLogError(start, f"a digest of algorithm {algorithm:#x}")
        at += _U16.size
        digests[algorithm] = data[at : at + size]
        at += size
    if len(data) - at < _U32.size:
        raise MalformedEventLogError(start, "cut short")
    (length,) = _U32.unpack_from(data, at)
    at += _U32.size
    if length > MAX_EVENT_BYTES or len(data) - at < length:
        raise MalformedEventLogError(start, f"data of {length} bytes")
    body = data[at : at + length]
    hashed = None if type_ == EV_NO_ACTION else _hashed(type_, body, digests[_SHA256])
    # Firmware hashes the same bytes for every bank.
    for algorithm, name in _HASHES.items() if hashed is not None else ():
        if algorithm in digests and digests[algorithm] != hashlib.new(name, hashed or b"").digest():
            raise MalformedEventLogError(start, f"its {name} digest is of other data than its SHA-256 digest")
    covered = hashed is not None
    return BootEvent(number, pcr, type_, digests[_SHA256], body, covered), at + length


def _hashed(type_: int, data: bytes, digest: bytes) -> bytes | None:
    """The part of an event's data that its SHA-256 digest is the hash of: all of it, or of a variable
    its content only (PFP 10.4.1, EV_EFI_VARIABLE_BOOT). None: the digest is of something else."""
    for part in (data, variable_content(data) if type_ in VARIABLES else None):
        if part is not None and hashlib.sha256(part).digest() == digest:
            return part
    return None


def replay_log(log: EventLog) -> dict[int, bytes]:
    """PCRs 0 to 15 of the SHA-256 bank after all events, 32 bytes each.

    PCRs from 16 on may be reset at run time, and are not replayed.
    """
    values = {pcr: bytes(32) for pcr in range(16)}
    values[0] = bytes(31) + bytes([log.locality])
    for event in log.events:
        if event.extends and event.pcr < 16:
            values[event.pcr] = hashlib.sha256(values[event.pcr] + event.digest).digest()
    return values


def first_difference(
    expected: Iterable[tuple[int, bytes]], seen: Iterable[BootEvent]
) -> tuple[int, BootEvent | None] | None:
    """Where two rows of events of one PCR part: the index in `expected`, and the event that is there
    instead (None: the row ends). None: they do not differ. `expected` are (type, digest) pairs."""
    row, others = list(expected), list(seen)
    for index in range(max(len(row), len(others))):
        here = others[index] if index < len(others) else None
        if index >= len(row) or here is None or (here.type, here.digest) != row[index]:
            return index, here
    return None
