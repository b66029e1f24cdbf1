"""What tenants chose for their own keys when what these rest on drifts: to keep them, or to destroy them.

Nobody's keys are destroyed who did not choose it. Destroyed is what an officer cannot bring back: the wrapped
key is overwritten in the store and its write-ahead log, as by the operation Shred. No key is destroyed before
the ledger says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.errors import HostdError, NotFoundError, UnavailableError
from hostd.core.keys import Event, State, after

if TYPE_CHECKING:
    from hostd.core.findings import Component
    from hostd.vault.custody import House
    from hostd.vault.keyring import Keyring
    from hostd.vault.store import Store

_CHOSEN: Final = "on_drift_shred"
_AT_ONCE: Final = 256
"""Keys read from the store at a time."""


class Shredding:
    """Reads and writes the choice, and acts on it."""

    def __init__(self, house: House, store: Store, keyring: Keyring) -> None:
        self._house = house
        self._store = store
        self._keyring = keyring

    def choose(self, tenant: str, shred: bool) -> None:
        """Sets what follows for a tenant's keys (the caller commits).

        Raises:
            NotFoundError: no such tenant.
        """
        if self._store.kek_generation(tenant) is None:
            raise NotFoundError(f"no such tenant: {tenant}")
        chosen = {*self.chosen(None)} - {tenant} | ({tenant} if shred else set())
        self._store.set_meta(_CHOSEN, msgspec.msgpack.encode(sorted(chosen)))

    def chosen(self, tenant: str | None) -> tuple[str, ...]:
        """The tenants that chose to shred: all of them (None), or only the one named if it did.

        Raises:
            UnavailableError: the row is damaged.
        """
        raw = self._store.meta(_CHOSEN)
        try:
            found = () if raw is None else msgspec.msgpack.decode(raw, type=tuple[str, ...])
        except msgspec.MsgspecError as error:
            raise UnavailableError("the stored list of tenants that shred is damaged") from error
        return found if tenant is None else tuple(name for name in found if name == tenant)

    def shred(self, component: Component, tenant: str | None) -> str:
        """Destroys the keys of those who chose it: of every tenant (None: the host drifted), or of this one
        alone. Says what was done. Doing it again destroys what is left.

        Raises:
            HostdError: some are left: the ledger or the store failed.
        """
        counts = {name: self._shred(component, name) for name in self.chosen(tenant)}
        self._keyring.drop()
        return ", ".join(f"{name}: {count} keys destroyed" for name, count in counts.items()) or "no tenant"

    def _shred(self, component: Component, tenant: str) -> int:
        living = []
        last = ""
        while keys := self._store.keys(tenant, last, _AT_ONCE):
            last = keys[-1].id
            living += [key for key in keys if key.state is not State.DESTROYED]
        if not living:
            return 0
        detail = f"{component} drifted | {len(living)} keys, by the tenant's own choice"
        self._house.record("shred", subject=tenant, detail=detail)
        try:
            for key in living:
                versions = tuple(
                    replace(v, state=State.DESTROYED, generation=v.generation + 1, wrapped=b"")
                    for v in key.versions
                )
                self._store.put_key(
                    replace(key, state=after(key.state, Event.SHRED), alias=None, versions=versions)
                )
            self._store.commit()
        except HostdError:
            self._store.rollback()
            raise
        self._store.flush()
        return len(living)
