"""Promise: every answer has a receipt that a guest can verify alone; a tenant sees its own entries only."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guestlib.attest.audit import verify_page
from guestlib.attest.bundle import TrustBundle, parse_bundle
from guestlib.attest.receipt import ReceiptStep, verify_receipt
from guestlib.errors import HostdError, NotFoundError, OverloadedError
from guestlib.wire.messages import Receipt
from tests.e2e.harness import Host, adopted
from tests.e2e.test_e2e_tenants import ask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guestlib.client import Client

pytestmark = pytest.mark.slow
BOB = 64202
EVERY = tuple(ReceiptStep)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shared(binary: Path) -> Iterator[Host]:
    with adopted(binary, tenants=(("acme", 0), ("globex", BOB))) as host:
        (channel_ca,) = bundle(host).channel_cas
        (host.directory / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(channel_ca))
        yield host


def bundle(host: Host) -> TrustBundle:
    return parse_bundle((host.directory / "trust.json").read_bytes())


def full(client: Client, operation: str, args: dict[str, Any]) -> Receipt:
    receipt = client.submit(operation, args, receipt="full").result().receipt
    assert receipt is not None
    return receipt


def test_each_kind_of_answer_has_a_receipt_that_verifies(shared: Host) -> None:
    client = shared.client()
    key = client.create_key(alias="alias/receipts").key.id
    sealed = client.encrypt(key, b"\xff\0", {"\u00e9": '"\u2028\t'}).ciphertext
    asked: list[tuple[str, dict[str, Any]]] = [
        ("Encrypt", {"key": "alias/receipts", "plaintext": b"x" * 70, "aad": {"b": "2", "a": "1"}}),
        ("Decrypt", {"ciphertext": sealed, "aad": {"\u00e9": '"\u2028\t'}, "key": None}),
        ("GenerateDataKey", {"key": key, "length": 32, "plaintext": True}),
        ("ListKeys", {"limit": 100}),
        ("DescribeKey", {"key": key}),
        ("GenerateRandom", {"length": 32}),
        ("Rotate", {"key": key, "token": "receipts-1"}),
        ("EncryptMany", {"key": key, "items": [{"plaintext": b"a"}, {"plaintext": b"b", "aad": {"n": "1"}}]}),
    ]
    for operation, args in asked:
        receipt = full(client, operation, args)
        assert receipt.document is not None, operation
        verified = verify_receipt(
            receipt.document, bundle=bundle(shared), request=receipt.request, answer=receipt.answer
        )
        assert verified.checked == EVERY
        assert verified.own_quote
        assert (verified.entry.seq, verified.entry.op) == (receipt.ledger, operation)
        assert verified.passed.passed == receipt.passed


def test_a_reference_is_redeemed_later_with_another_quote(shared: Host) -> None:
    client = shared.client()
    result = client.random(24)
    assert result.receipt is not None
    assert result.receipt.document is None
    for _ in range(3):
        client.random(8)
    document = client.redeem(result.receipt).document
    assert document is not None
    verified = verify_receipt(
        document,
        bundle=bundle(shared),
        request=b'{"args":{"length":24},"op":"GenerateRandom"}',
        answer=json.dumps(
            {"random": base64.b64encode(result.random).decode()}, separators=(",", ":")
        ).encode(),
    )
    assert verified.checked == EVERY
    assert not verified.own_quote


def test_none_leaves_nothing_and_is_recorded_all_the_same(shared: Host) -> None:
    client = shared.client()
    before = len(shared.ledger())
    assert client.submit("GenerateRandom", {"length": 8}, receipt="none").result().receipt is None
    with pytest.raises(NotFoundError) as caught:
        client.submit("DescribeKey", {"key": "alias/never"}, receipt="none").result()
    assert caught.value.ledger is None
    entries = [e for e in shared.ledger()[before:] if e["event"] == "operation"]
    assert [(e["op"], e["outcome"]) for e in entries] == [
        ("GenerateRandom", "released"),
        ("DescribeKey", "denied"),
    ]
    assert all(len(base64.b64decode(e["request"])) == 32 for e in entries)


def test_another_tenants_receipt_is_as_one_that_never_was(shared: Host) -> None:
    client = shared.client()
    mine = client.random(8).receipt
    assert mine is not None
    theirs = ask(shared, BOB, ("GenerateRandom", {"length": 8}), ("GetReceipt", {"ledger": mine.ledger}))
    assert "ok" in theirs[0]
    (entry,) = (e["seq"] for e in shared.ledger()[mine.ledger :] if e.get("tenant") == "globex")
    refused = [theirs[1]["message"]]
    for number in (entry, 0, len(shared.ledger()) + 5, 2**53 - 1):
        with pytest.raises(NotFoundError) as caught:
            client.redeem(number)
        refused.append(caught.value.message)
        assert caught.value.ledger is None
    assert set(refused) == {"no such receipt"}
    assert client.redeem(mine).document


def test_a_tenant_sees_its_own_entries(shared: Host) -> None:
    client = shared.client()
    client.random(8)
    ask(shared, BOB, ("GenerateRandom", {"length": 8}))
    found = [
        one.entry
        for page in client.audit_log()
        for one in verify_page(page.head, page.lines, bundle=bundle(shared))[1]
    ]
    own = [e["seq"] for e in shared.ledger() if e.get("tenant") == "acme"]
    assert [entry.seq for entry in found] == own
    assert len(own) > 2
    assert {entry.tenant for entry in found} == {"acme"}


def test_a_flood_is_refused_and_others_are_answered(shared: Host) -> None:
    client = shared.client()
    receipt = client.random(8).receipt
    assert receipt is not None
    found = client.call_many([("GetReceipt", {"ledger": receipt.ledger})] * 3000)
    refused = [one for one in found if isinstance(one, HostdError)]
    assert refused
    assert all(isinstance(one, OverloadedError) for one in refused)
    assert "ok" in ask(shared, BOB, ("GenerateRandom", {"length": 8}))[0]
    assert client.random(8).receipt is not None


def test_receipts_outlive_a_restart(shared: Host) -> None:
    result = shared.client().random(8)
    assert result.receipt is not None
    shared.close_clients()
    shared.stop()
    shared.start()
    shared.wait_open()
    client = shared.client()
    document = client.redeem(result.receipt).document
    assert document is not None
    verified = verify_receipt(document, bundle=bundle(shared), request=None, answer=None)
    assert verified.entry.seq == result.receipt.ledger


def test_from_the_command_line(shared: Host, tmp_path: Path) -> None:
    def guest(*arguments: str) -> subprocess.CompletedProcess[str]:
        head = ["--address", f"unix:{shared.guest_socket}", "--trust", str(shared.directory / "trust.json")]
        return subprocess.run(
            [sys.executable, "-m", "guestlib.cli", *head, "--channel-ca-only", *arguments],
            capture_output=True, encoding="latin-1", cwd=ROOT, timeout=60, check=False,
        )  # fmt: skip

    path = str(tmp_path / "r")
    made = guest("--receipt", path, "random", "8")
    assert made.returncode == 0, made.stderr
    checked = guest("receipt", "verify", path, "--request", f"{path}.request", "--answer", f"{path}.answer")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("ok  ") == len(EVERY)
    number = checked.stdout.splitlines()[-1].split()[0]
    assert guest("receipt", "get", number, "-o", f"{path}2").returncode == 0
    later = guest("receipt", "verify", f"{path}2", "--request", f"{path}.request")
    assert "not given 10 answer" in later.stdout
    listed = guest("receipt", "list")
    assert listed.returncode == 0, listed.stderr
    assert number in [line.split()[0] for line in listed.stdout.splitlines()]
