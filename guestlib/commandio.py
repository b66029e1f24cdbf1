"""What every command of `hostd-guest` reads and prints."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any, Final

from guestlib import errors, receiptcommands
from guestlib.attest.bundle import MAX_BUNDLE_BYTES, TrustBundle, parse_bundle

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

MAX_INPUT_BYTES: Final = 1 << 20
"""Read from a file; what the host takes is less and the host says so."""


class UsageError(Exception):
    """The command line, or a file it names, cannot be used."""


def read_bytes(name: str, limit: int = MAX_INPUT_BYTES) -> bytes:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error
    if len(data) > limit:
        raise UsageError(f"{name}: over {limit} bytes")
    return data


def read_bundle(name: str) -> TrustBundle:
    try:
        return parse_bundle(read_bytes(name, MAX_BUNDLE_BYTES))
    except errors.MalformedError as error:
        raise UsageError(f"{name}: {error.message}") from None


def parse_aad(pairs: Sequence[str]) -> dict[str, str]:
    aad: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name or name in aad:
            raise UsageError(f"--aad {pair}: give NAME=VALUE, each name once")
        aad[name] = value
    return aad


def to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def show(options: argparse.Namespace, result: Any, raw: bytes | str) -> None:
    """The whole result with --json; else the part that a pipe wants: bytes as they are, text as a line."""
    if options.json:
        print(json.dumps(to_json(result)))
    elif isinstance(raw, bytes):
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()
    else:
        print(raw)
    # Last: whatever becomes of the receipt, the answer is not lost.
    if options.receipt:
        receiptcommands.save(options.receipt, result)
