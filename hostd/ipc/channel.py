"""Records between roles: length-prefixed MessagePack over unix stream sockets, bounded both ways.

A record is a 4-byte big-endian length and that many bytes. `Decoder` and `encode` are pure;
`Channel` is the non-blocking end that a role's loop drives: everything that is complete in one
receive is handed out together, and everything queued goes out in one send (one message per
wake-up; docs/architecture.md, "Speed"). A peer that sends too much, or does not read what it asked
for, is disconnected: the queue has a bound.

Credentials come from the kernel (SO_PEERCRED), never from a record.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER: Final = struct.Struct(">I")
MAX_RECORD_BYTES: Final = 4 << 20
"""An IMA reading of 1 MiB or a survey part is the largest record; four times that."""
MAX_QUEUED_BYTES: Final = 16 << 20
"""Bytes waiting for a peer that does not read; over it the peer is cut off."""
RECEIVE_BYTES: Final = 1 << 20
MAX_DESCRIPTORS: Final = 16
"""Descriptors taken from one receive, and descriptors received that nobody has taken: a peer that
sends more than its records announce is cut off before it fills this process's table."""

T = TypeVar("T")


class ChannelError(Exception):
    """The peer broke the record format or a bound, or is gone. The channel is of no more use."""


class ChannelClosedError(ChannelError):
    """The peer closed the channel or died."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel says (struct ucred, unix(7))."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Credentials of a connected unix socket's peer at the time it connected."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", raw))


def encode(records: Sequence[object], *, max_record: int = MAX_RECORD_BYTES) -> bytes:
    """Frames `records` for one send."""
    parts: list[bytes] = []
    for record in records:
        body = msgspec.msgpack.encode(record)
        if len(body) > max_record:
            raise ChannelError(f"record of {len(body)} bytes is over the limit of {max_record}")
        parts.append(HEADER.pack(len(body)))
        parts.append(body)
    return b"".join(parts)


class Decoder(Generic[T]):
    """Bytes in, typed records out. After an error it stays broken."""

    def __init__(self, record_type: Any, *, max_record: int = MAX_RECORD_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(record_type)
        self._buffer = bytearray()
        self._max = max_record

    def feed(self, data: bytes) -> list[T]:
        """All records that `data` completes.

        Raises:
            ChannelError: a length over the limit, or bytes that are not a record of the type in
                canonical form. The text never repeats the bytes.
        """
        buffer = self._buffer
        buffer += data
        records: list[T] = []
        start, end = 0, len(buffer)
        while end - start >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, start)
            if length > self._max:
                raise ChannelError(f"record of {length} bytes is over the limit of {self._max}")
            if end - start - HEADER.size < length:
                break
            body = bytes(buffer[start + HEADER.size : start + HEADER.size + length])
            start += HEADER.size + length
            try:
                record = self._decoder.decode(body)
            except (ValueError, RecursionError):
                raise ChannelError("record does not decode") from None
            # One byte string per record, so that two readers can never see two records in it.
            if msgspec.msgpack.encode(record) != body:
                raise ChannelError("record is not in canonical form")
            records.append(record)
        if start:
            del buffer[:start]
        return records

    @property
    def pending_bytes(self) -> int:
        return len(self._buffer)


class Channel(Generic[T]):
    """A non-blocking stream of records of type `T` from the peer, and of any records to it.

    `max_record` and `max_sent` bound one record from and to the peer, `max_queued` what waits for it.
    """

    def __init__(
        self,
        sock: socket.socket,
        record_type: Any,
        *,
        max_record: int = MAX_RECORD_BYTES,
        max_sent: int = MAX_RECORD_BYTES,
        max_queued: int = MAX_QUEUED_BYTES,
    ) -> None:
        sock.setblocking(False)
        self._max_sent = max_sent
        self._max_queued = max_queued
        self.sock = sock
        self._decoder: Decoder[T] = Decoder(record_type, max_record=max_record)
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._descriptors: deque[int] = deque()

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._out)

    def send(self, *records: object) -> None:
        """Queues records and writes as much as the socket takes now.

        Raises:
            ChannelError: the peer is gone, or does not read.
        """
        data = encode(records, max_record=self._max_sent)
        self._out_bytes += len(data)
        if self._out_bytes > self._max_queued:
            raise ChannelError("peer does not read")
        self._out.append(memoryview(data))
        if len(self._out) == 1:
            self.flush()

    def send_with_descriptors(self, record: object, descriptors: Sequence[int]) -> None:
        """Sends one record with descriptors (SCM_RIGHTS), at once and whole.

        Raises:
            ChannelError: the peer is gone, or the socket is full: such records are small and rare,
                a full socket here means a peer that does not read.
        """
        data = encode([record])
        if self._out:
            raise ChannelError("peer does not read")
        try:
            sent = socket.send_fds(self.sock, [data], list(descriptors))
        except OSError as error:
            raise ChannelClosedError(f"cannot pass descriptors: {error.strerror}") from error
        if sent != len(data):
            self._out.append(memoryview(data)[sent:])
            self._out_bytes += len(data) - sent

    def flush(self) -> None:
        """Writes queued bytes until the socket is full or the queue is empty."""
        while self._out:
            head = self._out[0]
            try:
                sent = self.sock.send(head)
            except (BlockingIOError, TimeoutError):
                return
            except OSError as error:
                raise ChannelClosedError(f"peer is gone: {error.strerror}") from error
            self._out_bytes -= sent
            if sent == len(head):
                self._out.popleft()
            else:
                self._out[0] = head[sent:]

    def receive(self) -> list[T]:
        """Records that have arrived; empty if the socket had nothing complete.

        Raises:
            ChannelClosedError: end of stream.
            ChannelError: the peer broke the format.
        """
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                RECEIVE_BYTES,
                socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize),
                socket.MSG_CMSG_CLOEXEC,
            )
        except (BlockingIOError, TimeoutError):
            return []
        except OSError as error:
            raise ChannelClosedError(f"peer is gone: {error.strerror}") from error
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                self._descriptors.extend(received)
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > MAX_DESCRIPTORS:
            raise ChannelError("more descriptors than the limit")
        if not data:
            raise ChannelClosedError("peer closed the channel")
        return self._decoder.feed(data)

    def take_descriptor(self) -> int | None:
        """The oldest descriptor received and not yet taken; the taker closes it."""
        return self._descriptors.popleft() if self._descriptors else None

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self.sock.close()
