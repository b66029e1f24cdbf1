"""The officers who sign manifests: fixed at the first unsealing, and asked for every document.

The set (keys and quorum) is stored under the root key when the store is new. Later a configuration that names
others opens nothing: whoever can write the configuration cannot make himself an officer. Names are labels
and may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.attest.sshsig import verify_quorum
from guestlib.errors import UnavailableError
from hostd.core.reference import NAMESPACE

if TYPE_CHECKING:
    from hostd.config import Officers
    from hostd.vault.keyring import Keyring
    from hostd.vault.store import Store

_META: Final = "officers"


class OfficersError(Exception):
    """The officers are not those that were recorded; the text says which way."""


class Recorded(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the store keeps."""

    quorum: int
    keys: tuple[bytes, ...]
    """Wire encodings, sorted."""


class Council:
    """The officers in force. Before `confirm` they are only what the configuration says."""

    def __init__(self, officers: Officers) -> None:
        self._keys = officers.public_keys
        self._quorum = officers.quorum
        self._confirmed = False

    def confirm(self, store: Store, keyring: Keyring, *, first: bool) -> bool:
        """Compares with the record; makes it (not yet committed) if this is the store's `first` unsealing.
        True if it was made.

        Raises:
            OfficersError: the record names others, or is missing.
            primitives.IntegrityError: it was altered.
        """
        here = Recorded(self._quorum, tuple(sorted(key.blob for key in self._keys)))
        wrapped = store.meta(_META)
        if wrapped is None:
            if not first:
                raise OfficersError("the record of the officers is missing from the store")
            store.set_meta(_META, keyring.wrap_service_key(_META, msgspec.msgpack.encode(here)))
            self._confirmed = True
            return True
        there = msgspec.msgpack.decode(keyring.unwrap_service_key(_META, wrapped), type=Recorded)
        if there != here:
            raise OfficersError(self._differences(there, here))
        self._confirmed = True
        return False

    def _differences(self, there: Recorded, here: Recorded) -> str:
        names = {key.blob: f"{key.name} ({key.fingerprint})" for key in self._keys}
        more = [names[blob] for blob in here.keys if blob not in there.keys]
        gone = len(set(there.keys) - set(here.keys))
        parts = []
        if more:
            parts.append(f"{', '.join(more)} was none of them")
        if gone:
            parts.append(f"{gone} of the recorded are missing")
        if there.quorum != here.quorum:
            parts.append(f"{there.quorum} had to sign, not {here.quorum}")
        text = "the configuration names other officers than were recorded at the first unsealing: "
        return text + "; ".join(parts)

    def verify(self, document: bytes, signatures: bytes) -> tuple[str, ...]:
        """Names of the officers who signed, sorted.

        Raises:
            UnavailableError: the record was not compared yet.
            DeniedError, MalformedError: as `verify_quorum`.
        """
        if not self._confirmed:
            raise UnavailableError("the keys were not unsealed yet: the officers are not known")
        return verify_quorum(
            signatures, document, namespace=NAMESPACE, officers=self._keys, quorum=self._quorum
        )

    def describe(self) -> str:
        """Who they are, for the ledger."""
        named = ", ".join(f"{key.name} {key.fingerprint}" for key in self._keys)
        return f"{self._quorum} of {len(self._keys)}: {named}"
