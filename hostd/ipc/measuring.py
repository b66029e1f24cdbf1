"""Vault ↔ measurer. The vault asks, the measurer answers, in the order of the asking.

Records are MessagePack arrays (`hostd.ipc.channel` frames them). Requests that this table does not
name are refused by decoding. The measurer accepts only the vault's uid.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.findings import Kind
from hostd.core.reading_types import Count, Name, Struct
from hostd.core.readings import Reading

SequenceNumber = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Ask(Struct, frozen=True, tag="ask"):
    """Read one component. `vm` is set for `process`, `relro` and `domain`, `position` (log bytes already
    held) for `ima` and `boot`, `part` for `kernel`, which is read part by part."""

    seq: SequenceNumber
    kind: Kind
    vm: Annotated[str, msgspec.Meta(max_length=36)] = ""
    position: Count = 0
    part: Count = 0


class AskFile(Struct, frozen=True, tag="file"):
    """Identify the file with this number."""

    seq: SequenceNumber
    file: Count


class AskWho(Struct, frozen=True, tag="who"):
    """Which hypervisor process is at the other end of this channel?

    Either `cid` (vsock) or `pid` (peer of a unix socket, SO_PEERCRED) is not 0. Answered by a
    `ProcessReading`; by `Missing`, absent, if a pid is certainly no hypervisor process; or by `Missing`,
    not absent, if that cannot be said: then the caller is nobody.
    """

    seq: SequenceNumber
    cid: Count = 0
    pid: Count = 0


class AskSurvey(Struct, frozen=True, tag="survey"):
    """Digests of all regular files under the given prefixes that hold code; for making a baseline.

    Answered by any number of `SurveyPart`, the last one with `done` true.
    """

    seq: SequenceNumber
    prefixes: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]


class AskSuspend(Struct, frozen=True, tag="suspend"):
    """Have libvirt suspend this VM; with `on` false resume it, if the measurer suspended it. Answered by
    `Suspended`. Refused unless the configuration has a reaction that suspends."""

    seq: SequenceNumber
    vm: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
    on: bool


Request = Ask | AskFile | AskWho | AskSurvey | AskSuspend


class Hello(Struct, frozen=True, tag="hello"):
    """First record of the measurer on every connection. File numbers and tags of another `epoch`
    mean nothing."""

    epoch: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Answer(Struct, frozen=True, tag="answer"):
    """The reading, and how long it took by the measurer's own monotonic clock, in nanoseconds."""

    seq: SequenceNumber
    reading: Reading
    cost_ns: Count
    freeze: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Under `gate.freeze`: whether the VM stood still for this reading. Empty: nobody tried."""


class Hint(Struct, frozen=True, tag="hint"):
    """Something happened that a reading of this component may show: read it soon. Sent unasked, at most
    every 10 ms for each component. Nothing is ever trusted because no hint came."""

    kind: Kind
    vm: Annotated[str, msgspec.Meta(max_length=36)] = ""


class SurveyPart(Struct, frozen=True, tag="survey"):
    """Some surveyed files: path → SHA-256."""

    seq: SequenceNumber
    files: Annotated[dict[Name, bytes], msgspec.Meta(max_length=1024)]
    done: bool


class Suspended(Struct, frozen=True, tag="suspended"):
    """Whether it is now as asked, and what was done or stood in the way."""

    seq: SequenceNumber
    done: bool
    detail: Annotated[str, msgspec.Meta(max_length=500)]


Response = Hello | Answer | SurveyPart | Hint | Suspended
