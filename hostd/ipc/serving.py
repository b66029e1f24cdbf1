"""Gateway ↔ vault: the broker's link, and one channel per worker.

The broker asks the vault to bind a channel to the caller that the kernel named (a vsock CID, or the
credentials of a unix peer); the vault finds out through the measurer which VM that is. From then on
the channel *is* the caller: no record on it names one.

Request tables by phase (everything is off until opened):

| link    | phase   | records taken from the gateway |
|---------|---------|--------------------------------|
| broker  | always  | `Bind` with one descriptor     |
| worker  | new     | `OpenChannel`                  |
| worker  | serving | `Call`                         |
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from hostd.core.reading_types import Count, Name, Struct
from hostd.ipc.operations import Operation

MAX_CALL_BYTES = 256 << 10
"""A worker's record: the largest operation is under 70 KiB; a frame's size, for good."""
MAX_BIND_BYTES = 4 << 10
MAX_DOCUMENT_BYTES = 128 << 10
"""A receipt (`guestlib.attest.receipt`)."""
Seq = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Bind(Struct, frozen=True, tag="bind"):
    """A caller appeared. The vault's end of the new worker's channel travels with this record.

    `cid` for vsock; or `pid`, `uid` of a unix peer (`cid` 0).
    """

    bind: Seq
    cid: Count
    pid: Count = 0
    uid: Count = 0


class Bound(Struct, frozen=True, tag="bound"):
    bind: Seq
    principal: Name
    """For the gateway's own logs: `VM::"uuid"` or `Host::"uid:0"`."""


class Unbound(Struct, frozen=True, tag="unbound"):
    """The caller is nobody hostd knows (or no more): close its connections."""

    bind: Seq
    reason: Annotated[str, msgspec.Meta(max_length=512)]


class Renew(Struct, frozen=True, tag="renew"):
    """The channel CA is another one: whatever was bound before this record keeps its connections and gets
    no new ones."""


class OpenChannel(Struct, frozen=True, tag="open"):
    """First record of a worker."""


class ChannelIdentity(Struct, frozen=True, tag="identity"):
    """A fresh TLS server certificate for this worker and its key (PEM), issued by the channel CA."""

    certificate_chain: bytes
    private_key: bytes
    not_after: Count
    """Unix time, seconds."""


class Call(Struct, frozen=True, tag="call"):
    """One request of the channel's caller."""

    seq: Seq
    operation: Operation
    deadline_ms: Annotated[int, msgspec.Meta(ge=0, le=600_000)] = 0
    """0: the configured default."""
    receipt: Literal["none", "reference", "full"] = "reference"
    """What of the receipt goes with the answer; the ledger entry is made whatever it says."""


class Receipt(Struct, frozen=True):
    """Where the answer is recorded: the ledger entry, and the pass of readings it rests on."""

    ledger: Count
    passed: Count
    document: Annotated[bytes, msgspec.Meta(max_length=MAX_DOCUMENT_BYTES)] = b""
    """The whole receipt (`guestlib.attest.receipt`), if the caller asked for it; else empty."""


class Reply(Struct, frozen=True, tag="reply"):
    """`result` is the MessagePack map of the operation's result struct."""

    seq: Seq
    result: bytes
    receipt: Receipt | None


class Fault(Struct, frozen=True, tag="fault"):
    """A typed refusal (`guestlib.errors`), with the ledger entry that records it, if any."""

    seq: Seq
    code: Annotated[str, msgspec.Meta(max_length=32)]
    message: Annotated[str, msgspec.Meta(max_length=512)]
    ledger: Annotated[int, msgspec.Meta(ge=0)] | None = None


FromBroker = Bind
ToBroker = Bound | Unbound | Renew
FromWorker = OpenChannel | Call
ToWorker = ChannelIdentity | Reply | Fault
