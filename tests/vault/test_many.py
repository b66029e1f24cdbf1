"""Batch operations: the same as one by one, each item answered for itself, and within their bounds."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from guestlib.errors import (
    ConflictError,
    HostdError,
    MalformedError,
    NotFoundError,
    UnavailableError,
    WrongStateError,
)
from hostd.core.keys import Algorithm, State
from hostd.ipc import many_operations as many
from hostd.ipc import operations as ops
from hostd.ipc.fields import (
    MAX_BATCH_BYTES,
    MAX_BATCH_CIPHERTEXT_BYTES,
    MAX_BATCH_ITEMS,
    MAX_BATCH_RSA_SIGNATURES,
)
from hostd.vault import primitives
from hostd.vault.keyring import Keyring
from hostd.vault.service import Service
from hostd.vault.store import Store
from tests.vault.test_service import BLUE, Desk

NO_KEY = "key-" + "0" * 32


@pytest.fixture
def call(service: Service, store: Store) -> Desk:
    return Desk(service, store)


def sealed(call: Desk, key: str, *plaintexts: bytes) -> list[bytes]:
    items = tuple(many.EncryptItem(p, {"n": str(n)}) for n, p in enumerate(plaintexts))
    return list(call(many.EncryptMany(key, items)).ciphertexts)


def opened(call: Desk, key: str, *ciphertexts: bytes) -> many.DecryptManyResult:
    items = tuple(many.DecryptItem(c, {"n": str(n)}) for n, c in enumerate(ciphertexts))
    result = call(many.DecryptMany(key, items))
    assert isinstance(result, many.DecryptManyResult)
    return result


# ── Each operation ────────────────────────────────────────────────────────────────────────────────


def test_encrypt_and_decrypt_many(call: Desk) -> None:
    key = call.create(alias="alias/k")
    plaintexts = [b"", b"one", bytes(1000), b"one"]
    done = call.done(
        many.EncryptMany(
            "alias/k", tuple(many.EncryptItem(p, {"n": str(n)}) for n, p in enumerate(plaintexts))
        )
    )
    assert (done.tenant, done.key, done.version, done.detail) == ("red", key, 1, "4 items")
    assert isinstance(done.result, many.EncryptManyResult)
    ciphertexts = done.result.ciphertexts
    assert len(set(ciphertexts)) == 4
    result = opened(call, key, *ciphertexts)
    assert [item.plaintext for item in result.items] == plaintexts
    assert result.key == key
    # And they are the same as the single operations'.
    assert call(ops.Decrypt(ciphertexts[1], {"n": "1"})).plaintext == b"one"
    single = call(ops.Encrypt(key, b"single", {"n": "0"})).ciphertext
    assert opened(call, key, single).items == (many.DecryptedItem(b"single", 1),)


@pytest.mark.parametrize("algorithm", ["ECDSA-P256", "Ed25519"])
def test_sign_and_verify_many(call: Desk, algorithm: str) -> None:
    key = call.create(algorithm)  # type: ignore[arg-type]
    done = call.done(many.SignMany(key, (many.MessageItem(b"a"), many.MessageItem(b""))))
    assert (done.key, done.version, done.detail) == (key, 1, "2 items")
    assert isinstance(done.result, many.SignManyResult)
    first, second = done.result.signatures
    assert call(ops.Verify(key, b"a", first)).valid
    verdict = call(
        many.VerifyMany(
            key,
            (
                many.VerifyItem(b"a", first),
                many.VerifyItem(b"a", second),
                many.VerifyItem(b"", second),
                many.VerifyItem(b"", b"no signature"),
            ),
        )
    )
    assert verdict == many.VerifyManyResult((True, False, True, False), key, 1)
    call.rotate(key)
    old = many.VerifyMany(key, (many.VerifyItem(b"a", first),), version=1)
    assert call(old).valid == (True,)
    assert call(replace_version(old)).valid == (False,)
    with pytest.raises(WrongStateError):
        call(many.SignMany(key, (many.MessageItem(b"a"),), "rsa-pss-sha256"))


def replace_version(op: many.VerifyMany) -> many.VerifyMany:
    return many.VerifyMany(op.key, op.items)


def test_mac_and_verify_many(call: Desk) -> None:
    key = call.create("HMAC-SHA-256")
    made = call(many.MacMany(key, (many.MessageItem(b"a"), many.MessageItem(b"b"))))
    assert made.macs == (call(ops.Mac(key, b"a")).mac, call(ops.Mac(key, b"b")).mac)
    pairs = (
        many.VerifyMacItem(b"a", made.macs[0]),
        many.VerifyMacItem(b"a", made.macs[1]),
        many.VerifyMacItem(b"a", made.macs[0][:31]),
    )
    assert call(many.VerifyMacMany(key, pairs)).valid == (True, False, False)


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


def test_each_item_is_answered_for_itself(call: Desk, store: Store, keyring: Keyring) -> None:
    key = call.create()
    good, foreign = sealed(call, key, b"a", b"b")
    call.rotate(key)
    (newer,) = sealed(call, key, b"c")
    record = store.key("red", key)
    assert record is not None
    (compromised,) = sealed(call, key, b"x")
    call.rotate(key)
    record = store.key("red", key)
    assert record is not None
    bad = keyring.rewrap(record, record.versions[1], State.COMPROMISED)
    store.put_key(replace(record, versions=(record.versions[0], bad, record.versions[2])))
    (now,) = sealed(call, key, b"now")

    def aad_of(position: int, ciphertext: bytes) -> many.DecryptItem:
        return many.DecryptItem(ciphertext, {"n": str(position)})

    cases = [
        (aad_of(0, good), None),
        (aad_of(1, good), "invalid_ciphertext"),  # another item's AAD
        (aad_of(1, foreign), None),
        (aad_of(0, good[:-1] + bytes([good[-1] ^ 1])), "invalid_ciphertext"),
        (aad_of(0, b"x"), "invalid_ciphertext"),
        (aad_of(0, good[:20] + b"\0\0\0\0" + good[24:]), "not_found"),
        (aad_of(0, good[:20] + b"\0\0\0\x63" + good[24:]), "not_found"),
        (aad_of(0, newer), "wrong_state"),
        (aad_of(0, compromised), "wrong_state"),
        (aad_of(0, now), None),
    ]
    done = call.done(many.DecryptMany(key, tuple(item for item, _ in cases)))
    assert isinstance(done.result, many.DecryptManyResult)
    assert [i.error.code if i.error else None for i in done.result.items] == [code for _, code in cases]
    assert [i.plaintext for i in done.result.items if i.error is None] == [b"a", b"b", b"now"]
    assert all(i.plaintext is None and i.version is None for i in done.result.items if i.error)
    assert (done.key, done.version, done.detail) == (key, 0, "10 items, 7 refused, versions 1, 3")


def test_a_ciphertext_of_any_other_key_says_nothing_of_it(call: Desk) -> None:
    """Another tenant's, one's own, shredded, never made: one and the same answer, and no look-up."""
    key = call.create(caller=BLUE)
    other = call.create(caller=BLUE)
    theirs = call.create()
    (ciphertext,) = call(many.EncryptMany(theirs, (many.EncryptItem(b"p"),))).ciphertexts
    (own,) = call(many.EncryptMany(other, (many.EncryptItem(b"p"),)), BLUE).ciphertexts
    never = ciphertext[:4] + bytes(16) + ciphertext[20:]
    items = tuple(many.DecryptItem(c) for c in (ciphertext, own, never))
    result = call(many.DecryptMany(key, items), BLUE)
    assert len({item.error for item in result.items}) == 1
    assert result.items[0].error.code == ConflictError.code
    call.shred(theirs)
    assert call(many.DecryptMany(key, items), BLUE) == result


def test_another_tenants_key_is_as_one_that_never_was(call: Desk) -> None:
    for algorithm, make in (
        ("AES-256-GCM", lambda k: many.EncryptMany(k, (many.EncryptItem(b"p"),))),
        ("AES-256-GCM", lambda k: many.DecryptMany(k, (many.DecryptItem(b"p"),))),
        ("Ed25519", lambda k: many.SignMany(k, (many.MessageItem(b"m"),))),
        ("Ed25519", lambda k: many.VerifyMany(k, (many.VerifyItem(b"m", b"s"),))),
        ("HMAC-SHA-256", lambda k: many.MacMany(k, (many.MessageItem(b"m"),))),
        ("HMAC-SHA-256", lambda k: many.VerifyMacMany(k, (many.VerifyMacItem(b"m", b"t"),))),
    ):
        key = call.create(algorithm, alias=f"alias/{make(NO_KEY).__class__.__name__}")  # type: ignore[arg-type]
        answers = set()
        for reference in (key, f"alias/{make(NO_KEY).__class__.__name__}", NO_KEY):
            with pytest.raises(NotFoundError) as caught:
                call(make(reference), BLUE)
            answers.add(str(caught.value))
        assert len(answers) == 1
        call(make(key))


def test_the_keys_own_state_fails_the_whole(call: Desk, keyring: Keyring) -> None:
    key = call.create()
    (ciphertext,) = sealed(call, key, b"p")
    call.rotate(key)
    mac = call.create("HMAC-SHA-256")
    for wrong in (
        many.EncryptMany(mac, (many.EncryptItem(b""),)),
        many.MacMany(key, (many.MessageItem(b""),)),
    ):
        with pytest.raises(WrongStateError):
            call(wrong)
    with pytest.raises(WrongStateError):
        opened(call, mac, ciphertext)
    keyring.lock()
    with pytest.raises(UnavailableError):
        opened(call, key, ciphertext)


def test_a_damaged_row_is_the_hosts_fault_and_fails_the_whole(
    call: Desk, store: Store, keyring: Keyring
) -> None:
    key = call.create()
    (ciphertext,) = sealed(call, key, b"p")
    keyring.drop()
    store._run("UPDATE versions SET wrapped=zeroblob(60) WHERE key=?", key)
    with pytest.raises(UnavailableError):
        opened(call, key, ciphertext)


# ── Bounds ────────────────────────────────────────────────────────────────────────────────────────


def test_rsa_signatures_are_bounded_and_nothing_else_is_so(call: Desk, service: Service) -> None:
    service._mint._ready.append(primitives.generate(Algorithm.RSA_3072))
    key = call.create("RSA-3072")
    at_most = many.SignMany(key, (many.MessageItem(b"m"),) * MAX_BATCH_RSA_SIGNATURES)
    assert len(call(at_most).signatures) == MAX_BATCH_RSA_SIGNATURES
    with pytest.raises(MalformedError, match=str(MAX_BATCH_RSA_SIGNATURES)):
        call(many.SignMany(key, (*at_most.items, many.MessageItem(b"m"))))
    signature = call(ops.Sign(key, b"m")).signature
    pairs = (many.VerifyItem(b"m", signature),) * MAX_BATCH_ITEMS
    assert all(call(many.VerifyMany(key, pairs)).valid)
    quick = call.create("Ed25519")
    assert len(call(many.SignMany(quick, (many.MessageItem(b"m"),) * MAX_BATCH_ITEMS)).signatures) == 256


ITEMS: dict[type[ops.Operation], tuple[dict[str, object], str]] = {
    many.EncryptMany: ({"plaintext": b""}, "plaintext"),
    many.DecryptMany: ({"ciphertext": b"x"}, "ciphertext"),
    many.SignMany: ({"message": b""}, "message"),
    many.VerifyMany: ({"message": b"", "signature": b"s"}, "message"),
    many.MacMany: ({"message": b""}, "message"),
    many.VerifyMacMany: ({"message": b"", "mac": b"m"}, "message"),
}


@pytest.mark.parametrize("cls", ITEMS, ids=lambda cls: cls.__name__)
def test_items_and_bytes_are_bounded_on_both_hops(cls: type[ops.Operation]) -> None:
    item, payload = ITEMS[cls]
    limit = MAX_BATCH_CIPHERTEXT_BYTES if cls is many.DecryptMany else MAX_BATCH_BYTES

    def decode(count: int, sizes: tuple[int, ...] = ()) -> None:
        items = [{**item, payload: bytes(n)} for n in sizes] or [item] * count
        args = {"key": "k", "items": items}
        made = msgspec.convert(args, cls)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=cls) == made

    def refuses(count: int, sizes: tuple[int, ...] = ()) -> None:
        with pytest.raises(msgspec.ValidationError):
            decode(count, sizes)
        items = [{**item, payload: bytes(n)} for n in sizes] or [item] * count
        raw = msgspec.msgpack.encode({"op": cls.__name__, "key": "k", "items": items})
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(raw, type=cls)

    decode(1)
    decode(MAX_BATCH_ITEMS)
    refuses(0)
    refuses(MAX_BATCH_ITEMS + 1)
    half = limit // 4
    decode(0, (half, half, half, limit - 3 * half))
    refuses(0, (half, half, half, limit - 3 * half + 1))
    refuses(0, (65536 + 1024 + 1,))


def test_the_overhead_that_the_limit_counts_with() -> None:
    assert MAX_BATCH_CIPHERTEXT_BYTES == MAX_BATCH_BYTES + MAX_BATCH_ITEMS * primitives.OVERHEAD_BYTES


def test_no_error_is_swallowed_that_is_not_an_items(call: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    key = call.create()
    (ciphertext,) = sealed(call, key, b"p")

    def broken(*_: object) -> bytes:
        raise HostdError("a defect")

    monkeypatch.setattr(primitives, "open_sealed", broken)
    with pytest.raises(HostdError, match="a defect"):
        opened(call, key, ciphertext)
