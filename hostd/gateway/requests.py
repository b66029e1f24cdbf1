"""One frame of a guest into one request, and answers into frames (docs/protocol.md, "Messages").

Pure. A body is parsed once, to plain values; the typed request is made from those values, so no two
readings of a message exist. Refused here: what is not one JSON object, a name given twice anywhere,
an unknown field, a wrong type, a value over its published limit, an unknown operation. What a
refusal says never repeats the guest's bytes: at most the schema's own name of the field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec

from guestlib.errors import MalformedError
from guestlib.wire.codec import HEADER, MAX_FRAME_BYTES, MAX_ID
from hostd.ipc.operations import BY_NAME, Operation
from hostd.ipc.serving import Receipt

PROTOCOL_VERSIONS: Final = (1,)
MAX_DEADLINE_MS: Final = 600_000
ReceiptWanted = Literal["none", "reference", "full"]


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first request on every connection."""

    versions: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)], ...], msgspec.Meta(min_length=1, max_length=16)
    ]
    """Every version that the guest speaks."""
    client: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """For people who read logs; nothing depends on it."""


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    id: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
    op: Annotated[str, msgspec.Meta(max_length=64)]
    args: dict[str, Any] = {}
    receipt: ReceiptWanted = "reference"
    deadline_ms: Annotated[int, msgspec.Meta(ge=0, le=MAX_DEADLINE_MS)] = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed request. Nothing in it says who asks."""

    id: int
    operation: Operation | Hello
    receipt: ReceiptWanted
    deadline_ms: int


class RequestError(Exception):
    """The frame is no request. `id` is the guest's id if one could be read, else None."""

    def __init__(self, request_id: int | None, message: str) -> None:
        super().__init__(message)
        self.id = request_id
        self.message = message


_TYPES: Final[dict[str, Any]] = {"hello": Hello, **BY_NAME}
_FIELDS: Final = frozenset(field for cls in (_Envelope, *_TYPES.values()) for field in cls.__struct_fields__)
_PATH: Final = re.compile(r" - at `\$\.([a-z_]+)[^`]*`\Z")
_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_JSON: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder()
_ENCODE: Final = msgspec.json.Encoder().encode
_UNPACK: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder()


def parse_request(body: bytes) -> Request:
    """Reads one frame body.

    Raises:
        RequestError: see the module's docstring.
    """
    try:
        message = _JSON.decode(body)
    except (ValueError, RecursionError):
        raise RequestError(None, "not a JSON message in UTF-8") from None
    if type(message) is not dict:
        raise RequestError(None, "not a JSON object")
    request_id = message.get("id")
    if type(request_id) is not int or not 0 <= request_id <= MAX_ID:
        raise RequestError(None, "`id` is not an integer from 0 to 2^53-1")
    try:
        envelope = msgspec.convert(message, _Envelope)
    except msgspec.ValidationError as error:
        raise RequestError(request_id, _where("the message", error)) from None
    # An id that was given twice is no id to answer to.
    if _has_repeated_names(body, message):
        raise RequestError(None, "a name is given twice in one object")
    cls = _TYPES.get(envelope.op)
    if cls is None:
        raise RequestError(request_id, "unknown operation")
    args = envelope.args
    # The tag of the operation's struct: msgspec would take it as such.
    if "op" in args:
        raise RequestError(request_id, f"the arguments of {envelope.op} hold an unknown field")
    try:
        operation = msgspec.convert(args, cls)
    except msgspec.ValidationError as error:
        raise RequestError(request_id, _where(f"the arguments of {envelope.op}", error)) from None
    return Request(request_id, operation, envelope.receipt, envelope.deadline_ms)


def _where(what: str, error: msgspec.ValidationError) -> str:
    """Names the field by the schema's word for it, if it has one; never what the guest sent."""
    match = _PATH.search(str(error))
    if match is not None and match[1] in _FIELDS:
        return f"{what}: `{match[1]}` has a wrong type or breaks its limit"
    return f"{what}: a field is missing, unknown or wrong"


def _has_repeated_names(body: bytes, message: dict[str, Any]) -> bool:
    """Whether an object in `body` names a member twice; the parser keeps the last one.

    `body` parsed as `message`. Every string in the text is a name or a value of what it means,
    except where a name came twice. Without a backslash the strings are the quotes, halved.
    """
    try:
        strings = _strings(message)
    except RecursionError:
        return True  # deeper than any request is
    if b"\\" not in body:
        return body.count(b'"') != 2 * strings
    return sum(1 for _ in _STRING.finditer(body)) != strings


def _strings(value: Any) -> int:
    """Names and strings in a parsed value."""
    if type(value) is str:
        return 1
    if type(value) is dict:
        count = len(value)
        for item in value.values():
            kind = type(item)
            if kind is str:
                count += 1
            elif kind is dict or kind is list:
                count += _strings(item)
        return count
    if type(value) is list:
        return sum(map(_strings, value))
    return 0


def encode_answer(request_id: int, result: object, receipt: Receipt | None) -> bytes:
    """The frame of a result. A receipt's document that does not fit beside it is left out: it can be
    asked for (GetReceipt)."""
    answer: dict[str, object] = {"id": request_id, "ok": result}
    if receipt is not None:
        named: dict[str, object] = {"ledger": receipt.ledger, "pass": receipt.passed}
        answer["receipt"] = {**named, "document": receipt.document} if receipt.document else named
    body = _ENCODE(answer)
    if len(body) > MAX_FRAME_BYTES and receipt is not None and receipt.document:
        body = _ENCODE({**answer, "receipt": named})
    if len(body) > MAX_FRAME_BYTES:
        return encode_error(request_id, "internal", "the answer does not fit a frame")
    return HEADER.pack(len(body)) + body


def encode_result(request_id: int, packed: bytes, receipt: Receipt | None) -> bytes:
    """The frame of a result that the vault sent as a MessagePack map."""
    return encode_answer(request_id, _UNPACK.decode(packed), receipt)


def encode_error(request_id: int | None, code: str, message: str, ledger: int | None = None) -> bytes:
    """The frame of a refusal; `request_id` is None if the request's could not be read."""
    error: dict[str, object] = {"code": code, "message": message}
    if ledger is not None:
        error["ledger"] = ledger
    body = _ENCODE({"id": request_id, "error": error})
    return HEADER.pack(len(body)) + body


def encode_malformed(error: RequestError) -> bytes:
    return encode_error(error.id, MalformedError.code, error.message)
