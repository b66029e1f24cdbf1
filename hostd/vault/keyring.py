"""Keys in memory: the root key, the tenants' key-encryption keys, and the versions in use.

ROOT lives in a `SecretBuffer`, key-encryption keys and symmetric material in `SecretSlots` (locked, not
dumped, not inherited). Material is unwrapped when a request needs it and cached in a bounded table. A private
key in use is an object of OpenSSL's, in ordinary memory that OpenSSL overwrites when the object goes.
What leaves the table is wiped; `lock` wipes everything. What remains is in docs/threat-model.md, "Wiping".
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from guestlib.errors import UnavailableError, WrongStateError
from hostd.core.keys import Algorithm, KeyRecord, State, VersionRecord
from hostd.platform.secretmem import SecretMemoryError, SecretSlots, Slot, wipe
from hostd.vault import primitives

if TYPE_CHECKING:
    from hostd.platform.secretmem import SecretBuffer
    from hostd.vault.store import Store

MAX_CACHED: Final = 4096
"""Key versions held unwrapped; the least recently used leaves."""
MAX_TAGS: Final = 4096
"""Rows whose tag was found right and is not computed again; over it all are forgotten."""

SYMMETRIC: Final = frozenset({Algorithm.AES_256_GCM, Algorithm.HMAC_SHA_256})


def binding(key: KeyRecord, version: int, state: State, generation: int) -> bytes:
    """What a wrapped version is bound to: format, tenant, key, algorithm, version, state, generation.

    Each field is length-prefixed (2 bytes, big endian). Moving a row between keys, tenants, versions,
    states or generations makes it undecryptable. (A whole older row put back, generation and all,
    opens: that is rollback, which this does not see.)
    """
    fields = (
        b"hostd key v1",
        key.tenant.encode(),
        key.id.encode(),
        key.algorithm.encode(),
        version.to_bytes(4, "big"),
        state.encode(),
        generation.to_bytes(8, "big"),
    )
    return b"".join(len(f).to_bytes(2, "big") + f for f in fields)


class _Unwrapped(NamedTuple):
    """Material of a key version that was in use, and what its row said besides its place."""

    row: tuple[str, Algorithm, State, bytes]
    """Tenant, algorithm, the version's state, wrapped material."""
    secret: Slot | primitives.PrivateKey

    def wipe(self) -> None:
        if isinstance(self.secret, Slot):
            self.secret.wipe()


