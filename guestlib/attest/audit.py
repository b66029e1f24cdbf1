"""A tenant's own part of the ledger, page by page: each entry is in the tree that the TPM signed.

What it proves: these entries are in the ledger, as they are, under that head. What it does not: that
no other entry of the tenant is left out of the page. Whoever keeps receipts finds their entries here.
"""

from __future__ import annotations

import enum
import hmac
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guestlib.attest.canonical import canonical
from guestlib.attest.ledgerentry import LedgerEntry, no_duplicates, parse_entry
from guestlib.attest.merkle import leaf_hash, root_of
from guestlib.attest.signedhead import SignedHead, head_of, verify_head
from guestlib.errors import MalformedError, VerificationError

if TYPE_CHECKING:
    from guestlib.attest.bundle import TrustBundle
    from guestlib.wire.messages import AuditLine


class AuditStep(enum.StrEnum):
    """Numbered as in docs/receipts.md; append-only."""

    FORM = "1 form"
    HEAD = "2 head"
    """The TPM of the bundle's key signed the head, with accepted PCR values."""
    ENTRY = "3 entry"
    """Each line is an entry in its place."""
    INCLUSION = "4 inclusion"
    """Each entry is in the tree of the head."""


@dataclass(frozen=True, slots=True)
class AuditedEntry:
    """An entry that is in the signed ledger: made by `verify_page` only."""

    entry: LedgerEntry
    withheld: bool
    """The host says that a later entry names it as withheld: its answer never left."""


def parse_head(data: bytes) -> SignedHead:
    """Parses the head of a page, in canonical form.

    Raises:
        MalformedError: it is not one.
    """
    try:
        head = head_of(json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates))
        if canonical(head.fields) != data:
            raise ValueError("not in canonical form")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise MalformedError(f"signed head: {error}") from error
    return head


def verify_page(
    head: bytes, lines: tuple[AuditLine, ...], *, bundle: TrustBundle
) -> tuple[SignedHead, tuple[AuditedEntry, ...]]:
    """Verifies one page of the audit log.

    Raises:
        VerificationError: `step` and the text say what does not hold.
    """
    try:
        signed = parse_head(head)
    except MalformedError as error:
        raise VerificationError(AuditStep.FORM, error.message) from error
    try:
        verify_head(signed, bundle)
    except VerificationError as error:
        raise VerificationError(AuditStep.HEAD, error.message) from error
    return signed, tuple(_verified(line, signed) for line in lines)


def _verified(line: AuditLine, head: SignedHead) -> AuditedEntry:
    try:
        body = line.line.encode()
        entry = parse_entry(body)
    except (MalformedError, UnicodeEncodeError) as error:
        raise VerificationError(AuditStep.ENTRY, f"entry {line.index}: {error}") from error
    if entry.seq != line.index:
        raise VerificationError(AuditStep.ENTRY, f"entry {entry.seq} at place {line.index}")
    try:
        root = root_of(leaf_hash(body), line.index, head.size, line.proof)
    except ValueError as error:
        raise VerificationError(AuditStep.INCLUSION, f"entry {line.index}: {error}") from error
    if not hmac.compare_digest(root, head.root):
        raise VerificationError(AuditStep.INCLUSION, f"entry {line.index}: the proof leads to another root")
    return AuditedEntry(entry, line.withheld)
