"""The ledger's checkpoints (`guestlib.attest.checkpoint`): the head that the TPM signed last, signed once
more with an Ed25519 key, in the form that witnesses and log tools read.

The key is derived from ROOT. While the keys are locked there is no new checkpoint; the head that the next
start holds the ledger against is kept all the same (`hostd.vault.heads`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from guestlib.attest.checkpoint import encode_checkpoint
from guestlib.attest.notekey import VerifierKey
from guestlib.attest.signedhead import SignedHead
from guestlib.errors import UnavailableError
from hostd.core.entry import LedgerError
from hostd.vault import primitives

if TYPE_CHECKING:
    from pathlib import Path

    from hostd.vault.heads import Head
    from hostd.vault.keyring import Keyring


class Checkpoints:
    """Makes checkpoints, and keeps the latest in a file."""

    def __init__(self, path: Path, keyring: Keyring, *, store_id: bytes, ak_public: bytes) -> None:
        self._path = path
        self._keyring = keyring
        self._ak_public = ak_public
        self.origin = f"hostd-ledger/{store_id.hex()}"

    def key(self) -> VerifierKey:
        """What verifies them. Raises: UnavailableError, the keys are locked."""
        return VerifierKey(self.origin, primitives.ed25519_public(self._keyring.checkpoint_key()))

    def note(self, head: Head | None) -> bytes:
        """The checkpoint of a head.

        Raises:
            UnavailableError: the keys are locked, or no head of an entry was signed yet.
        """
        if head is None or not head.size:
            raise UnavailableError("no head of the ledger has been signed yet: the first batch does")
        private = self._keyring.checkpoint_key()
        signed = SignedHead(
            size=head.size,
            root=head.root,
            passed=head.passed,
            evidence=head.evidence_digest,
            attest=head.attest,
            signature=head.signature,
            pcrs={int(index): value for index, value in head.pcrs.items()},
        )
        public = primitives.ed25519_public(private)
        return encode_checkpoint(self.origin, signed, self._ak_public, public, private.sign)

    def save(self, head: Head) -> None:
        """Puts the checkpoint of a head that was just saved into the file, whole or not at all. It is not
        waited for: after a power cut the file may be older than the head.

        Raises:
            LedgerError: it could not be written.
        """
        try:
            note = self.note(head)
        except UnavailableError:
            return
        new = self._path.with_suffix(".new")
        try:
            new.write_bytes(note)
            os.replace(new, self._path)
        except OSError as error:
            raise LedgerError(f"{self._path}: {error.strerror}") from error
