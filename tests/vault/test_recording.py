"""What the ledger says of a batch: the pass, and commitments that only the salt opens."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from guestlib.attest.canonical import canonical, canonical_request, commitment
from guestlib.errors import DeniedError, HostdError, UnavailableError
from hostd.core.callers import Caller
from hostd.core.findings import BOOT, IMA, Status
from hostd.ipc import operations as ops
from hostd.vault.done import Done
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry, Ledger
from hostd.vault.membership import Membership
from hostd.vault.recording import Executed, Job, Recorder
from hostd.vault.store import Store
from hostd.vault.waiting import Pass, Stamp, Waiting
from tests.vault.support_keys import root

RED, STRANGER = Caller(uid=1), Caller(uid=77)
PASS = Pass(
    9, 100, 250, ((BOOT, Stamp(41, 100, 120, Status.VERIFIED)), (IMA, Stamp(44, 200, 250, Status.VERIFIED)))
)
NONE = cast("Any", None)
ASKED = ops.Encrypt("alias/a", b"secret", {"b": "2", "a": "1"})


@pytest.fixture
def recorder(ledger: Ledger, store: Store, keyring: Keyring) -> Recorder:
    return Recorder(ledger, keyring, Membership(store, keyring))


def executed(
    operation: ops.GatedOperation | None = ASKED,
    caller: Caller = RED,
    *,
    error: HostdError | None = None,
    tenant: str = "red",
) -> Executed:
    job = Job("Encrypt", False, False, NONE, NONE, NONE, operation)
    done = Done(ops.EncryptResult(b"sealed", "key-1", 3), tenant, "key-1", 3) if error is None else None
    return Executed(Waiting(caller, 0, 1, job), done, error)


def recorded(recorder: Recorder, ledger: Ledger, *batch: Executed) -> list[Entry]:
    first = recorder.record(PASS, b"e" * 32, list(batch), 1_700_000_000_000)
    ledger.sync()
    return list(ledger.entries(first, 100))


def test_the_pass_comes_first_and_says_what_the_batch_rests_on(recorder: Recorder, ledger: Ledger) -> None:
    ledger.append(Entry(seq=0, time=1, event="start", outcome="done"))
    passed, a, b = recorded(recorder, ledger, executed(), executed())
    assert (passed.event, passed.seq, passed.passed, passed.evidence) == ("pass", 1, 9, b"e" * 32)
    assert (passed.first_start_ns, passed.last_end_ns, passed.readings) == (100, 250, (41, 44))
    assert passed.requests == 2
    assert [(e.event, e.seq, e.passed, e.pass_entry) for e in (a, b)] == [
        ("operation", 2, 9, 1),
        ("operation", 3, 9, 1),
    ]


def test_request_and_answer_are_committed_to_as_the_guest_has_them(
    recorder: Recorder, ledger: Ledger, keyring: Keyring
) -> None:
    _, entry = recorded(recorder, ledger, executed())
    salt = keyring.salt("red", entry.seq)
    sent = canonical_request(
        "Encrypt", {"plaintext": b"secret", "aad": {"a": "1", "b": "2"}, "key": "alias/a"}
    )
    received = canonical({"version": 3, "key": "key-1", "ciphertext": b"sealed"})
    assert entry.request == commitment(salt, sent)
    assert entry.response == commitment(salt, received)


def test_nothing_of_request_answer_or_salt_is_in_the_ledger(
    recorder: Recorder, ledger: Ledger, keyring: Keyring
) -> None:
    """Nor can what was asked be guessed from it: the same request twice gives two commitments."""
    _, a, b = recorded(recorder, ledger, executed(), executed())
    assert a.request != b.request
    assert a.response != b.response
    data = ledger.path.read_bytes()
    for seq in (1, 2):
        salt = keyring.salt("red", seq)
        assert salt not in data
        assert json.dumps(canonical(salt).decode())[1:-1].encode() not in data
    for secret in (b"secret", b"c2VjcmV0", b"sealed", b"c2VhbGVk"):
        assert secret not in data


def test_salts_are_of_tenant_and_entry_and_root(store: Store, keyring: Keyring) -> None:
    salts = {keyring.salt(tenant, seq) for tenant in ("red", "blue") for seq in range(100)}
    assert len(salts) == 200
    assert all(len(salt) == 16 for salt in salts)
    again = Keyring(store)
    again.unlock(root())
    assert again.salt("red", 5) == keyring.salt("red", 5)
    again.unlock(root(bytes(32)))
    assert again.salt("red", 5) != keyring.salt("red", 5)
    again.lock()


def test_salts_go_with_the_keys(keyring: Keyring) -> None:
    before = keyring.salt("red", 1)
    keyring.drop()
    assert keyring.salt("red", 1) == before
    keyring.lock()
    with pytest.raises(UnavailableError):
        keyring.salt("red", 1)


def test_a_refusal_commits_to_its_request_alone(recorder: Recorder, ledger: Ledger, keyring: Keyring) -> None:
    _, entry = recorded(recorder, ledger, executed(error=DeniedError("no")))
    assert (entry.outcome, entry.tenant, entry.response) == ("denied", "red", b"")
    sent = canonical_request("Encrypt", {"key": "alias/a", "plaintext": b"secret", "aad": dict(ASKED.aad)})
    assert entry.request == commitment(keyring.salt("red", entry.seq), sent)


def test_nobody_and_officers_are_recorded_without_commitments(recorder: Recorder, ledger: Ledger) -> None:
    _, stranger, officer = recorded(
        recorder,
        ledger,
        executed(caller=STRANGER, error=DeniedError("no")),
        executed(None, Caller(uid=0, officer=True)),
    )
    assert (stranger.tenant, stranger.request, stranger.response) == ("", b"", b"")
    assert (officer.request, officer.response) == (b"", b"")


def test_a_refusal_while_the_keys_are_locked_is_recorded(
    recorder: Recorder, ledger: Ledger, keyring: Keyring
) -> None:
    keyring.lock()
    _, entry = recorded(recorder, ledger, executed(error=UnavailableError("the keys are locked")))
    assert (entry.outcome, entry.tenant, entry.request) == ("failed", "", b"")


def test_an_answer_without_its_commitment_is_not_recorded(
    recorder: Recorder, ledger: Ledger, keyring: Keyring
) -> None:
    keyring.lock()
    with pytest.raises(UnavailableError):
        recorder.record(PASS, b"e" * 32, [executed()], 1)
