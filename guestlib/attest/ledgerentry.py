"""One line of the ledger as whoever verifies it reads it (docs/receipts.md, "Entries").

Pure, standard library only. Field names are append-only: what this version does not know is ignored,
what it knows must have its type. Parsing verifies nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, Final

from guestlib.attest.canonical import COMMITMENT_BYTES
from guestlib.errors import MalformedError

MAX_ENTRY_BYTES: Final = 32 << 10
MAX_COUNT: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What an entry says. Empty text, empty bytes and 0 stand for what it does not say."""

    seq: int
    time: int
    """UTC, milliseconds since 1970."""
    event: str
    """`operation`, `pass`, …"""
    outcome: str
    passed: int
    principal: str
    tenant: str
    op: str
    key: str
    version: int
    code: str
    request: bytes
    """Commitment to the request, 32 bytes or none."""
    response: bytes
    pass_entry: int
    """The `pass` entry that an entry of a batch rests on."""
    evidence: bytes
    """Of `pass`: the evidence digest in the batch's quote, 32 bytes."""
    first_start_ns: int
    last_end_ns: int
    """Of `pass`: start of its first reading and end of its last, the host's monotonic clock."""
    requests: int
    """Of `pass`: how many entries follow in its batch."""


def parse_entry(line: bytes) -> LedgerEntry:
    """Parses a line of at most 32 KiB, without its newline.

    Raises:
        MalformedError: it is no entry.
    """
    if len(line) > MAX_ENTRY_BYTES:
        raise MalformedError(f"ledger entry: over {MAX_ENTRY_BYTES} bytes")
    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=no_duplicates)
        if not isinstance(fields, dict):
            raise TypeError("not an object")
        return LedgerEntry(
            seq=count(fields["seq"]),
            time=count(fields["time"]),
            event=text(fields["event"]),
            outcome=text(fields["outcome"]),
            passed=count(fields.get("passed", 0)),
            principal=text(fields.get("principal", "")),
            tenant=text(fields.get("tenant", "")),
            op=text(fields.get("op", "")),
            key=text(fields.get("key", "")),
            version=count(fields.get("version", 0)),
            code=text(fields.get("code", "")),
            request=_digest(fields, "request"),
            response=_digest(fields, "response"),
            pass_entry=count(fields.get("pass_entry", 0)),
            evidence=_digest(fields, "evidence"),
            first_start_ns=count(fields.get("first_start_ns", 0)),
            last_end_ns=count(fields.get("last_end_ns", 0)),
            requests=count(fields.get("requests", 0)),
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise MalformedError(f"ledger entry: {error}") from error


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`. Raises: ValueError, a name is given twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is given twice")
    return fields


def count(value: object) -> int:
    """Raises: TypeError, not an integer; ValueError, negative or over 2^63 - 1."""
    if type(value) is not int:
        raise TypeError("an integer is missing")
    if not 0 <= value <= MAX_COUNT:
        raise ValueError("a number is out of range")
    return value


def text(value: object) -> str:
    """Raises: TypeError."""
    if not isinstance(value, str):
        raise TypeError("a string is missing")
    return value


def unbase64(value: object, limit: int) -> bytes:
    """Raises: TypeError, not a string; ValueError, not the base64 of at most `limit` bytes."""
    try:
        data = base64.b64decode(text(value), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
    if len(data) > limit:
        raise ValueError(f"{len(data)} bytes, at most {limit} are allowed")
    return data


def _digest(fields: dict[str, Any], name: str) -> bytes:
    if name not in fields:
        return b""
    data = unbase64(fields[name], COMMITMENT_BYTES)
    if len(data) != COMMITMENT_BYTES:
        raise ValueError(f"{name} is not {COMMITMENT_BYTES} bytes")
    return data
