"""The host's side of one guest connection: decrypted bytes in, requests out, answers in, bytes out.

Pure state; no socket, no TLS, no clock. The phases are a table:

| phase  | hello          | other operation | malformed, with id | malformed, no id | broken frame |
|--------|----------------|-----------------|--------------------|------------------|--------------|
| NEW    | answer → OPEN  | error → CLOSED  | error → CLOSED     | error → CLOSED   | error → CLOSED |
| OPEN   | error          | request         | error              | error → CLOSED   | error → CLOSED |
| CLOSED | nothing more is read                                                                    |||||

Back-pressure is by credit: a request takes the room of its frame and of its answer until the guest
has read the answer's bytes; without credit no further frame is taken, and that is no error.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final

from guestlib.errors import MalformedError
from guestlib.wire.codec import MAX_FRAME_BYTES, FrameError, FrameReader
from hostd.gateway import requests
from hostd.gateway.limits import WAITING_BYTES_PER_CONNECTION, published
from hostd.gateway.requests import Hello, Request, RequestError

if TYPE_CHECKING:
    from hostd.gateway.limits import Limits

_ANSWER_BYTES: Final = {
    "GetEvidence": 256 << 10,
    "GetEvidenceLog": 132 << 10,
    "ListKeys": 256 << 10,
    "GetReceipt": 32 << 10,
    "GetAuditLog": 256 << 10,
}
"""Room for the answers that are larger than their requests."""
_RECEIPT_BYTES: Final = 16 << 10
"""Room for a receipt's document: some 8 KiB."""
_ANSWER_SLACK: Final = 1024
"""What any other answer may be longer than its request; a batch's per item, too."""


class Phase(enum.Enum):
    NEW = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


class Session:
    """One connection. `take` gives requests for as long as there is credit; `room` says if there is."""

    __slots__ = ("_limits", "_out", "_reader", "frames", "in_flight", "phase", "reserved", "unread")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._reader = FrameReader()
        self._out: list[bytes] = []
        self.phase = Phase.NEW
        self.frames = 0
        """Frames taken, good or bad."""
        self.in_flight = 0
        """Requests given out and not answered."""
        self.reserved = 0
        """Bytes of credit that they hold."""
        self.unread = 0
        """Bytes answered that the guest has not taken; the connection counts them down."""

    @property
    def room(self) -> bool:
        return (
            self.phase is not Phase.CLOSED
            and self.in_flight < self._limits.in_flight
            and self.reserved + self.unread < WAITING_BYTES_PER_CONNECTION
        )

    @property
    def partial(self) -> bool:
        """Whether bytes are held: part of a frame, or frames that wait for room."""
        return self._reader.pending_bytes > 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        if self.phase is not Phase.CLOSED:
            self._reader.feed(data)

    def take(self) -> tuple[Request, int] | None:
        """The next request for the vault and the credit it holds, or None: no room, or no complete frame.

        Frames that need no vault (hello, refusals) are answered on the way.
        """
        while self.room:
            try:
                body = self._reader.take()
                if body is None:
                    return None
                self.frames += 1
                request = requests.parse_request(body)
            except FrameError:
                self._refuse(None, "broken frame: a length of zero or over the limit")
                return None
            except RequestError as error:
                self._say(requests.encode_malformed(error))
                if error.id is None or self.phase is Phase.NEW:
                    self.phase = Phase.CLOSED
                continue
            if isinstance(request.operation, Hello):
                self._hello(request.id, request.operation)
            elif self.phase is Phase.NEW:
                self._refuse(request.id, "the first message of a connection is hello")
            else:
                return request, self._reserve(request, len(body))
        return None

    def _reserve(self, request: Request, size: int) -> int:
        operation = request.operation
        items = len(getattr(operation, "items", ()))
        answer = _ANSWER_BYTES.get(type(operation).__name__, size + (1 + items) * _ANSWER_SLACK)
        if request.receipt == "full":
            answer += _RECEIPT_BYTES
        credit = size + min(answer, MAX_FRAME_BYTES)
        self.in_flight += 1
        self.reserved += credit
        return credit

    def answer(self, credit: int, data: bytes) -> None:
        """`data` answers a request that held `credit`."""
        self.in_flight -= 1
        self.reserved -= credit
        self._say(data)

    def output(self) -> bytes:
        """What is to be sent now."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    @property
    def has_output(self) -> bool:
        return bool(self._out)

    def _say(self, data: bytes) -> None:
        self._out.append(data)
        self.unread += len(data)

    def _refuse(self, request_id: int | None, message: str) -> None:
        self._say(requests.encode_error(request_id, MalformedError.code, message))
        self.phase = Phase.CLOSED

    def _hello(self, request_id: int, hello: Hello) -> None:
        if self.phase is not Phase.NEW:
            self._say(requests.encode_error(request_id, MalformedError.code, "hello comes once"))
            return
        version = max(set(hello.versions) & set(requests.PROTOCOL_VERSIONS), default=None)
        if version is None:
            self._refuse(request_id, "no common version of the protocol")
            return
        self.phase = Phase.OPEN
        result: dict[str, Any] = {"version": version, "server": "hostd", "limits": published(self._limits)}
        self._say(requests.encode_answer(request_id, result, None))
