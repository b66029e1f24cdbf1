"""Bindings are believed only if this hostd made them, under the root key."""

from __future__ import annotations

import pytest

from guestlib.errors import ConflictError, UnavailableError
from hostd.core.callers import host_principal
from hostd.vault.keyring import Keyring
from hostd.vault.membership import Membership
from hostd.vault.store import Store
from tests.vault.support_keys import NOW, root

USER = host_principal(77)


@pytest.fixture
def membership(store: Store, keyring: Keyring) -> Membership:
    return Membership(store, keyring)


def test_a_bound_principal_has_its_tenant(membership: Membership) -> None:
    assert membership.tenant_of(USER) is None
    membership.bind(USER, "red", NOW)
    assert membership.tenant_of(USER) == "red"
    with pytest.raises(ConflictError):
        membership.bind(USER, "blue", NOW)


def test_a_binding_written_past_hostd_is_refused(
    store: Store, keyring: Keyring, membership: Membership
) -> None:
    store.bind(USER, "red", NOW, bytes(32))
    with pytest.raises(UnavailableError, match="was altered"):
        membership.tenant_of(USER)


def test_a_tag_serves_one_principal_and_one_tenant(store: Store, membership: Membership) -> None:
    membership.bind(USER, "red", NOW)
    found = store.binding(USER)
    assert found is not None
    for principal, tenant in ((host_principal(78), "red"), (USER, "blue")):
        store.unbind(principal)
        store.bind(principal, tenant, NOW, found[1])
        with pytest.raises(UnavailableError):
            membership.tenant_of(principal)


def test_another_root_does_not_vouch(store: Store, membership: Membership) -> None:
    membership.bind(USER, "red", NOW)
    other = Keyring(store)
    other.unlock(root(bytes(32)))
    with pytest.raises(UnavailableError):
        Membership(store, other).tenant_of(USER)
    other.lock()
    with pytest.raises(UnavailableError):
        Membership(store, other).tenant_of(USER)
