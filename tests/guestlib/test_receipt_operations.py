"""Receipts and the audit log through a real gateway, as the client gives them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestlib import receipts
from guestlib.client import Client
from guestlib.errors import OverloadedError, TransportError
from guestlib.trust import Trust
from guestlib.wire.messages import Receipt
from hostd.ipc import operations as ops
from hostd.ipc.serving import Fault
from tests.gateway.conftest import GatewayProcess
from tests.gateway.support_vault import Answer, SimulatedVault, echo


@pytest.fixture
def client(gateway: GatewayProcess, vault: SimulatedVault) -> Iterator[Client]:
    with Client(Trust.channel_ca(vault.ca.pem), f"unix:{gateway.path}", timeout_s=10) as client:
        yield client


def test_full_receipts_bring_what_they_commit_to(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    trust = Trust.channel_ca(vault.ca.pem)
    with Client(trust, f"unix:{gateway.path}", timeout_s=10, receipts="full") as client:
        receipt = client.encrypt("alias/a", b"hi", {}).receipt
        assert receipt is not None
        assert receipt.document == vault.document
        assert receipt.request == b'{"args":{"key":"alias/a","plaintext":"aGk="},"op":"Encrypt"}'
        assert receipt.answer == b'{"ciphertext":"Q1RpaA==","key":"alias/a","version":1}'
        # It may hold a secret: it is not shown.
        assert repr(receipt) == f"Receipt(ledger={receipt.ledger}, passed=3)"
        other = client.submit("GenerateRandom", {"length": 1}, receipt="reference").result().receipt
        assert other == Receipt(receipt.ledger + 1, 3)


def test_redeeming_keeps_what_is_known(client: Client, vault: SimulatedVault) -> None:
    receipt = client.random(1).receipt
    assert receipt is not None
    redeemed = client.redeem(receipt)
    assert (redeemed.ledger, redeemed.passed, redeemed.document) == (receipt.ledger, 3, vault.document)
    assert client.redeem(7) == Receipt(7, 0, vault.document)


def test_the_audit_log_page_by_page(client: Client) -> None:
    pages = list(client.audit_log())
    assert [[line.index for line in page.lines] for page in pages] == [[0, 1], [2, 3], [4, 5]]
    assert [line.withheld for page in pages for line in page.lines] == [n == 2 for n in range(6)]
    assert pages[0].lines[0].proof == (b"p" * 32,)
    assert [line.index for page in client.audit_log(after=2) for line in page.lines] == [3, 4, 5, 6]


def test_an_audit_log_that_does_not_end(client: Client, vault: SimulatedVault) -> None:
    vault.answer = lambda _: ops.AuditLogResult(b"{}", (), 5)
    with pytest.raises(TransportError, match="does not end"):
        list(client.audit_log())


def test_the_client_waits_for_a_host_that_bounds_its_pages(
    client: Client, vault: SimulatedVault, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def answer(operation: object) -> Answer:
        nonlocal asked
        asked += 1
        return Fault(0, "overloaded", "later") if asked % 3 else echo(operation)

    monkeypatch.setattr(receipts, "PAUSE_S", 0.01)
    vault.answer = answer
    assert len(list(client.audit_log())) == 3
    assert asked == 9
    monkeypatch.setattr(receipts, "MAX_WAIT_S", 0.0)
    vault.answer = lambda _: Fault(0, "overloaded", "later")
    with pytest.raises(OverloadedError):
        list(client.audit_log())
