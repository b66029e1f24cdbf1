"""An entry of the ledger: one JSON line, one leaf of the tree (docs/ledger.md).

Pure. Field names are append-only; what has its default value is left out of the line.
"""

from __future__ import annotations

from typing import Final

import msgspec

from guestlib.errors import NotFoundError, UnavailableError

MAX_ENTRY_BYTES: Final = 32 << 10
"""`detail` is at most 4000 characters, of which each may take six bytes (`\\u0000`). Below the 64 KiB that an
entry bundle of C2SP tlog-tiles can hold."""


class LedgerError(UnavailableError):
    """The ledger cannot be read or written, or is not what was recorded; nothing is answered without it."""


class ArchivedError(NotFoundError):
    """The entry is in a segment that was archived."""


class Rotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of `rotate`, the first entry of a segment: all that the next start needs of the segments before it."""

    previous: int
    """First entry of the segment before."""
    follow: int
    """`carried` entries that follow at once."""
    frontier: tuple[bytes, ...]
    """Right edge of the tree of all entries before this one (`hostd.core.merkle.Frontier`)."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line."""

    seq: int
    time: int
    """UTC, milliseconds since 1970."""
    event: str
    """`operation`, or what hostd or an officer did: `start`, `unseal`, `drift`, `clear`, …"""
    outcome: str
    """`released`, `denied`, `refused-drift`, `withheld`, `failed`; `done` for hostd's own deeds."""
    v: int = 1
    passed: int = 0
    """Number of the pass of readings it rests on; 0 if none."""
    principal: str = ""
    tenant: str = ""
    op: str = ""
    key: str = ""
    version: int = 0
    code: str = ""
    """Error code of `guestlib.errors` for a refusal."""
    detail: str = ""
    """For operators: findings, reasons."""
    request: bytes = b""
    """Commitment to the request, 32 bytes (`guestlib.attest.canonical`); empty if there is none."""
    response: bytes = b""
    """Commitment to the answer, likewise; a refusal has none."""
    pass_entry: int = 0
    """Of an entry of a batch: number of the `pass` entry that the batch begins with."""
    evidence: bytes = b""
    """Of `pass`: the evidence digest that the batch's quote signs, 32 bytes."""
    first_start_ns: int = 0
    last_end_ns: int = 0
    """Of `pass`: when its first reading started and its last one ended, the vault's monotonic clock."""
    readings: tuple[int, ...] = ()
    """Of `pass`: numbers of its first and last reading."""
    requests: int = 0
    """Of `pass`: entries of the batch, which follow at once."""
    withheld: tuple[tuple[int, int], ...] = ()
    """Of `withheld`: first and last of each run of entries whose answers never left, ascending."""
    rotation: Rotation | None = None
    """Of `rotate`."""
    carried: Entry | None = None
    """Of `carried`: an entry of an earlier segment that the next start needs."""
