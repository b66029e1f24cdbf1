"""Frames: a 4-byte big-endian length and that many bytes of JSON (docs/protocol.md, "Frames").

Pure: bytes in, bytes out. Refuses a length of zero or over the limit before anything is allocated
for it, and after such a length nothing more is read: the stream has lost its frames.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

from guestlib.errors import MalformedError, TransportError

HEADER: Final = struct.Struct(">I")
MAX_FRAME_BYTES: Final = 256 << 10
"""Body of one frame, either way: a request of 64 KiB of data is 88 KiB of base64."""
MAX_ID: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps exact (RFC 8259, section 6)."""


class FrameError(Exception):
    """The stream holds no frame here. It is of no more use."""


def frame(body: bytes) -> bytes:
    """Puts the length before `body`.

    Raises:
        FrameError: the body is empty or over the limit.
    """
    if not 0 < len(body) <= MAX_FRAME_BYTES:
        raise FrameError(f"frame of {len(body)} bytes (limit {MAX_FRAME_BYTES})")
    return HEADER.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frame bodies.

    What it holds is bounded by the caller: feed it, then take frames until there is none; at most
    one incomplete frame stays, of at most `HEADER.size + limit` bytes.
    """

    __slots__ = ("_broken", "_buffer", "_limit", "_start")

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._start = 0
        self._limit = limit
        self._broken = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def take(self) -> bytes | None:
        """The next complete body, or None.

        Raises:
            FrameError: the length is zero or over the limit; also on every later call.
        """
        if self._broken:
            raise FrameError("stream is broken")
        start = self._start + HEADER.size
        if len(self._buffer) < start:
            return None
        (length,) = HEADER.unpack_from(self._buffer, self._start)
        if not 0 < length <= self._limit:
            self._broken = True
            self._buffer.clear()
            self._start = 0
            raise FrameError(f"frame of {length} bytes (limit {self._limit})")
        end = start + length
        if len(self._buffer) < end:
            return None
        self._start = end
        return bytes(self._buffer[start:end])

    @property
    def pending_bytes(self) -> int:
        """Bytes fed and not yet taken."""
        return len(self._buffer) - self._start


def encode_message(message: dict[str, Any]) -> bytes:
    """One JSON message as a frame.

    Raises:
        MalformedError: it does not fit a frame, or holds what JSON has no word for (lone
            surrogates, NaN): the caller's mistake, found before anything is sent.
    """
    try:
        body = json.dumps(message, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        return frame(body)
    except (FrameError, ValueError, TypeError) as error:
        raise MalformedError(f"the request cannot be encoded: {error}") from None


def decode_message(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises:
        TransportError: it is not one JSON object in UTF-8 without repeated names.
    """
    try:
        message = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise TransportError("the host sent something that is not a message") from None
    if not isinstance(message, dict):
        raise TransportError("the host sent something that is not a message")
    return message


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("repeated name")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(name)
