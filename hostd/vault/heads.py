"""The last signed head of the ledger, kept beside it: what the next start holds the ledger against.

After a batch's quote the vault saves (at most once in `SAVE_S`, and when it stops) the tree head and the
TPM's signature over it. On opening, the head's signature must be this host's AK's, and the ledger must
still lead to it (`hostd.vault.ledger`): whoever edits, drops or reorders entries while hostd is down is
found out.
Putting back an older ledger together with its older head is rollback, which this does not see.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from guestlib.attest.binding import pass_qualifying
from guestlib.attest.quote import attestation_key, verify_quote
from guestlib.attest.tpm2 import parse_public
from guestlib.errors import MalformedError, VerificationError
from hostd.core.entry import LedgerError
from hostd.core.merkle import EMPTY_ROOT
from hostd.platform.tpm_files import write_file
from hostd.vault.opening import Signed
from hostd.vault.tpmlink import Quoted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hostd.platform.tpm import Tpm

SAVE_S: Final = 1.0
MAX_HEAD_BYTES: Final = 16 << 10
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tree head and the quote whose qualifying data it is in (base64 in JSON)."""

    format: Literal["hostd-head/1"]
    size: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    root: Digest
    passed: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    evidence_digest: Digest
    attest: Annotated[bytes, msgspec.Meta(max_length=1024)]
    signature: Annotated[bytes, msgspec.Meta(max_length=1024)]
    pcrs: dict[str, Digest]


def first_head(tpm: Tpm, path: Path, selection: tuple[int, ...]) -> None:
    """Signs the head of the empty ledger, so that from the very first start a missing head is a finding.

    Raises:
        TpmError: the TPM did not sign.
        OSError: it could not be written.
    """
    nothing = bytes(32)
    qualifying = pass_qualifying(0, nothing, 0, EMPTY_ROOT)
    quoted = Quoted(*tpm.quote_with_pcrs(qualifying, selection))
    heads = Heads(path)
    heads.note(size=0, root=EMPTY_ROOT, passed=0, evidence_digest=nothing, quoted=quoted)
    heads.save()


class Heads:
    """Saves heads; `load` is for the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._head: Head | None = None
        """To be saved."""
        self.latest: Head | None = None
        """The head that was signed last, this run or before."""
        self._saved = 0.0
        self.saved: Callable[[Head], None] = lambda head: None
        """Told of each head that was saved (the checkpoint is written with it)."""

    def load(self, ak_public: bytes) -> Signed:
        """The saved head, which the ledger is held against when it opens.

        Raises:
            LedgerError: it does not read, or is not this host's.
        """
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_HEAD_BYTES + 1)
        except FileNotFoundError as error:
            raise LedgerError(f"{self._path}: the signed head is missing (set-up makes the first)") from error
        except OSError as error:
            raise LedgerError(f"{self._path}: {error.strerror}") from error
        try:
            head = msgspec.json.decode(data, type=Head)
            pcrs = {int(index): value for index, value in head.pcrs.items()}
            qualifying = pass_qualifying(head.passed, head.evidence_digest, head.size, head.root)
            verify_quote(
                attestation_key(parse_public(ak_public)), head.attest, head.signature, qualifying, pcrs
            )
        except (ValueError, RecursionError, MalformedError, VerificationError) as error:
            raise LedgerError(f"{self._path}: not a head that this host's TPM signed: {error}") from error
        self.latest = head
        return Signed(head.size, head.root)

    def note(self, *, size: int, root: bytes, passed: int, evidence_digest: bytes, quoted: Quoted) -> Head:
        """Takes a head that was just quoted, and gives it; saved when the last save is old enough.

        Raises:
            LedgerError: it could not be saved.
        """
        self._head = self.latest = head = Head(
            format="hostd-head/1",
            size=size,
            root=root,
            passed=passed,
            evidence_digest=evidence_digest,
            attest=quoted.quote.attest,
            signature=quoted.quote.signature,
            pcrs={str(index): value for index, value in quoted.pcrs.items()},
        )
        if time.monotonic() - self._saved >= SAVE_S:
            self.save()
        return head

    def save(self) -> None:
        """Writes the latest head, whole or not at all."""
        head, self._head = self._head, None
        if head is None:
            return
        self._saved = time.monotonic()
        try:
            write_file(self._path, msgspec.json.encode(head))
        except OSError as error:
            raise LedgerError(f"{self._path}: {os.strerror(error.errno or 0)}") from error
        self.saved(head)
