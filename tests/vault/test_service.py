"""The guests' operations, on a real store and keyring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from guestlib.errors import (
    ConflictError,
    DeniedError,
    HostdError,
    InvalidCiphertextError,
    NotFoundError,
    OverloadedError,
    WrongStateError,
)
from hostd.core.callers import Caller
from hostd.core.keys import SCHEMES, Algorithm, State
from hostd.ipc import operations as ops
from hostd.ipc.fields import MAX_VERSIONS_SHOWN
from hostd.ipc.fields import Algorithm as AlgorithmName
from hostd.vault import primitives
from hostd.vault import service as module
from hostd.vault.done import Done
from hostd.vault.keyring import Keyring
from hostd.vault.service import Service
from hostd.vault.store import Store
from tests.vault.support_keys import NOW, root

RED, BLUE, NOBODY = Caller(uid=1), Caller(uid=2), Caller(uid=3)
NO_KEY = "key-" + "0" * 32
FAST = [a for a in Algorithm if a is not Algorithm.RSA_3072]


class Desk:
    """Calls as two tenants; each call commits, as a batch of one does."""

    def __init__(self, service: Service, store: Store) -> None:
        self.service, self.store = service, store
        self._tokens = 0

    def done(self, operation: ops.GatedOperation, caller: Caller = RED) -> Done:
        self.store.savepoint()
        try:
            done = self.service.execute(caller, operation, NOW)
        except HostdError:
            self.store.undo()
            raise
        self.store.release()
        self.store.commit()
        return done

    def __call__(self, operation: ops.GatedOperation, caller: Caller = RED) -> Any:
        return self.done(operation, caller).result

    def token(self) -> str:
        self._tokens += 1
        return f"token-{self._tokens:04}"

    def create(
        self,
        algorithm: AlgorithmName = "AES-256-GCM",
        *,
        alias: str | None = None,
        caller: Caller = RED,
    ) -> str:
        result = self(ops.CreateKey(self.token(), algorithm, alias), caller)
        return str(result.key.id)

    def rotate(self, key: str) -> ops.KeyInfo:
        info = self(ops.Rotate(key, self.token())).key
        assert isinstance(info, ops.KeyInfo)
        return info

    def shred(self, key: str) -> ops.KeyInfo:
        info = self(ops.Shred(key, self.token())).key
        assert isinstance(info, ops.KeyInfo)
        return info


@pytest.fixture
def call(service: Service, store: Store) -> Desk:
    return Desk(service, store)


# ── Each operation ────────────────────────────────────────────────────────────────────────────────


def test_create_and_describe(call: Desk) -> None:
    done = call.done(ops.CreateKey("token-aaaa", "ECDSA-P256", "alias/signing"))
    info = call(ops.DescribeKey("alias/signing")).key
    assert done.result == ops.KeyResult(info)
    assert (done.tenant, done.key, done.version) == ("red", info.id, 1)
    assert (info.algorithm, info.state, info.version, info.alias) == (
        "ECDSA-P256",
        "active",
        1,
        "alias/signing",
    )
    assert info.usage == ("public-key", "sign", "verify")
    assert info.schemes == ("ecdsa-sha256",)
    assert info.created == "2023-11-14T22:13:20.000+00:00"
    assert len(info.id) == 36
    assert call(ops.DescribeKey(info.id)).key == info


@pytest.mark.parametrize("aad", [{}, {"a": "b", "c": "d"}], ids=str)
def test_encrypt_and_decrypt(call: Desk, aad: dict[str, str]) -> None:
    key = call.create(alias="alias/k")
    sealed = call(ops.Encrypt("alias/k", b"plain", aad))
    assert (sealed.key, sealed.version) == (key, 1)
    for named in (None, key, "alias/k"):
        opened = call(ops.Decrypt(sealed.ciphertext, aad, named))
        assert opened == ops.DecryptResult(b"plain", key, 1)
    with pytest.raises(InvalidCiphertextError):
        call(ops.Decrypt(sealed.ciphertext, aad | {"x": "y"}))
    with pytest.raises(InvalidCiphertextError):
        call(ops.Decrypt(sealed.ciphertext[:-1] + bytes([sealed.ciphertext[-1] ^ 1]), aad))
    other = call.create()
    with pytest.raises(ConflictError):
        call(ops.Decrypt(sealed.ciphertext, aad, other))
    with pytest.raises(NotFoundError):
        call(ops.Decrypt(sealed.ciphertext, aad, NO_KEY))


@pytest.mark.parametrize("number", [0, 2, 2**32 - 1])
def test_a_ciphertext_that_names_no_version(call: Desk, number: int) -> None:
    key = call.create()
    ciphertext = call(ops.Encrypt(key, b"p")).ciphertext
    with pytest.raises(NotFoundError, match="version"):
        call(ops.Decrypt(ciphertext[:20] + number.to_bytes(4, "big") + ciphertext[24:]))


def test_data_keys(call: Desk) -> None:
    key = call.create()
    made = call(ops.GenerateDataKey(key, {"a": "b"}, 24))
    assert len(made.plaintext) == 24
    assert call(ops.Decrypt(made.ciphertext, {"a": "b"})).plaintext == made.plaintext
    sealed = call(ops.GenerateDataKey(key, {}, 16, plaintext=False))
    assert sealed.plaintext is None
    assert len(call(ops.Decrypt(sealed.ciphertext)).plaintext) == 16
    assert b"plaintext" not in msgspec.msgpack.encode(sealed)


@pytest.mark.parametrize("algorithm", ["ECDSA-P256", "Ed25519"])
def test_sign_and_verify(call: Desk, algorithm: AlgorithmName) -> None:
    key = call.create(algorithm)
    signed = call(ops.Sign(key, b"message"))
    scheme = SCHEMES[Algorithm(algorithm)][0]
    assert (signed.key, signed.version, signed.scheme) == (key, 1, scheme)
    assert call(ops.Verify(key, b"message", signed.signature)).valid
    assert not call(ops.Verify(key, b"massage", signed.signature)).valid
    assert not call(ops.Verify(key, b"message", b"no signature")).valid
    with pytest.raises(WrongStateError):
        call(ops.Sign(key, b"", "rsa-pss-sha256"))
    with pytest.raises(WrongStateError):
        call(ops.Verify(key, b"", b"x", "rsa-pss-sha256"))


def test_the_public_key_verifies_outside(call: Desk) -> None:
    key = call.create("ECDSA-P256")
    signed = call(ops.Sign(key, b"message"))
    public = call(ops.GetPublicKey(key))
    assert (public.key, public.version, public.algorithm) == (key, 1, "ECDSA-P256")
    loaded = serialization.load_der_public_key(public.public_key)
    assert isinstance(loaded, ec.EllipticCurvePublicKey)
    loaded.verify(signed.signature, b"message", ec.ECDSA(hashes.SHA256()))


def test_mac_and_verify(call: Desk) -> None:
    key = call.create("HMAC-SHA-256")
    made = call(ops.Mac(key, b"message"))
    assert call(ops.VerifyMac(key, b"message", made.mac)).valid
    assert not call(ops.VerifyMac(key, b"message", made.mac[:16])).valid
    assert not call(ops.VerifyMac(key, b"massage", made.mac)).valid
    other = call.create("HMAC-SHA-256")
    assert not call(ops.VerifyMac(other, b"message", made.mac)).valid


def test_random(call: Desk) -> None:
    made = [call(ops.GenerateRandom(32)).random for _ in range(4)]
    assert {len(r) for r in made} == {32}
    assert len(set(made)) == 4


def test_rsa_comes_from_the_mint(call: Desk, service: Service) -> None:
    with pytest.raises(OverloadedError):
        call.create("RSA-3072")
    assert call(ops.ListKeys()).keys == ()
    material = primitives.generate(Algorithm.RSA_3072)
    service._mint._ready.append(material)
    key = call.create("RSA-3072")
    assert not any(material)
    for scheme in SCHEMES[Algorithm.RSA_3072]:
        signed = call(ops.Sign(key, b"m", scheme))  # type: ignore[arg-type]
        assert call(ops.Verify(key, b"m", signed.signature, scheme)).valid  # type: ignore[arg-type]
    with pytest.raises(OverloadedError):
        call.rotate(key)
    assert call(ops.DescribeKey(key)).key.version == 1
    assert call(ops.Sign(key, b"m")).version == 1


def uses(key: str, call: Desk) -> dict[str, ops.GatedOperation]:
    return {
        "encrypt": ops.Encrypt(key, b"p"),
        "data key": ops.GenerateDataKey(key),
        "sign": ops.Sign(key, b"m"),
        "verify": ops.Verify(key, b"m", b"s"),
        "public": ops.GetPublicKey(key),
        "mac": ops.Mac(key, b"m"),
        "verify mac": ops.VerifyMac(key, b"m", b"t"),
    }


@pytest.mark.parametrize("algorithm", ["AES-256-GCM", "HMAC-SHA-256", "ECDSA-P256", "Ed25519"])
def test_one_key_one_purpose(call: Desk, algorithm: AlgorithmName) -> None:
    allowed = {
        "AES-256-GCM": {"encrypt", "data key"},
        "HMAC-SHA-256": {"mac", "verify mac"},
    }.get(algorithm, {"sign", "verify", "public"})
    key = call.create(algorithm)
    for name, operation in uses(key, call).items():
        if name in allowed:
            call(operation)
        else:
            with pytest.raises(WrongStateError):
                call(operation)


def test_decrypt_with_a_key_that_is_not_for_it(call: Desk) -> None:
    key = call.create("HMAC-SHA-256")
    forged = primitives.seal(bytes(32), bytes.fromhex(key[4:]), 1, b"p", {})
    with pytest.raises(WrongStateError):
        call(ops.Decrypt(forged))


# ── Tenants ───────────────────────────────────────────────────────────────────────────────────────


def test_a_caller_without_a_tenant(call: Desk) -> None:
    for operation in (ops.GenerateRandom(1), ops.ListKeys(), ops.CreateKey("token-aaaa")):
        with pytest.raises(DeniedError):
            call(operation, NOBODY)
    # The officer's and the VM's principals of the same number are not the user's.
    for caller in (Caller(uid=1, officer=True), Caller(vm="1", pid=1, start_time=1)):
        with pytest.raises(DeniedError):
            call(ops.ListKeys(), caller)


def refusal(call: Desk, operation: ops.GatedOperation, caller: Caller) -> tuple[type, str]:
    with pytest.raises(HostdError) as caught:
        call(operation, caller)
    return type(caught.value), str(caught.value)


REFERENCES: list[Callable[[str], ops.GatedOperation]] = [
    ops.DescribeKey,
    lambda k: ops.Encrypt(k, b"p"),
    lambda k: ops.GenerateDataKey(k),
    lambda k: ops.Sign(k, b"m"),
    lambda k: ops.Verify(k, b"m", b"s"),
    lambda k: ops.GetPublicKey(k),
    lambda k: ops.Mac(k, b"m"),
    lambda k: ops.VerifyMac(k, b"m", b"t"),
    lambda k: ops.Rotate(k, "token-zzzz"),
    lambda k: ops.Shred(k, "token-zzzz"),
]


@pytest.mark.parametrize("make", REFERENCES)
@pytest.mark.parametrize("algorithm", ["AES-256-GCM", "HMAC-SHA-256", "Ed25519"])
def test_another_tenants_key_is_as_one_that_never_was(
    call: Desk, make: Callable[[str], ops.GatedOperation], algorithm: AlgorithmName
) -> None:
    key = call.create(algorithm, alias="alias/mine")
    never = refusal(call, make(NO_KEY), BLUE)
    assert never[0] is NotFoundError
    assert refusal(call, make(key), BLUE) == never
    assert refusal(call, make("alias/mine"), BLUE) == never
    call.shred(key)
    assert refusal(call, make(key), BLUE) == never


def test_another_tenants_ciphertext_is_as_one_of_a_key_that_never_was(call: Desk) -> None:
    mine = call.create()
    theirs = call.create(caller=BLUE)
    ciphertext = call(ops.Encrypt(mine, b"p")).ciphertext
    never = ciphertext[:4] + bytes(16) + ciphertext[20:]
    for named in (None, theirs, mine, NO_KEY):
        answers = {refusal(call, ops.Decrypt(c, {}, named), BLUE) for c in (ciphertext, never)}
        assert len(answers) == 1
        assert answers.pop()[0] is NotFoundError


def test_lists_and_aliases_are_each_tenants_own(call: Desk) -> None:
    mine = [call.create() for _ in range(3)] + [call.create(alias="alias/same")]
    theirs = call.create(alias="alias/same", caller=BLUE)
    assert [k.id for k in call(ops.ListKeys()).keys] == sorted(mine)
    assert [k.id for k in call(ops.ListKeys(), BLUE).keys] == [theirs]
    assert call(ops.ListKeys(after=min(mine)), BLUE).keys in ((), call(ops.ListKeys(), BLUE).keys)
    assert call(ops.DescribeKey("alias/same"), BLUE).key.id == theirs


def test_a_page_and_the_next(call: Desk) -> None:
    keys = sorted(call.create() for _ in range(5))
    pages, after = [], None
    while True:
        page = call(ops.ListKeys(after, 2))
        pages.append([k.id for k in page.keys])
        if page.next is None:
            break
        after = page.next
    assert pages == [keys[:2], keys[2:4], keys[4:]]
    assert call(ops.ListKeys(None, 5)).next is None


# ── Idempotency ───────────────────────────────────────────────────────────────────────────────────


def test_the_same_call_again_is_done_once(call: Desk) -> None:
    create = ops.CreateKey("token-aaaa", "AES-256-GCM", "alias/a")
    first = call(create)
    assert call(create) == first
    assert len(call(ops.ListKeys()).keys) == 1
    key = first.key.id
    rotate = ops.Rotate(key, "token-bbbb")
    assert call(rotate).key.version == 2
    assert call(rotate).key.version == 2
    shred = ops.Shred(key, "token-cccc")
    assert call(shred).key.state == call(shred).key.state == "destroyed"


def test_a_token_serves_one_request_of_one_tenant(call: Desk) -> None:
    call(ops.CreateKey("token-aaaa", "AES-256-GCM"))
    key = call.create()
    for other in (
        ops.CreateKey("token-aaaa", "Ed25519"),
        ops.CreateKey("token-aaaa", "AES-256-GCM", "alias/x"),
        ops.Rotate(key, "token-aaaa"),
        ops.Shred(key, "token-aaaa"),
    ):
        with pytest.raises(ConflictError, match="token"):
            call(other)
    assert call(ops.DescribeKey(key)).key.version == 1
    theirs = call(ops.CreateKey("token-aaaa", "AES-256-GCM"), BLUE).key.id
    assert [k.id for k in call(ops.ListKeys(), BLUE).keys] == [theirs]


def test_a_failed_call_uses_up_no_token(call: Desk) -> None:
    call.create(alias="alias/a")
    with pytest.raises(ConflictError):
        call(ops.CreateKey("token-aaaa", "AES-256-GCM", "alias/a"))
    call(ops.CreateKey("token-aaaa", "AES-256-GCM", "alias/b"))


# ── Rotation ──────────────────────────────────────────────────────────────────────────────────────


def test_old_versions_decrypt_only(call: Desk) -> None:
    key = call.create()
    old = call(ops.Encrypt(key, b"old"))
    info = call.rotate(key)
    assert [(v.version, v.state) for v in info.versions] == [(1, "deactivated"), (2, "active")]
    assert (info.state, info.version) == ("active", 2)
    new = call(ops.Encrypt(key, b"new"))
    assert new.version == 2
    assert call(ops.Decrypt(old.ciphertext)) == ops.DecryptResult(b"old", key, 1)
    assert call(ops.Decrypt(new.ciphertext)) == ops.DecryptResult(b"new", key, 2)
    # The same bytes said to be of the other version are of neither.
    with pytest.raises(InvalidCiphertextError):
        call(ops.Decrypt(old.ciphertext[:20] + b"\0\0\0\2" + old.ciphertext[24:]))


def test_old_versions_verify_only(call: Desk) -> None:
    key = call.create("Ed25519")
    old = call(ops.Sign(key, b"m"))
    old_public = call(ops.GetPublicKey(key)).public_key
    call.rotate(key)
    assert call(ops.Sign(key, b"m")).version == 2
    assert call(ops.Verify(key, b"m", old.signature, version=1)).valid
    assert not call(ops.Verify(key, b"m", old.signature)).valid
    assert call(ops.GetPublicKey(key, 1)).public_key == old_public
    assert call(ops.GetPublicKey(key)).public_key != old_public
    for operation in (ops.Verify(key, b"m", b"s", version=3), ops.GetPublicKey(key, 3)):
        with pytest.raises(NotFoundError, match="version"):
            call(operation)


def test_a_compromised_version_of_an_active_key(call: Desk, store: Store, keyring: Keyring) -> None:
    key = call.create()
    old = call(ops.Encrypt(key, b"old")).ciphertext
    call.rotate(key)
    record = store.key("red", key)
    assert record is not None
    bad = keyring.rewrap(record, record.versions[0], State.COMPROMISED)
    store.put_key(replace(record, versions=(bad, record.versions[1])))
    with pytest.raises(WrongStateError):
        call(ops.Decrypt(old))
    assert call(ops.Encrypt(key, b"new")).version == 2


def test_versions_shown_and_versions_at_most(call: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    key = call.create()
    for _ in range(MAX_VERSIONS_SHOWN + 3):
        info = call.rotate(key)
    assert [v.version for v in info.versions] == list(range(5, MAX_VERSIONS_SHOWN + 5))
    monkeypatch.setattr(module, "MAX_VERSIONS", info.version)
    with pytest.raises(ConflictError, match="limit"):
        call.rotate(key)
    assert call(ops.Encrypt(key, b"")).version == info.version


@pytest.mark.parametrize("state", [s for s in State if s is not State.ACTIVE])
def test_only_an_active_key_is_rotated_or_used(call: Desk, store: Store, state: State) -> None:
    key = call.create()
    ciphertext = call(ops.Encrypt(key, b"p")).ciphertext
    store._write("UPDATE keys SET state=? WHERE id=?", state.value, key)
    with pytest.raises(WrongStateError):
        call.rotate(key)
    with pytest.raises(WrongStateError):
        call(ops.Encrypt(key, b"p"))
    if state is State.DEACTIVATED:
        assert call(ops.Decrypt(ciphertext)).plaintext == b"p"
    else:
        with pytest.raises(WrongStateError):
            call(ops.Decrypt(ciphertext))


def test_keys_at_most(call: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 2)
    call.create()
    call(ops.CreateKey("token-last"))
    with pytest.raises(ConflictError, match="limit"):
        call.create()
    call(ops.CreateKey("token-last"))
    call.create(caller=BLUE)


# ── Shredding ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", FAST)
def test_nothing_works_after_shred(call: Desk, algorithm: Algorithm) -> None:
    key = call.create(algorithm.value, alias="alias/gone")
    sealed = call(ops.Encrypt(key, b"p")).ciphertext if algorithm is Algorithm.AES_256_GCM else None
    call.rotate(key)
    info = call.shred(key)
    assert (info.state, info.alias) == ("destroyed", None)
    assert {v.state for v in info.versions} == {"destroyed"}
    for operation in [*uses(key, call).values(), ops.Rotate(key, "token-rrrr")]:
        with pytest.raises(WrongStateError):
            call(operation)
    if sealed is not None:
        with pytest.raises(WrongStateError):
            call(ops.Decrypt(sealed))
    with pytest.raises(WrongStateError):
        call.shred(key)
    with pytest.raises(NotFoundError):
        call(ops.DescribeKey("alias/gone"))
    assert call(ops.DescribeKey(key)).key.state == "destroyed"
    call.create(alias="alias/gone")


@pytest.mark.parametrize("algorithm", FAST)
def test_shredded_material_is_nowhere(
    call: Desk, store: Store, keyring: Keyring, tmp_path: Path, algorithm: Algorithm
) -> None:
    key = call.create(algorithm.value)
    record = store.key("red", key)
    assert record is not None
    wrapped = [record.current.wrapped]
    call.rotate(key)
    record = store.key("red", key)
    assert record is not None
    wrapped += [v.wrapped for v in record.versions]
    other = call.create(algorithm.value)
    for reference in (key, other):
        found = store.key("red", reference)
        assert found is not None
        for version in found.versions:
            keyring._lookup(found, version)
    store.flush()
    before = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert all(w in before for w in wrapped[1:])
    call.shred(key)
    store.flush()
    left = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert not [w for w in wrapped for i in range(0, len(w) - 16, 16) if w[i : i + 16] in left]
    assert {place[0] for place in keyring._cache} == {other}


def test_rotation_forgets_what_was_cached(call: Desk, keyring: Keyring) -> None:
    key = call.create()
    call(ops.Encrypt(key, b""))
    call.rotate(key)
    assert keyring._cache == {}


def test_another_root_opens_nothing(call: Desk, keyring: Keyring) -> None:
    key = call.create()
    keyring.lock()
    keyring.unlock(root(bytes(32)))
    with pytest.raises(HostdError, match=r"damaged|altered"):
        call(ops.Encrypt(key, b""))


def test_every_gated_operation_is_here(service: Service) -> None:
    assert set(service._table) == set(get_args(ops.GatedOperation))


def test_a_list_says_of_a_key_what_describing_it_says(service: Service, store: Store) -> None:
    call = Desk(service, store)
    rotated, plain, shredded = (call.create(alias=alias) for alias in ("alias/a", None, "alias/b"))
    for _ in range(20):
        call(ops.Rotate(rotated, call.token()))
    call(ops.Shred(shredded, call.token()))
    listed = {key.id: key for key in call(ops.ListKeys()).keys}
    assert listed == {key: call(ops.DescribeKey(key)).key for key in (rotated, plain, shredded)}