class Keyring:
    """Unlocked by `unlock`, empty after `lock`.

    The views that it gives are dead after `lock`, `drop` and `forget`, and when the version leaves the table:
    a caller asks for one each time it works, and keeps none.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root: SecretBuffer | None = None
        self._locked: frozenset[str] = frozenset()
        self._slots = SecretSlots(primitives.KEY_BYTES)
        self._keks: dict[tuple[str, int], Slot] = {}
        self._salt_keys: dict[str, Slot] = {}
        self._cache: OrderedDict[tuple[str, int, int], _Unwrapped] = OrderedDict()
        self._right: set[tuple[str, bytes, bytes]] = set()
        """(purpose, body, tag) that belong together under this ROOT."""

    def __repr__(self) -> str:
        return f"<Keyring {'locked' if self._root is None else 'unlocked'}>"

    @property
    def unlocked(self) -> bool:
        return self._root is not None

    def unlock(self, root: SecretBuffer) -> None:
        """Takes ROOT (32 bytes) over; the keyring wipes it."""
        self.lock()
        self._root = root

    def lock(self) -> None:
        """Wipes ROOT and every key. Safe to call twice."""
        self.drop()
        self._slots.release()
        root, self._root = self._root, None
        if root is not None:
            root.wipe()

    def drop(self) -> None:
        """Wipes all that was unwrapped; ROOT stays. (Drift of one VM: nothing of its tenant lies about.)"""
        for found in self._cache.values():
            found.wipe()
        for slot in (*self._keks.values(), *self._salt_keys.values()):
            slot.wipe()
        self._cache.clear()
        self._keks.clear()
        self._salt_keys.clear()
        self._right.clear()

    def lock_tenants(self, tenants: frozenset[str]) -> None:
        """Keys of these tenants stay out of memory, and of no others, until the next call."""
        if tenants != self._locked:
            self._locked = tenants
            self.drop()

    def forget(self, key_id: str) -> None:
        """Wipes the cached versions of a key."""
        for place in [place for place in self._cache if place[0] == key_id]:
            self._cache.pop(place).wipe()

    def check_open(self, tenant: str) -> None:
        """Raises: UnavailableError, the keys are locked, or this tenant's are."""
        if self._root is None:
            raise UnavailableError("the keys are locked")
        if tenant in self._locked:
            raise UnavailableError("the tenant's keys are locked: a machine of its own has drifted")

    def _keep(self, secret: bytearray) -> Slot:
        """Moves 32 bytes into a slot."""
        try:
            return self._slots.take(secret)
        except SecretMemoryError as error:
            raise UnavailableError(f"no memory for keys: {error}") from error

    def _kek(self, tenant: str) -> memoryview:
        if self._root is None:
            raise UnavailableError("the keys are locked")
        self.check_open(tenant)
        generation = self._store.kek_generation(tenant)
        if generation is None:
            raise UnavailableError("the tenant's key generation is unknown")
        kek = self._keks.get((tenant, generation))
        if kek is None:
            kek = self._keks[tenant, generation] = self._derived(tenant, generation)
        return kek.view

    def _derived(self, tenant: str, generation: int) -> Slot:
        assert self._root is not None
        with self._root.view() as view:
            return self._keep(
                primitives.derive_kek(view, store=self._store.store_id, tenant=tenant, generation=generation)
            )

    def salt(self, tenant: str, entry: int) -> bytes:
        """The salt of a tenant's ledger entry, 16 bytes: derived each time, never stored. Also while the
        tenant's keys are locked, because what its machines do is recorded then too.

        Raises:
            UnavailableError: the keys are locked.
        """
        if self._root is None:
            raise UnavailableError("the keys are locked")
        key = self._salt_keys.get(tenant)
        if key is None:
            with self._root.view() as view:
                key = self._keep(primitives.derive_salt_key(view, store=self._store.store_id, tenant=tenant))
            self._salt_keys[tenant] = key
        return primitives.receipt_salt(key.view, entry)

    def checkpoint_key(self) -> primitives.CheckpointKey:
        """The key that signs checkpoints, derived each time (once a second at most).

        Raises:
            UnavailableError: the keys are locked.
        """
        if self._root is None:
            raise UnavailableError("the keys are locked")
        with self._root.view() as view:
            return primitives.derive_checkpoint_key(view, store=self._store.store_id)

    def wrap(
        self, key: KeyRecord, version: int, state: State, generation: int, material: primitives.Secret
    ) -> bytes:
        """Wrapped material for one row of the store."""
        return primitives.wrap(self._kek(key.tenant), material, binding(key, version, state, generation))

    def wrap_service_key(self, name: str, material: bytes) -> bytes:
        """Wraps a document of hostd's own, or the channel CA's key, under a key derived from ROOT."""
        return primitives.wrap(self._service_kek(), material, b"hostd service key v1\0" + name.encode())

    def unwrap_service_key(self, name: str, wrapped: bytes) -> bytes:
        """What was wrapped so: no tenant's key ever is, and nobody wipes it.

        Raises:
            primitives.IntegrityError: it does not open.
        """
        return bytes(
            primitives.unwrap(self._service_kek(), wrapped, b"hostd service key v1\0" + name.encode())
        )

    def tag(self, purpose: str, body: bytes) -> bytes:
        """HMAC-SHA-256 of a row of the store, under a key derived from ROOT; 32 bytes."""
        return primitives.mac(self._row_key(), purpose.encode() + b"\0" + body)

    def tag_matches(self, purpose: str, body: bytes, tag: bytes) -> bool:
        """Raises: UnavailableError, the keys are locked."""
        if self._root is not None and (purpose, body, tag) in self._right:
            return True
        if not primitives.mac_matches(self._row_key(), purpose.encode() + b"\0" + body, tag):
            return False
        if len(self._right) >= MAX_TAGS:
            self._right.clear()
        self._right.add((purpose, body, tag))
        return True

    def _service_kek(self) -> memoryview:
        return self._own_key(0)

    def _row_key(self) -> memoryview:
        return self._own_key(1)

    def _own_key(self, purpose: int) -> memoryview:
        """Keys of hostd's own: 0 wraps its documents, 1 authenticates rows."""
        if self._root is None:
            raise UnavailableError("the keys are locked")
        key = self._keks.get(("", purpose))
        if key is None:
            # No tenant has an empty name (the operators' commands refuse it).
            key = self._keks["", purpose] = self._derived("", purpose)
        return key.view

    def _material(self, key: KeyRecord, version: VersionRecord) -> bytearray:
        """Unwrapped; the caller wipes it."""
        if version.state is State.DESTROYED:
            raise WrongStateError("the key is destroyed")
        try:
            return primitives.unwrap(
                self._kek(key.tenant),
                version.wrapped,
                binding(key, version.version, version.state, version.generation),
            )
        except primitives.IntegrityError as error:
            raise UnavailableError(f"stored key {key.id} is damaged or was replaced") from error

    def secret(self, key: KeyRecord, version: VersionRecord) -> memoryview:
        """Material of a symmetric key version.

        Raises:
            UnavailableError: locked, or the stored row was altered.
            WrongStateError: destroyed.
        """
        found = self._lookup(key, version)
        assert isinstance(found, Slot)
        return found.view

    def private(self, key: KeyRecord, version: VersionRecord) -> primitives.PrivateKey:
        """The private key of an asymmetric key version. Raises: as `secret`."""
        found = self._lookup(key, version)
        assert not isinstance(found, Slot)
        return found

    def _lookup(self, key: KeyRecord, version: VersionRecord) -> Slot | primitives.PrivateKey:
        if self._root is None:
            raise UnavailableError("the keys are locked")
        place = (key.id, version.version, version.generation)
        # The row may have been edited since it was unwrapped: what was opened is of this very row only.
        row = (key.tenant, key.algorithm, version.state, version.wrapped)
        found = self._cache.get(place)
        if found is None or found.row != row:
            opened = _Unwrapped(row, self._open(key, version))
            if found is not None:
                found.wipe()
            found = self._cache[place] = opened
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)[1].wipe()
        self._cache.move_to_end(place)
        return found.secret

    def _open(self, key: KeyRecord, version: VersionRecord) -> Slot | primitives.PrivateKey:
        material = self._material(key, version)
        try:
            if key.algorithm in SYMMETRIC:
                return self._keep(material)
            return primitives.load_private(key.algorithm, material)
        finally:
            wipe(material)

    def rewrap(self, key: KeyRecord, version: VersionRecord, state: State) -> VersionRecord:
        """The same version in another state: wrapped anew under the next generation."""
        material = self._material(key, version)
        generation = version.generation + 1
        try:
            wrapped = self.wrap(key, version.version, state, generation, material)
        finally:
            wipe(material)
        return VersionRecord(
            version=version.version,
            state=state,
            created=version.created,
            generation=generation,
            wrapped=wrapped,
        )
