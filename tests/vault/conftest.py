"""A store on the disk, a keyring with a root key in real secret memory, a service on both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.ipc.loop import Loop
from hostd.vault.counters import Counters
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Ledger
from hostd.vault.membership import Membership
from hostd.vault.mint import Mint
from hostd.vault.service import Service
from hostd.vault.store import Store
from tests.vault.support_channel import Desk
from tests.vault.support_keys import root, tenant_with_user


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store.sqlite", create=True)
    tenant_with_user(made, "red", 1)
    tenant_with_user(made, "blue", 2)
    made.commit()
    yield made
    made.close()


@pytest.fixture
def keyring(store: Store) -> Iterator[Keyring]:
    ring = Keyring(store)
    ring.unlock(root())
    yield ring
    ring.lock()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def desk(tmp_path: Path, loop: Loop) -> Iterator[Desk]:
    """A channel CA's keeper, with a store of its own."""
    made = Desk(tmp_path, loop)
    made.unseal()
    yield made
    made.close()


@pytest.fixture
def service(store: Store, keyring: Keyring, loop: Loop) -> Service:
    return Service(store, keyring, Mint(loop), Membership(store, keyring))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.jsonl")
    yield made
    made.close()


@pytest.fixture
def counters() -> Counters:
    return Counters()
