"""What the vault keeps after reading it never outlives a change: each acts at the very next request.

Every case warms all that is kept (key row, binding, its tag, unwrapped material) by using the key, makes one
change, and uses the key again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from guestlib.errors import (
    DeniedError,
    HostdError,
    InvalidCiphertextError,
    NotFoundError,
    UnavailableError,
    WrongStateError,
)
from hostd.core.callers import Caller, host_principal
from hostd.core.keys import State
from hostd.ipc import operations as ops
from hostd.vault import keyring as keyring_module
from hostd.vault import store as store_module
from hostd.vault.keyring import Keyring
from hostd.vault.membership import Membership
from hostd.vault.service import Service
from hostd.vault.store import Known, Store
from tests.vault.support_keys import NOW, root

RED = Caller(uid=1)


class Warm:
    """A key `alias/k` of tenant red that was just used by id and by alias, and a ciphertext of it."""

    def __init__(self, service: Service, store: Store, keyring: Keyring) -> None:
        self.service, self.store, self.keyring = service, store, keyring
        made = self.run(ops.CreateKey("token-warm", "AES-256-GCM", "alias/k"))
        assert isinstance(made, ops.KeyResult)
        self.key = made.key.id
        store.commit()
        sealed = self.encrypt()
        self.ciphertext = sealed.ciphertext
        assert sealed.version == 1
        self.encrypt("alias/k")
        self.decrypt()

    def run(self, operation: ops.GatedOperation) -> object:
        return self.service.execute(RED, operation, NOW).result

    def encrypt(self, reference: str | None = None) -> ops.EncryptResult:
        result = self.run(ops.Encrypt(reference or self.key, b"plain"))
        assert isinstance(result, ops.EncryptResult)
        return result

    def decrypt(self) -> bytes:
        result = self.run(ops.Decrypt(self.ciphertext))
        assert isinstance(result, ops.DecryptResult)
        return result.plaintext

    def all_refused(self, error: type[HostdError]) -> None:
        for use in (self.encrypt, lambda: self.encrypt("alias/k"), self.decrypt):
            with pytest.raises(error):
                use()

    def set_state(self, state: State) -> None:
        record = self.store.key("red", self.key)
        assert record is not None
        version = self.keyring.rewrap(record, record.current, state)
        self.store.put_key(replace(record, state=state, versions=(version,)))


@pytest.fixture
def warm(service: Service, store: Store, keyring: Keyring) -> Warm:
    return Warm(service, store, keyring)


def test_unbinding_acts_at_once(warm: Warm) -> None:
    assert warm.store.unbind(host_principal(1))
    warm.all_refused(DeniedError)


def test_binding_to_another_tenant_acts_at_once(warm: Warm) -> None:
    warm.store.unbind(host_principal(1))
    Membership(warm.store, warm.keyring).bind(host_principal(1), "blue", NOW)
    warm.all_refused(NotFoundError)


def test_a_binding_that_is_put_back_serves_again(warm: Warm) -> None:
    warm.store.savepoint()
    warm.store.unbind(host_principal(1))
    warm.all_refused(DeniedError)
    warm.store.undo()
    assert warm.decrypt() == b"plain"
    warm.store.unbind(host_principal(1))
    warm.all_refused(DeniedError)
    warm.store.rollback()
    assert warm.decrypt() == b"plain"


def test_a_binding_with_a_wrong_tag_is_found_at_once(warm: Warm) -> None:
    warm.store._write("UPDATE bindings SET tag=zeroblob(32) WHERE principal=?", host_principal(1))
    warm.all_refused(UnavailableError)
    # The tag that was right for one tenant is not for another.
    warm.store.rollback()
    assert warm.decrypt() == b"plain"
    warm.store._write("UPDATE bindings SET tenant='blue' WHERE principal=?", host_principal(1))
    warm.all_refused(UnavailableError)


def test_rotation_acts_at_once(warm: Warm) -> None:
    warm.run(ops.Rotate(warm.key, "token-rotate"))
    assert (warm.encrypt().version, warm.encrypt("alias/k").version) == (2, 2)
    assert warm.decrypt() == b"plain"


def test_a_rotation_that_is_undone_leaves_no_trace(warm: Warm) -> None:
    """The batch's step is rolled back after the new version was used."""
    warm.store.savepoint()
    warm.run(ops.Rotate(warm.key, "token-rotate"))
    made = warm.encrypt()
    assert made.version == 2
    warm.store.undo()
    assert warm.encrypt().version == 1
    with pytest.raises(NotFoundError):
        warm.run(ops.Decrypt(made.ciphertext))
    # And the version that takes its number is another key.
    warm.run(ops.Rotate(warm.key, "token-again"))
    with pytest.raises(InvalidCiphertextError):
        warm.run(ops.Decrypt(made.ciphertext))


def test_shred_acts_at_once(warm: Warm) -> None:
    warm.run(ops.Shred(warm.key, "token-shred"))
    for use in (warm.encrypt, warm.decrypt):
        with pytest.raises(WrongStateError):
            use()
    with pytest.raises(NotFoundError):
        warm.encrypt("alias/k")
    assert not warm.keyring._cache


