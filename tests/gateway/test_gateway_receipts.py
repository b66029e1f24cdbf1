"""Receipts through a real gateway: whatever stands between vault and guest can withhold, not forge.

The vault's end is played, with receipts of a real TPM; what a worker that was taken over could do to the
answers is done there, which for the guest is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from guestlib.attest.receipt import ReceiptStep, VerifiedReceipt, verify_receipt
from guestlib.client import Client, Handle
from guestlib.errors import VerificationError
from guestlib.trust import Trust
from guestlib.wire.messages import Result
from hostd.ipc import operations as ops
from hostd.ipc.channel import Channel
from hostd.ipc.serving import Call, FromWorker, Receipt, Reply
from tests.gateway.conftest import GatewayProcess, Guest
from tests.gateway.support_vault import SimulatedVault, wait_for
from tests.support.receipts import Exchange, House, embedded_tpm

Held = list[tuple[Channel[FromWorker], Call]]


class Dishonest:
    """Answers what the vault holds, after the test has had its way with the replies."""

    def __init__(self, vault: SimulatedVault, house: House, client: Client) -> None:
        self.vault, self.house, self.client = vault, house, client
        vault.answer = lambda _: None

    def answers(self, tamper: Callable[[list[Reply]], list[Reply]], *wanted: str) -> list[Result]:
        """Two requests in flight at once, and what the guest gets for them."""
        handles: list[Handle] = []
        for number, receipt in enumerate(wanted or ("full", "full")):
            args = {"key": "k", "plaintext": bytes([65 + number])}
            handles.append(self.client.submit("Encrypt", args, receipt=receipt))  # type: ignore[arg-type]
            wait_for(lambda: len(self.vault.held) == len(handles))
        held, self.vault.held = self.vault.held, []
        exchanges = [_exchange(call) for _, call in held]
        entries = self.house.batch(*exchanges)
        replies = [
            Reply(call.seq, msgspec.msgpack.encode(one.result), self._receipt(call, seq))
            for (_, call), one, seq in zip(held, exchanges, entries, strict=True)
        ]
        self.vault.do(lambda: held[0][0].send(*tamper(replies)))
        return [handle.result() for handle in handles]

    def _receipt(self, call: Call, seq: int) -> Receipt | None:
        if call.receipt == "none":
            return None
        return Receipt(seq, self.house.passes, self.house.document(seq) if call.receipt == "full" else b"")


def _exchange(call: Call) -> Exchange:
    operation = call.operation
    assert isinstance(operation, ops.Encrypt)
    return Exchange(
        operation=operation, result=ops.EncryptResult(b"sealed " + operation.plaintext, "key-1", 1)
    )


@pytest.fixture
def dishonest(vault: SimulatedVault, gateway: GatewayProcess, tmp_path: Path) -> Iterator[Dishonest]:
    with embedded_tpm(tmp_path) as tpm:
        house = House(tmp_path, tpm)
        with Client(Trust.channel_ca(vault.ca.pem), f"unix:{gateway.path}", timeout_s=20) as client:
            yield Dishonest(vault, house, client)
        house.close()


def verified(house: House, result: Result) -> VerifiedReceipt:
    receipt = result.receipt
    assert receipt is not None
    assert receipt.document is not None
    return verify_receipt(
        receipt.document, bundle=house.bundle(), request=receipt.request, answer=receipt.answer
    )


def refused_at(house: House, result: Result) -> str:
    with pytest.raises(VerificationError) as caught:
        verified(house, result)
    return caught.value.step


def test_an_honest_way(dishonest: Dishonest) -> None:
    for result in dishonest.answers(lambda replies: replies):
        assert verified(dishonest.house, result).checked == tuple(ReceiptStep)


def test_two_answers_that_are_swapped_are_found_out(dishonest: Dishonest) -> None:
    def swap_results(replies: list[Reply]) -> list[Reply]:
        a, b = replies
        return [Reply(a.seq, b.result, a.receipt), Reply(b.seq, a.result, b.receipt)]

    for result in dishonest.answers(swap_results):
        assert refused_at(dishonest.house, result) == ReceiptStep.ANSWER


def test_two_answers_that_are_swapped_with_their_receipts_are_found_out(dishonest: Dishonest) -> None:
    def swap_all(replies: list[Reply]) -> list[Reply]:
        a, b = replies
        return [Reply(a.seq, b.result, b.receipt), Reply(b.seq, a.result, a.receipt)]

    for result in dishonest.answers(swap_all):
        assert refused_at(dishonest.house, result) == ReceiptStep.REQUEST


def test_an_answer_of_its_own_is_found_out(dishonest: Dishonest) -> None:
    invented = msgspec.msgpack.encode(ops.EncryptResult(b"mine", "key-1", 1))

    def invent(replies: list[Reply]) -> list[Reply]:
        return [Reply(one.seq, invented, one.receipt) for one in replies]

    for result in dishonest.answers(invent):
        assert refused_at(dishonest.house, result) == ReceiptStep.ANSWER


def test_an_old_receipt_is_found_out(dishonest: Dishonest) -> None:
    """The same request and the same answer as before are another entry; its salt is another too."""
    kept: list[Reply] = []

    def keep(replies: list[Reply]) -> list[Reply]:
        kept.extend(replies)
        return replies

    first = dishonest.answers(keep)
    assert first[0].receipt is not None

    def again(replies: list[Reply]) -> list[Reply]:
        return [Reply(one.seq, one.result, old.receipt) for one, old in zip(replies, kept, strict=True)]

    second = dishonest.answers(again)
    # It verifies, for it is true: of the earlier entry, which the guest has seen before.
    assert verified(dishonest.house, second[0]).entry.seq == first[0].receipt.ledger


def test_what_was_not_asked_for_does_not_come(dishonest: Dishonest) -> None:
    none, reference = dishonest.answers(lambda replies: replies, "none", "reference")
    assert none.receipt is None
    assert reference.receipt is not None
    assert (reference.receipt.document, reference.receipt.request, reference.receipt.answer) == (None,) * 3


def test_the_vault_is_told_what_is_wanted(guest: Guest, vault: SimulatedVault) -> None:
    """And gives no more: what the worker is not given it cannot pass on."""
    vault.answer = lambda _: None
    for number, wanted in enumerate(("none", "reference", "full")):
        guest.send({"id": number, "op": "GenerateRandom", "args": {"length": 1}, "receipt": wanted})
        wait_for(lambda number=number: len(vault.held) == number + 1)  # type: ignore[misc]
    assert [call.receipt for _, call in vault.held] == ["none", "reference", "full"]


def test_a_document_that_does_not_fit_beside_its_answer_is_left_out(
    guest: Guest, vault: SimulatedVault
) -> None:
    vault.document = bytes(100 << 10)
    vault.answer = lambda _: ops.EncryptResult(bytes(100 << 10), "k", 1)
    answer = guest.ask({"id": 1, "op": "Encrypt", "args": {"key": "k", "plaintext": ""}, "receipt": "full"})
    assert set(answer["receipt"]) == {"ledger", "pass"}
    assert len(answer["ok"]["ciphertext"]) > 100 << 10
