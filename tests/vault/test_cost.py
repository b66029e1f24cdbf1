"""What a request costs, and that a batch of the gate is bounded by it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.config import Gate
from hostd.core.findings import Status
from hostd.core.keys import Algorithm
from hostd.ipc import many_operations as many
from hostd.ipc import operations as ops
from hostd.ipc.fields import MAX_BATCH_ITEMS, MAX_BATCH_RSA_SIGNATURES
from hostd.vault.cost import UNIT_US, cost
from hostd.vault.service import Service
from hostd.vault.store import Store
from hostd.vault.waiting import Waiting
from tests.vault.support_gate import HOST, VM_A, VM_B, A, B, make_gate, of_vm, verdict
from tests.vault.test_service import BLUE, RED, Desk

_ASYMMETRIC = (Algorithm.RSA_3072, Algorithm.ECDSA_P256, Algorithm.ED25519)
MESSAGE = many.MessageItem(b"")
FULL = 512
"""Bytes of an item where the most items hold as much as they may."""
DEAREST: list[tuple[ops.Operation, Algorithm | None]] = [
    (ops.ListKeys(), None),
    (many.EncryptMany("k", (many.EncryptItem(b"x" * FULL),) * MAX_BATCH_ITEMS), None),
    (many.VerifyMany("k", (many.VerifyItem(b"x" * FULL, b"s"),) * MAX_BATCH_ITEMS), Algorithm.ED25519),
    (many.EncryptMany("k", (many.EncryptItem(b""),) * MAX_BATCH_ITEMS), None),
    (many.SignMany("k", (MESSAGE,) * MAX_BATCH_RSA_SIGNATURES), Algorithm.RSA_3072),
    (many.SignMany("k", (MESSAGE,) * MAX_BATCH_ITEMS), Algorithm.ED25519),
    (many.VerifyMany("k", (many.VerifyItem(b"", b"s"),) * MAX_BATCH_ITEMS), Algorithm.ED25519),
    (many.SignMany("k", (MESSAGE,) * MAX_BATCH_ITEMS), None),
    (many.VerifyMany("k", (many.VerifyItem(b"", b"s"),) * MAX_BATCH_ITEMS), None),
]


def test_costs() -> None:
    def of(operation: ops.Operation, algorithm: Algorithm | None = None) -> int:
        return cost(operation, lambda _key: algorithm)

    assert of(ops.Encrypt("k", b"")) == 1
    assert of(ops.DescribeKey("k")) == 1
    assert of(ops.Sign("k", b""), Algorithm.RSA_3072) == 1 + 600 // UNIT_US
    assert of(ops.Verify("k", b"", b"s"), Algorithm.ED25519) == 1 + 62 // UNIT_US
    assert of(many.MacMany("k", (MESSAGE,) * 256)) == 65
    assert of(many.SignMany("k", (MESSAGE,) * 16), Algorithm.RSA_3072) == 1 + 16 * 600 // UNIT_US


def test_every_operation_has_a_cost() -> None:
    """Whatever its fields are: GenerateDataKey has a boolean where others have data."""
    made: list[ops.Operation] = [
        ops.GenerateDataKey("k"),
        ops.GenerateDataKey("k", plaintext=False),
        ops.GenerateRandom(1024),
        ops.GetPublicKey("k"),
        ops.VerifyMac("k", b"", b"m"),
    ]
    assert [cost(operation, lambda _key: None) for operation in made] == [1] * len(made)


def test_data_lists_and_changes_cost_what_they_take() -> None:
    """Else a flood of any of these holds the others up for seconds."""

    def of(operation: ops.Operation) -> int:
        return cost(operation, lambda _key: Algorithm.ED25519)

    big = b"x" * 65_536
    for operation in (
        ops.Encrypt("k", big),
        ops.Decrypt(big),
        ops.Mac("k", big),
        ops.VerifyMac("k", big, b"m"),
    ):
        assert of(operation) == 13
    assert of(ops.Sign("k", big)) == 14
    assert of(many.MacMany("k", (many.MessageItem(b"x" * 8192),) * 16)) == 1 + (16 * 4 + 128 * 3) // UNIT_US
    assert of(ops.ListKeys()) == 301
    assert of(ops.ListKeys(limit=1)) == 4
    assert of(ops.CreateKey("token-aa")) == 6
    assert of(ops.Rotate("k", "token-aa")) == of(ops.Shred("k", "token-aa")) == 57


@pytest.mark.parametrize("found", [None, Algorithm.HMAC_SHA_256, Algorithm.AES_256_GCM])
def test_a_key_that_is_not_there_yet_costs_what_any_might(found: Algorithm | None) -> None:
    """Else: CreateKey with an alias, and behind it a thousand RSA signatures by it that cost nothing."""
    for operation in (
        ops.Sign("alias/k", b""),
        ops.Verify("alias/k", b"", b"s"),
        many.SignMany("alias/k", (MESSAGE,) * MAX_BATCH_RSA_SIGNATURES),
        many.SignMany("alias/k", (MESSAGE,) * MAX_BATCH_ITEMS),
        many.VerifyMany("alias/k", (many.VerifyItem(b"", b"s"),) * MAX_BATCH_ITEMS),
    ):
        any_ = [cost(operation, lambda _key, a=a: a) for a in Algorithm if a in _ASYMMETRIC]
        assert cost(operation, lambda _key: found) == max(any_) > 1


def test_the_dearest_request_is_within_one_batch() -> None:
    """docs/architecture.md, "Limits", says what it counts as."""
    costs = [cost(operation, lambda _key, a=algorithm: a) for operation, algorithm in DEAREST]
    assert max(costs) == 1017 < Gate().batch


def test_the_service_looks_up_the_callers_own_key(service: Service, store: Store) -> None:
    call = Desk(service, store)
    key = call.create("Ed25519", alias="alias/k")
    for reference in (key, "alias/k"):
        assert service.cost(RED, many.SignMany(reference, (MESSAGE,) * 16)) == 1 + 16 * 20 // UNIT_US
        assert service.cost(BLUE, many.SignMany(reference, (MESSAGE,) * 16)) == 1 + 16 * 600 // UNIT_US


@given(
    st.lists(st.tuples(st.sampled_from([A, B]), st.integers(1, 50)), max_size=60),
    st.integers(1, 40),
)
def test_a_batch_is_bounded_by_cost_and_all_come_in_turn(
    asked: list[tuple[object, int]], budget: int
) -> None:
    gate = make_gate(batch=budget)
    for number, (caller, units) in enumerate(asked):
        gate.arrive(Waiting(caller, 10, 1000, number, units))  # type: ignore[arg-type]
    for component in (*HOST, *of_vm(VM_A, VM_B)):
        gate.judged(verdict(component, Status.VERIFIED), started=20, ended=21)
    left = {caller: [n for n, (c, _) in enumerate(asked) if c == caller] for caller in (A, B)}
    rounds = 0
    while (taken := gate.take(30)) is not None:
        batch, _passed = taken
        rounds += 1
        units = [request.cost for request in batch]
        # Over the budget by less than the last request of each caller that took part.
        last = {request.caller: request.cost for request in batch}
        assert sum(units) < budget + sum(last.values())
        # Each gets at most its share and the request that crosses it.
        for caller in (A, B):
            mine = [r for r in batch if r.caller == caller]
            assert sum(r.cost for r in mine[:-1]) < budget
            assert [r.item for r in mine] == left[caller][: len(mine)]
            del left[caller][: len(mine)]
        assert batch
    assert not left[A]
    assert not left[B]
    assert rounds <= len(asked)


def test_a_flood_of_signatures_holds_nobody_up_for_longer_than_a_batch() -> None:
    gate = make_gate(batch=1024)
    for number in range(100):
        gate.arrive(Waiting(A, 10, 1000, ("flood", number), 601))
    gate.arrive(Waiting(B, 11, 1000, "other", 1))
    for component in (*HOST, *of_vm(VM_A, VM_B)):
        gate.judged(verdict(component, Status.VERIFIED), started=20, ended=21)
    for expected in ("other", ("flood", 0), ("flood", 1)):
        taken = gate.take(30)
        assert taken is not None
        assert [request.item for request in taken[0]] == [expected]