@pytest.mark.parametrize("state", [State.SUSPENDED, State.COMPROMISED])
def test_a_state_that_forbids_acts_at_once(warm: Warm, state: State) -> None:
    warm.set_state(state)
    warm.all_refused(WrongStateError)


def test_deactivation_acts_at_once(warm: Warm) -> None:
    warm.set_state(State.DEACTIVATED)
    for reference in (warm.key, "alias/k"):
        with pytest.raises(WrongStateError):
            warm.encrypt(reference)
    assert warm.decrypt() == b"plain"


def test_an_alias_that_moves_is_followed(warm: Warm) -> None:
    made = warm.run(ops.CreateKey("token-other", "AES-256-GCM"))
    assert isinstance(made, ops.KeyResult)
    warm.store._write("UPDATE keys SET alias=NULL WHERE id=?", warm.key)
    with pytest.raises(NotFoundError):
        warm.encrypt("alias/k")
    warm.store._write("UPDATE keys SET alias='alias/k' WHERE id=?", made.key.id)
    assert warm.encrypt("alias/k").key == made.key.id


def test_lock_acts_at_once(warm: Warm) -> None:
    warm.keyring.lock()
    warm.all_refused(UnavailableError)
    assert not warm.keyring._right
    warm.keyring.unlock(root(bytes(32)))
    warm.all_refused(UnavailableError)
    warm.keyring.unlock(root())
    assert warm.decrypt() == b"plain"


def test_what_was_right_is_not_while_the_keys_are_locked(warm: Warm) -> None:
    tag = warm.keyring.tag("x", b"body")
    warm.keyring.lock()
    warm.keyring._right.add(("x", b"body", tag))
    with pytest.raises(UnavailableError, match="locked"):
        warm.keyring.tag_matches("x", b"body", tag)


def test_drift_leaves_nothing_unwrapped(warm: Warm) -> None:
    """`drop`: what is kept of keys and tags goes; what is used again is read and unwrapped again."""
    assert warm.keyring._cache
    assert warm.keyring._right
    warm.keyring.drop()
    assert not warm.keyring._cache
    assert not warm.keyring._keks
    assert not warm.keyring._right
    warm.store._run("UPDATE versions SET wrapped=zeroblob(60) WHERE key=?", warm.key)
    warm.all_refused(UnavailableError)


def test_another_process_is_seen_by_the_next_batch(warm: Warm, tmp_path: Path) -> None:
    warm.store.refresh()
    other = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    other.execute("UPDATE keys SET state='suspended' WHERE id=?", (warm.key,))
    other.close()
    warm.store.refresh()
    warm.all_refused(WrongStateError)


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE keys SET tenant='blue'",
        "UPDATE keys SET algorithm='HMAC-SHA-256'",
        "UPDATE versions SET state='deactivated'",
        "UPDATE versions SET wrapped=zeroblob(60)",
    ],
)
def test_a_row_that_another_process_edits_no_longer_opens(warm: Warm, tmp_path: Path, edit: str) -> None:
    """Also while its material is in memory: that was opened for the row as it was."""
    warm.store.refresh()
    other = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    other.execute(edit)
    other.close()
    warm.store.refresh()
    for tenant in ("red", "blue"):
        record = warm.store.key(tenant, warm.key)
        if record is not None:
            with pytest.raises(UnavailableError, match="damaged or was replaced"):
                warm.keyring.secret(record, record.current)
    blue = Caller(uid=2)
    with pytest.raises(HostdError):
        warm.service.execute(blue, ops.Decrypt(warm.ciphertext), NOW)


CHANGES: list[Callable[[Store], object]] = [
    lambda s: s.add_tenant("green", NOW),
    lambda s: s.set_meta("x", b""),
    lambda s: s.unbind("nobody"),
    lambda s: s.put_drift("ima", (), NOW, 1),
    lambda s: s.clear_drift("ima"),
    lambda s: s.put_token("red", "token-x", b"", "key", NOW),
    lambda s: s.savepoint(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_write_empties_what_was_read(warm: Warm, change: Callable[[Store], object]) -> None:
    assert warm.store._keys._found
    assert warm.store._bindings._found
    change(warm.store)
    assert not warm.store._keys._found
    assert not warm.store._bindings._found


def test_what_is_kept_is_bounded(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_KNOWN", 2)
    known: Known[int] = Known()
    for number in (1, 2, 1, 3):
        if known.get(number) is None:
            known.put(number, number)
    assert list(known._found) == [1, 3]
    monkeypatch.setattr(keyring_module, "MAX_TAGS", 2)
    for body in (b"a", b"b", b"c", b"d"):
        assert warm.keyring.tag_matches("x", body, warm.keyring.tag("x", body))
        assert len(warm.keyring._right) <= 2


def test_a_wrong_tag_is_never_kept(warm: Warm) -> None:
    right = set(warm.keyring._right)
    for _ in range(2):
        assert not warm.keyring.tag_matches("binding", b"body", bytes(32))
    assert warm.keyring._right == right
