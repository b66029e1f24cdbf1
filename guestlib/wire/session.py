"""The guest's side of one connection: requests into bytes, bytes into answers. No I/O, no clock.

The phases are a table; an event that has no entry is a mistake of the caller (sending too early) or
of the host (answering what was not asked), and ends the session:

| phase      | send hello   | send request | answer to hello | answer to a request | error, id null |
|------------|--------------|--------------|-----------------|---------------------|----------------|
| NEW        | → HELLO_SENT |              |                 |                     |                |
| HELLO_SENT |              |              | → OPEN          |                     | → CLOSED       |
| OPEN       |              | OPEN         |                 | OPEN                | → CLOSED       |
| CLOSED     |              |              |                 |                     |                |
"""

from __future__ import annotations

import base64
import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from guestlib.attest.canonical import canonical, canonical_request
from guestlib.errors import HostdError, TransportError, from_wire
from guestlib.wire import codec, messages

VERSIONS: Final = (1,)


class Phase(enum.Enum):
    NEW = enum.auto()
    HELLO_SENT = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


class Event(enum.Enum):
    SEND_HELLO = enum.auto()
    SEND_REQUEST = enum.auto()
    HELLO_ANSWERED = enum.auto()
    REQUEST_ANSWERED = enum.auto()
    REFUSED = enum.auto()


TRANSITIONS: Final[dict[tuple[Phase, Event], Phase]] = {
    (Phase.NEW, Event.SEND_HELLO): Phase.HELLO_SENT,
    (Phase.HELLO_SENT, Event.HELLO_ANSWERED): Phase.OPEN,
    (Phase.HELLO_SENT, Event.REFUSED): Phase.CLOSED,
    (Phase.OPEN, Event.SEND_REQUEST): Phase.OPEN,
    (Phase.OPEN, Event.REQUEST_ANSWERED): Phase.OPEN,
    (Phase.OPEN, Event.REFUSED): Phase.CLOSED,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to request `id`: a result, or the error to raise."""

    id: int
    outcome: messages.Result | HostdError


class ClientSession:
    """One connection, from hello to its end."""

    def __init__(self) -> None:
        self.phase = Phase.NEW
        self.hello: messages.Hello | None = None
        self._reader = codec.FrameReader()
        self._next_id = 1
        self._in_flight: dict[int, tuple[str, bytes | None]] = {}
        """Operation, and the canonical request where the receipt is wanted in full."""

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def _move(self, event: Event) -> None:
        after = TRANSITIONS.get((self.phase, event))
        if after is None:
            before, self.phase = self.phase, Phase.CLOSED
            raise TransportError(f"{event.name} while {before.name}")
        self.phase = after

    def send_hello(self, client: str) -> bytes:
        self._move(Event.SEND_HELLO)
        args = {"versions": list(VERSIONS), "client": client}
        return codec.encode_message({"id": 0, "op": "hello", "args": args})

    def send_request(
        self, operation: str, args: Mapping[str, Any], *, receipt: messages.ReceiptWanted, deadline_ms: int
    ) -> tuple[int, bytes]:
        """A request's id and its frame. `bytes` in `args` become base64, None is left out.

        Raises:
            MalformedError: it does not fit a frame. Nothing was sent and the session goes on.
            TransportError: the session is not open.
        """
        message: dict[str, Any] = {"id": self._next_id, "op": operation, "args": _encode_args(args)}
        if receipt != "reference":
            message["receipt"] = receipt
        if deadline_ms:
            message["deadline_ms"] = deadline_ms
        data = codec.encode_message(message)
        asked = canonical_request(operation, message["args"]) if receipt == "full" else None
        self._move(Event.SEND_REQUEST)
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._in_flight[request_id] = operation, asked
        return request_id, data

    def receive(self, data: bytes) -> list[Answer]:
        """The answers that `data` completes.

        Raises:
            TransportError: the host does not keep to the protocol; the session is closed.
            HostdError: the host ended the session with this error.
        """
        self._reader.feed(data)
        answers: list[Answer] = []
        try:
            while (body := self._reader.take()) is not None:
                answer = self._handle(codec.decode_message(body))
                if answer is not None:
                    answers.append(answer)
        except codec.FrameError:
            self.phase = Phase.CLOSED
            raise TransportError("the host sent a broken frame") from None
        except TransportError:
            self.phase = Phase.CLOSED
            raise
        return answers

    def _handle(self, message: dict[str, Any]) -> Answer | None:
        request_id = message.get("id")
        error = HostdError("")
        if refused := "error" in message:
            error = from_wire(*messages.parse_error(message["error"]))
        if request_id is None and refused:
            self._move(Event.REFUSED)
            raise error
        if self.phase is Phase.HELLO_SENT and request_id == 0:
            if refused:
                self._move(Event.REFUSED)
                raise error
            self.hello = messages.parse_hello(message.get("ok"))
            if self.hello.version not in VERSIONS:
                raise TransportError("the host chose a version that was not offered")
            self._move(Event.HELLO_ANSWERED)
            return None
        if type(request_id) is not int or request_id not in self._in_flight:
            raise TransportError("the host answered what was not asked")
        self._move(Event.REQUEST_ANSWERED)
        operation, asked = self._in_flight.pop(request_id)
        if refused:
            return Answer(request_id, error)
        receipt = messages.parse_receipt(message.get("receipt"))
        if receipt is not None and asked is not None:
            receipt = replace(receipt, request=asked, answer=canonical(message.get("ok")))
        return Answer(request_id, messages.parse_result(operation, message.get("ok"), receipt))


def _encode_args(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _encode(value) for name, value in args.items() if value is not None}


def _encode(value: Any) -> Any:
    """One argument; the items of a batch are objects with arguments of their own."""
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, list | tuple):
        return [_encode_args(item) if isinstance(item, Mapping) else _encode(item) for item in value]
    return value
