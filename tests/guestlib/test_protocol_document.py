"""docs/protocol.md says what the code does: vectors, operations, errors, limits, steps."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from guestlib.attest.steps import Step
from guestlib.errors import BY_CODE, MalformedError, NotFoundError
from guestlib.wire import messages
from guestlib.wire.session import ClientSession
from hostd.config import Gateway
from hostd.gateway import requests
from hostd.gateway.limits import limits_of, published
from hostd.ipc.operations import BY_NAME

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
VECTORS = [bytes.fromhex(line) for line in re.findall(r"^([0-9a-f]{40,})$", TEXT, re.MULTILINE)]


def test_vectors() -> None:
    hello, hello_ok, encrypt, encrypt_ok, refusal, last = VECTORS
    session = ClientSession()
    assert session.send_hello("doc") == hello
    assert isinstance(requests.parse_request(hello[4:]).operation, requests.Hello)
    assert session.receive(hello_ok) == []
    args = {"key": "alias/db", "plaintext": b"hi", "aad": {"env": "prod"}}
    assert session.send_request("Encrypt", args, receipt=True, deadline_ms=5000) == (1, encrypt)
    assert requests.parse_request(encrypt[4:]).deadline_ms == 5000
    key = "key-00112233445566778899aabbccddeeff"
    packed = msgspec.msgpack.encode({"ciphertext": b"\0\1\2", "key": key, "version": 1})
    assert requests.encode_result(1, packed, (42, 7)) == encrypt_ok
    (answer,) = session.receive(encrypt_ok)
    assert answer.outcome == messages.Encrypted(messages.Receipt(42, 7), b"\0\1\2", key, 1)
    session.send_request("DescribeKey", {"key": "x"}, receipt=True, deadline_ms=0)
    (answer,) = session.receive(refusal)
    assert isinstance(answer.outcome, NotFoundError)
    assert answer.outcome.ledger == 43
    with pytest.raises(MalformedError):
        session.receive(last)


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
