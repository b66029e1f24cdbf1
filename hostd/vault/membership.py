"""Which tenant a principal belongs to, authenticated under ROOT.

Each binding carries an HMAC under a key derived from ROOT, so that whoever edits the store while hostd
is down cannot make a VM somebody's. (An older binding put back as it was is rollback, which this does
not see; a binding taken away only denies.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from guestlib.errors import UnavailableError

if TYPE_CHECKING:
    from hostd.vault.keyring import Keyring
    from hostd.vault.store import Store


class Membership:
    """Reads and writes bindings."""

    def __init__(self, store: Store, keyring: Keyring) -> None:
        self._store = store
        self._keyring = keyring

    def bind(self, principal: str, tenant: str, now: int) -> None:
        """Raises: ConflictError, it is bound already or there is no such tenant; UnavailableError, locked."""
        self._store.bind(principal, tenant, now, self._keyring.tag("binding", _body(principal, tenant)))

    def tenant_of(self, principal: str) -> str | None:
        """The tenant, None if it has none.

        Raises:
            UnavailableError: the keys are locked, or the binding is not one that this hostd made.
        """
        found = self._store.binding(principal)
        if found is None:
            return None
        tenant, tag = found
        if not self._keyring.tag_matches("binding", _body(principal, tenant), tag):
            raise UnavailableError(f"the stored binding of {principal} was altered")
        return tenant


@lru_cache(4096)
def _body(principal: str, tenant: str) -> bytes:
    return b"".join(len(raw).to_bytes(4, "big") + raw for raw in (principal.encode(), tenant.encode()))
