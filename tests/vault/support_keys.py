"""Root keys, tenants and key records for tests of the vault."""

from __future__ import annotations

from hostd.core.callers import host_principal
from hostd.core.keys import Algorithm, KeyRecord, State, VersionRecord
from hostd.platform.secretmem import SecretBuffer
from hostd.vault import primitives
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry
from hostd.vault.membership import Membership
from hostd.vault.store import Store

ROOT = bytes(range(32))
NOW = 1_700_000_000_000


def root(secret: bytes = ROOT) -> SecretBuffer:
    return SecretBuffer.taking(bytearray(secret))


def tenant_with_user(store: Store, name: str, uid: int) -> None:
    """A tenant, and a user bound to it under the tests' root key."""
    store.add_tenant(name, NOW)
    keyring = Keyring(store)
    keyring.unlock(root())
    Membership(store, keyring).bind(host_principal(uid), name, NOW)
    keyring.lock()


def new_key(
    keyring: Keyring,
    *,
    tenant: str = "red",
    number: int = 1,
    algorithm: Algorithm = Algorithm.AES_256_GCM,
    alias: str | None = None,
    versions: int = 1,
) -> KeyRecord:
    """A key of some versions, not yet in the store."""
    bare = KeyRecord(f"key-{number:032x}", tenant, algorithm, State.ACTIVE, NOW, alias, ())
    return KeyRecord(
        bare.id,
        tenant,
        algorithm,
        State.ACTIVE,
        NOW,
        alias,
        tuple(
            VersionRecord(
                n,
                State.ACTIVE if n == versions else State.DEACTIVATED,
                NOW,
                1,
                keyring.wrap(
                    bare,
                    n,
                    State.ACTIVE if n == versions else State.DEACTIVATED,
                    1,
                    primitives.generate(algorithm),
                ),
            )
            for n in range(1, versions + 1)
        ),
    )


def entry(seq: int, detail: str = "") -> Entry:
    return Entry(seq=seq, time=NOW + seq, event="operation", outcome="released", detail=detail)
