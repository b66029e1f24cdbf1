"""Guest and host come to the same canonical bytes, each from what it has."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestlib.attest.canonical import DEFAULTS, ITEM_DEFAULTS, canonical, canonical_request
from guestlib.wire.session import ClientSession
from hostd.gateway.requests import encode_result, parse_request
from hostd.ipc import operations as ops
from hostd.ipc.canonical import answer_bytes, request_bytes
from hostd.ipc.serving import Receipt

GATED = sorted(cls.__name__ for cls in typing.get_args(ops.GatedOperation))
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
AAD = st.dictionaries(TEXT.filter(bool), TEXT, max_size=4)
DATA = st.binary(max_size=40)
SOME = st.binary(min_size=1, max_size=40)
BY_FIELD: dict[str, st.SearchStrategy[Any]] = {
    "key": TEXT.filter(bool),
    "plaintext": DATA,
    "ciphertext": SOME,
    "message": DATA,
    "signature": SOME,
    "mac": SOME,
    "aad": AAD,
    "scheme": st.sampled_from(["ed25519", "ecdsa-sha256"]),
    "version": st.integers(1, 300),
    "length": st.integers(16, 64),
    "token": st.text("abcXYZ019_.-", min_size=8, max_size=12),
    "algorithm": st.sampled_from(["AES-256-GCM", "Ed25519"]),
    "alias": st.text("abc019_.-", min_size=1, max_size=9).map(lambda name: f"alias/{name}"),
    "after": TEXT.filter(bool),
    "limit": st.integers(1, 100),
}


def given_args(draw: Any, cls: type[msgspec.Struct]) -> dict[str, Any]:
    """Arguments as somebody may give them: defaults left out, said, or null where null is one."""
    args: dict[str, Any] = {}
    for field in msgspec.structs.fields(cls):
        if not field.required and draw(st.booleans()):
            continue
        if field.default is None and draw(st.booleans()):
            args[field.name] = None
        elif field.name == "items":
            item = typing.get_args(typing.get_args(field.type)[0])[0]
            args["items"] = [given_args(draw, item) for _ in range(draw(st.integers(1, 3)))]
        elif (cls.__name__, field.name) == ("GenerateDataKey", "plaintext"):
            args["plaintext"] = draw(st.booleans())
        else:
            args[field.name] = draw(BY_FIELD[field.name])
    return args


@pytest.mark.parametrize("name", GATED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_request_has_the_same_bytes_at_both_ends(name: str, data: st.DataObject) -> None:
    args = given_args(data.draw, ops.BY_NAME[name])
    session = ClientSession()
    session.send_hello("t")
    session.receive(_frame({"id": 0, "ok": {"version": 1, "server": "hostd", "limits": {}}}))
    _, frame = session.send_request(name, args, receipt="full", deadline_ms=0)
    operation = parse_request(frame[4:]).operation
    asked = request_bytes(operation)  # type: ignore[arg-type]
    assert asked == canonical_request(name, args)
    # And from what is on the wire, where bytes are base64 already.
    on_the_wire = json.loads(frame[4:])
    assert asked == canonical_request(on_the_wire["op"], on_the_wire["args"])


def _frame(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body


def results(annotation: Any) -> st.SearchStrategy[Any]:
    """Any value of a result's field, and any result."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return results(inner[0])
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(results, inner))
    if origin is tuple:
        return st.lists(results(inner[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, results(inner[1]), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        fields = msgspec.structs.fields(annotation)
        return st.builds(annotation, **{f.name: results(f.type) for f in fields})
    basic: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 2**53), str: TEXT, bytes: DATA, bool: st.booleans(), type(None): st.none()
    }  # fmt: skip
    return basic[annotation]


@pytest.mark.parametrize("cls", typing.get_args(ops.Result), ids=lambda cls: cls.__name__)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_answer_has_the_same_bytes_at_both_ends(cls: type[msgspec.Struct], data: st.DataObject) -> None:
    result = data.draw(results(cls))
    frame = encode_result(1, msgspec.msgpack.encode(result), Receipt(1, 2))
    assert answer_bytes(result) == canonical(json.loads(frame[4:])["ok"])


def test_the_guests_table_of_defaults_is_the_hosts() -> None:
    def of(cls: type[msgspec.Struct]) -> dict[str, Any]:
        found = {}
        for field in msgspec.structs.fields(cls):
            made = field.default_factory
            default = field.default if made is msgspec.NODEFAULT else made()
            if default is not msgspec.NODEFAULT and default is not None:
                found[field.name] = default
        return found

    for name in GATED:
        cls = ops.BY_NAME[name]
        assert DEFAULTS.get(name, {}) == of(cls), name
        items = [f.type for f in msgspec.structs.fields(cls) if f.name == "items"]
        if items:
            assert ITEM_DEFAULTS.get(name, {}) == of(typing.get_args(typing.get_args(items[0])[0])[0]), name
        else:
            assert name not in ITEM_DEFAULTS


KNOWN: list[tuple[str, dict[str, Any], str]] = [
    (
        "Encrypt",
        {"plaintext": b"hi", "key": "k", "aad": {"b": "\u00e9\u2028\x01\n", "a": '"\\/'}},
        '{"args":{"aad":{"a":"\\"\\\\/","b":"\u00e9\u2028\\u0001\\n"},"key":"k","plaintext":"aGk="},'
        '"op":"Encrypt"}',
    ),
    (
        "Encrypt",
        {"plaintext": b"", "key": "k", "aad": {}},
        '{"args":{"key":"k","plaintext":""},"op":"Encrypt"}',
    ),
    ("ListKeys", {"limit": 100, "after": None}, '{"args":{},"op":"ListKeys"}'),
    (
        "GenerateDataKey",
        {"key": "k", "plaintext": True, "length": 32},
        '{"args":{"key":"k"},"op":"GenerateDataKey"}',
    ),
    (
        "GenerateDataKey",
        {"key": "k", "plaintext": False, "length": 16},
        '{"args":{"key":"k","length":16,"plaintext":false},"op":"GenerateDataKey"}',
    ),
    (
        "EncryptMany",
        {"key": "k", "items": [{"plaintext": b"hi", "aad": {}}, {"aad": {"a": ""}, "plaintext": b""}]},
        '{"args":{"items":[{"plaintext":"aGk="},{"aad":{"a":""},"plaintext":""}],"key":"k"},'
        '"op":"EncryptMany"}',
    ),
]


@pytest.mark.parametrize(("operation", "args", "body"), KNOWN)
def test_known_requests(operation: str, args: dict[str, Any], body: str) -> None:
    assert canonical_request(operation, args) == body.encode()


@pytest.mark.parametrize("value", [float("nan"), {"a": "\ud800"}, {1, 2}, {"a": object()}])
def test_what_json_has_no_form_for(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical(value)
