"""Keys in memory: what opens only in its place, and what is gone after `lock`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import pytest

from guestlib.errors import UnavailableError, WrongStateError
from hostd.core.keys import Algorithm, KeyRecord, State, VersionRecord
from hostd.platform import secretmem
from hostd.platform.secretmem import SecretMemoryError, Slot
from hostd.vault import keyring as module
from hostd.vault import primitives
from hostd.vault.keyring import Keyring, binding
from hostd.vault.store import Store
from tests.vault.support_keys import NOW, ROOT, new_key, root


def fresh(store: Store, secret: bytes = ROOT) -> Keyring:
    """A keyring that has nothing cached."""
    ring = Keyring(store)
    ring.unlock(root(secret))
    return ring


def test_unwraps_what_it_wrapped(store: Store, keyring: Keyring) -> None:
    key = new_key(keyring, versions=3)
    materials = {bytes(keyring.secret(key, version)) for version in key.versions}
    assert len(materials) == 3
    other = fresh(store)
    assert {bytes(other.secret(key, version)) for version in key.versions} == materials
    signing = new_key(keyring, number=2, algorithm=Algorithm.ED25519)
    private = keyring.private(signing, signing.current)
    assert primitives.public_der(private) == primitives.public_der(
        fresh(store).private(signing, signing.current)
    )
    assert keyring.private(signing, signing.current) is private


MOVES: dict[str, Callable[[KeyRecord, KeyRecord], KeyRecord]] = {
    "another tenant": lambda k, _: replace(k, tenant="blue"),
    "another key": lambda k, other: replace(k, id=other.id),
    "another algorithm": lambda k, _: replace(k, algorithm=Algorithm.HMAC_SHA_256),
    "another version": lambda k, _: replace(
        k, versions=(replace(k.versions[1], version=1), replace(k.versions[0], version=2))
    ),
    "another state": lambda k, _: replace(
        k, versions=(k.versions[0], replace(k.versions[1], state=State.SUSPENDED))
    ),
    "the old version active again": lambda k, _: replace(
        k,
        versions=(
            replace(k.versions[1], version=1),
            replace(k.versions[0], version=2, state=State.ACTIVE),
        ),
    ),
    "another generation": lambda k, _: replace(
        k, versions=(k.versions[0], replace(k.versions[1], generation=2))
    ),
    "another key's row": lambda k, other: replace(k, versions=other.versions),
    "a changed byte": lambda k, _: replace(
        k,
        versions=(
            k.versions[0],
            replace(k.versions[1], wrapped=k.versions[1].wrapped[:-1] + b"\0" * 1),
        ),
    ),
    "nothing": lambda k, _: replace(k, versions=(k.versions[0], replace(k.versions[1], wrapped=b""))),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_row_that_was_moved_does_not_open(store: Store, keyring: Keyring, move: str) -> None:
    key, other = new_key(keyring, number=1, versions=2), new_key(keyring, number=2, versions=2)
    if key.current.wrapped[-1] == 0:
        key = new_key(keyring, number=1, versions=2)
    moved = MOVES[move](key, other)
    ring = fresh(store)
    ring.secret(key, key.current)
    moved_ring = fresh(store)
    with pytest.raises(UnavailableError, match="damaged or was replaced"):
        moved_ring.secret(moved, moved.versions[1])


def test_another_root_store_or_kek_generation_does_not_open(store: Store, keyring: Keyring) -> None:
    key = new_key(keyring)
    with pytest.raises(UnavailableError, match="damaged"):
        fresh(store, bytes(32)).secret(key, key.current)
    store._run("UPDATE tenants SET kek_generation=2 WHERE name='red'")
    with pytest.raises(UnavailableError, match="damaged"):
        fresh(store).secret(key, key.current)
    store._run("UPDATE tenants SET kek_generation=1 WHERE name='red'")
    store.set_meta("store_id", bytes(16))
    with pytest.raises(UnavailableError, match="damaged"):
        fresh(store).secret(key, key.current)


def test_bindings_are_injective() -> None:
    base = KeyRecord("key-1", "red", Algorithm.AES_256_GCM, State.ACTIVE, NOW, None, ())
    keys = [base, replace(base, id="key-1r", tenant="ed"), replace(base, id="1", tenant="redkey-")]
    keys.append(replace(base, tenant="blue"))
    keys += [replace(base, algorithm=a) for a in Algorithm if a is not base.algorithm]
    made = {
        binding(k, version, state, generation)
        for k in keys
        for version in (1, 2, 256)
        for state in State
        for generation in (1, 2, 1 << 32)
    }
    assert len(made) == len(keys) * 3 * len(State) * 3


def test_an_unknown_tenant_has_no_key(keyring: Keyring) -> None:
    with pytest.raises(UnavailableError, match="generation is unknown"):
        new_key(keyring, tenant="none")


# ── Locking ───────────────────────────────────────────────────────────────────────────────────────


def test_lock_wipes_and_nothing_works_after(store: Store) -> None:
    secret = root()
    ring = Keyring(store)
    ring.unlock(secret)
    key = new_key(ring)
    ring.secret(key, key.current)
    wrapped = ring.wrap_service_key("ca", b"der")
    assert ring.unlocked
    ring.lock()
    ring.lock()
    assert not ring.unlocked
    assert secret.wiped
    assert not ring._keks
    assert not ring._cache
    for use in (
        lambda: ring.secret(key, key.current),
        lambda: ring.wrap(key, 1, State.ACTIVE, 1, b""),
        lambda: ring.rewrap(key, key.current, State.DEACTIVATED),
        lambda: ring.wrap_service_key("ca", b""),
        lambda: ring.unwrap_service_key("ca", wrapped),
    ):
        with pytest.raises(UnavailableError, match="locked"):
            use()
    ring.unlock(root())
    assert ring.unwrap_service_key("ca", wrapped) == b"der"
    assert ring.secret(key, key.current)
    ring.lock()


def test_unlocking_again_wipes_the_first_root(store: Store) -> None:
    first, second = root(), root(bytes(32))
    ring = Keyring(store)
    ring.unlock(first)
    key = new_key(ring)
    ring.secret(key, key.current)
    ring.unlock(second)
    assert first.wiped
    assert not second.wiped
    with pytest.raises(UnavailableError, match="damaged"):
        ring.secret(key, key.current)
    ring.lock()


def test_it_shows_nothing_and_is_not_copied(keyring: Keyring) -> None:
    key = new_key(keyring)
    material = bytes(keyring.secret(key, key.current))
    shown = repr(keyring) + str(keyring) + format(keyring)
    for secret in (ROOT, material, bytes(keyring._kek("red"))):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
    assert repr(keyring) == "<Keyring unlocked>"
    for copying in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            copying(keyring._root)


def test_errors_show_nothing(store: Store, keyring: Keyring) -> None:
    key = new_key(keyring)
    broken = replace(key, versions=(replace(key.current, generation=9),))
    with pytest.raises(UnavailableError) as caught:
        fresh(store).secret(broken, broken.current)
    assert str(caught.value) == f"unavailable: stored key {key.id} is damaged or was replaced"


# ── Cache, states ─────────────────────────────────────────────────────────────────────────────────


def test_forget_drops_one_key(store: Store, keyring: Keyring) -> None:
    one, two = new_key(keyring, number=1, versions=2), new_key(keyring, number=2)
    for key in (one, two):
        for version in key.versions:
            keyring.secret(key, version)
    keyring.forget(one.id)
    assert {place[0] for place in keyring._cache} == {two.id}


ENDS: dict[str, Callable[[Keyring, KeyRecord], object]] = {
    "lock": lambda ring, _: ring.lock(),
    "drop": lambda ring, _: ring.drop(),
    "forget": lambda ring, key: ring.forget(key.id),
    "another tenant's lock": lambda ring, _: ring.lock_tenants(frozenset({"blue"})),
    "another root": lambda ring, _: ring.unlock(root()),
    "an edited row": lambda ring, key: ring.secret(key, edited(ring, key)),
}


def edited(ring: Keyring, key: KeyRecord) -> VersionRecord:
    """The same place, wrapped anew."""
    current = key.current
    return replace(current, wrapped=ring.wrap(key, 1, current.state, 1, bytes(32)))


@pytest.mark.parametrize("end", ENDS)
def test_what_leaves_memory_is_wiped_and_its_view_is_dead(keyring: Keyring, end: str) -> None:
    key = new_key(keyring)
    view = keyring.secret(key, key.current)
    slot = keyring._cache[key.id, 1, 1].secret
    assert isinstance(slot, Slot)
    with memoryview(slot._block.view) as block:  # type: ignore[union-attr]
        place = block[slot._at : slot._at + 32]
        assert place == view
        ENDS[end](keyring, key)
        assert slot.wiped
        if end == "an edited row":  # the place may serve the new material, which is zeros too
            assert keyring._cache[key.id, 1, 1].secret is not slot
        assert place == bytes(32)
    with pytest.raises(ValueError, match="released"):
        bytes(view)


@pytest.mark.parametrize("algorithm", [Algorithm.AES_256_GCM, Algorithm.ED25519, Algorithm.ECDSA_P256])
def test_what_was_unwrapped_on_the_way_is_wiped(
    store: Store, keyring: Keyring, algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, unwrap, on_the_way = new_key(keyring, algorithm=algorithm), primitives.unwrap, []

    def seen(*arguments: Any) -> bytearray:
        on_the_way.append(unwrap(*arguments))
        assert any(on_the_way[-1])
        return on_the_way[-1]

    monkeypatch.setattr(primitives, "unwrap", seen)
    ring = fresh(store)
    ring._lookup(key, key.current)
    ring.rewrap(key, key.current, State.DEACTIVATED)
    ring.lock()
    assert len(on_the_way) == 2
    assert not any(map(any, on_the_way))


def test_keys_of_hostds_own_are_wiped_with_the_rest(keyring: Keyring) -> None:
    keyring.salt("red", 1)
    keyring.tag("purpose", b"body")
    new_key(keyring)
    slots = [*keyring._keks.values(), *keyring._salt_keys.values()]
    assert len(slots) == 3
    keyring.lock()
    assert all(slot.wiped for slot in slots)


def test_without_memory_for_keys_it_is_unavailable(
    store: Store, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_size: int) -> NoReturn:
        raise SecretMemoryError("RLIMIT_MEMLOCK")

    ring = fresh(store)
    key = new_key(keyring)
    monkeypatch.setattr(secretmem, "_map", none)
    with pytest.raises(UnavailableError, match="no memory for keys: RLIMIT_MEMLOCK"):
        ring.secret(key, key.current)
    monkeypatch.undo()
    assert ring.secret(key, key.current) == keyring.secret(key, key.current)


def test_the_cache_is_bounded_and_the_least_used_leaves(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    keys = [new_key(keyring, number=n) for n in range(3)]
    for key in (keys[0], keys[1], keys[0], keys[2]):
        keyring.secret(key, key.current)
    assert [place[0] for place in keyring._cache] == [keys[0].id, keys[2].id]
    (block,) = keyring._slots._blocks
    in_use = secretmem.BLOCK_BYTES // 32 - len(block.free)
    assert in_use == len(keyring._cache) + len(keyring._keks)


def test_a_destroyed_version_has_no_material(keyring: Keyring) -> None:
    key = new_key(keyring)
    keyring.secret(key, key.current)
    gone = replace(key.current, state=State.DESTROYED, generation=2, wrapped=b"")
    with pytest.raises(WrongStateError, match="destroyed"):
        keyring.secret(replace(key, versions=(gone,)), gone)


def test_rewrap_is_the_same_material_in_its_new_state_only(store: Store, keyring: Keyring) -> None:
    key = new_key(keyring)
    material = bytes(keyring.secret(key, key.current))
    after = keyring.rewrap(key, key.current, State.DEACTIVATED)
    assert (after.state, after.generation, after.version) == (State.DEACTIVATED, 2, 1)
    other = fresh(store)
    assert other.secret(replace(key, versions=(after,)), after) == material
    # The old wrapping under the new name, and the new one under the old name, do not open.
    for wrong in (replace(after, wrapped=key.current.wrapped), replace(key.current, wrapped=after.wrapped)):
        with pytest.raises(UnavailableError):
            fresh(store).secret(replace(key, versions=(wrong,)), wrong)


def test_service_keys_are_bound_to_their_name_and_are_no_tenants(store: Store, keyring: Keyring) -> None:
    wrapped = keyring.wrap_service_key("channel-ca", b"der")
    with pytest.raises(primitives.IntegrityError):
        keyring.unwrap_service_key("reference", wrapped)
    with pytest.raises(primitives.IntegrityError):
        fresh(store, bytes(32)).unwrap_service_key("channel-ca", wrapped)
    key = new_key(keyring)
    with pytest.raises(primitives.IntegrityError):
        keyring.unwrap_service_key("channel-ca", key.current.wrapped)
