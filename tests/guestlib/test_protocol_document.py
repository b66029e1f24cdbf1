"""docs/protocol.md says what the code does: vectors, operations, errors, limits, steps."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from guestlib.attest.steps import Step
from guestlib.errors import BY_CODE, InvalidCiphertextError, MalformedError, NotFoundError
from guestlib.wire import messages
from guestlib.wire.session import ClientSession
from hostd.config import Gateway
from hostd.gateway import requests
from hostd.gateway.limits import limits_of, published
from hostd.ipc.many_operations import DecryptedItem, DecryptItem, DecryptMany, DecryptManyResult, ItemError
from hostd.ipc.operations import BY_NAME
from hostd.ipc.serving import Receipt

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
VECTORS = [bytes.fromhex(line) for line in re.findall(r"^([0-9a-f]{40,})$", TEXT, re.MULTILINE)]


def test_vectors() -> None:
    hello, hello_ok, encrypt, encrypt_ok, _, _, refusal, last = VECTORS[:8]
    session = ClientSession()
    assert session.send_hello("doc") == hello
    assert isinstance(requests.parse_request(hello[4:]).operation, requests.Hello)
    assert session.receive(hello_ok) == []
    args = {"key": "alias/db", "plaintext": b"hi", "aad": {"env": "prod"}}
    assert session.send_request("Encrypt", args, receipt="reference", deadline_ms=5000) == (1, encrypt)
    assert requests.parse_request(encrypt[4:]).deadline_ms == 5000
    key = "key-00112233445566778899aabbccddeeff"
    packed = msgspec.msgpack.encode({"ciphertext": b"\0\1\2", "key": key, "version": 1})
    assert requests.encode_result(1, packed, Receipt(42, 7)) == encrypt_ok
    (answer,) = session.receive(encrypt_ok)
    assert answer.outcome == messages.Encrypted(messages.Receipt(42, 7), b"\0\1\2", key, 1)
    session.send_request("DescribeKey", {"key": "x"}, receipt="reference", deadline_ms=0)
    (answer,) = session.receive(refusal)
    assert isinstance(answer.outcome, NotFoundError)
    assert answer.outcome.ledger == 43
    with pytest.raises(MalformedError):
        session.receive(last)


def test_batch_vectors() -> None:
    hello_ok, request, response = VECTORS[1], *VECTORS[4:6]
    session = ClientSession()
    session.send_hello("doc")
    session.receive(hello_ok)
    items = [{"ciphertext": b"\0\1\2", "aad": {"row": "1"}}, {"ciphertext": b"\3"}]
    args = {"key": "alias/db", "items": items}
    assert session.send_request("DecryptMany", args, receipt="reference", deadline_ms=0) == (1, request)
    operation = requests.parse_request(request[4:]).operation
    assert operation == DecryptMany("alias/db", (DecryptItem(b"\0\1\2", {"row": "1"}), DecryptItem(b"\3")))
    key = "key-00112233445566778899aabbccddeeff"
    refused = ItemError("invalid_ciphertext", "not a hostd ciphertext")
    result = DecryptManyResult((DecryptedItem(b"hi", 2), DecryptedItem(error=refused)), key)
    assert requests.encode_result(1, msgspec.msgpack.encode(result), Receipt(44, 8)) == response
    (answer,) = session.receive(response)
    assert isinstance(answer.outcome, messages.DecryptedMany)
    first, second = answer.outcome.items
    assert first == messages.DecryptedItem(b"hi", 2)
    assert isinstance(second, InvalidCiphertextError)
    assert (second.ledger, answer.outcome.key) == (44, key)


def test_every_name_is_there() -> None:
    for name, cls in BY_NAME.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", TEXT, re.MULTILINE)
        assert all(f"`{field}`" in row for field in cls.__struct_fields__), name
    for code in BY_CODE:
        assert f"| `{code}` |" in TEXT
    for name, value in published(limits_of(Gateway())).items():
        assert f"| `{name}` | {value:g} |" in TEXT or f"| `{name}` | {value} |" in TEXT
    for step in Step:
        assert f"| {step.value} |" in TEXT
