"""The receipt `hostd-receipt/1`: that one answer was recorded under one measurement, provable offline.

    {"entry": {"index": 42, "line": "…", "proof": [base64, …]},   the ledger entry of the answer
     "format": "hostd-receipt/1",
     "head": {…},                                                 a quoted head (`signedhead`)
     "pass": {"index": 40, "line": "…", "proof": [base64, …]},    the pass that the entry rests on
     "salt": base64}                                              opens the entry's commitments, 16 bytes

in canonical form (`canonical`): what does not re-encode to itself is refused. `verify_receipt` does the
steps of `ReceiptStep`, in this order; every error carries its step. Pure: the document, the bundle, the
request and the answer come in as arguments. Needs `cryptography`, no TSS.

What it proves: the TPM of the bundle's key, with the PCRs in an accepted state, signed a ledger that holds
this entry, made in the batch of this pass. What it does not: what the evidence digest stands for (compare
it with evidence), nor that nothing else was done (only the host's whole ledger shows that).
"""

from __future__ import annotations

import enum
import hmac
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from guestlib.attest.canonical import SALT_BYTES, canonical, commitment
from guestlib.attest.ledgerentry import LedgerEntry, count, no_duplicates, parse_entry, text, unbase64
from guestlib.attest.merkle import HASH_BYTES, MAX_PROOF, leaf_hash, root_of
from guestlib.attest.signedhead import SignedHead, head_of, verify_head
from guestlib.attest.steps import Step
from guestlib.errors import MalformedError, VerificationError

if TYPE_CHECKING:
    from guestlib.attest.bundle import TrustBundle

FORMAT: Final = "hostd-receipt/1"
MAX_RECEIPT_BYTES: Final = 128 << 10
"""Two entries of at most 32 KiB as JSON strings, their proofs, and a quote."""


class ReceiptStep(enum.StrEnum):
    """Numbered as in docs/receipts.md; append-only."""

    FORM = "1 form"
    """The document is a receipt in its one canonical form."""
    ENTRY = "2 entry"
    """The line is the ledger entry of a request, in its place."""
    INCLUSION = "3 inclusion"
    """That entry is in the tree of the head."""
    BATCH = "4 pass entry"
    """The other line is the pass that this entry's batch began with."""
    BATCH_INCLUSION = "5 pass inclusion"
    """So is that entry."""
    SIGNATURE = "6 quote signature"
    """An attestation key that the bundle pins signed the quote."""
    QUALIFYING = "7 qualifying data"
    """The quote is over this head: pass, evidence, size and root."""
    PCRS = "8 pcr values"
    """The PCR values shown are the signed ones, and those the bundle names are accepted."""
    REQUEST = "9 request"
    """The entry commits to this request."""
    ANSWER = "10 answer"
    """The entry commits to this answer."""


_OF_QUOTE: Final = {
    Step.KEY: ReceiptStep.SIGNATURE,
    Step.SIGNATURE: ReceiptStep.SIGNATURE,
    Step.QUALIFYING: ReceiptStep.QUALIFYING,
    Step.DIGEST: ReceiptStep.PCRS,
    Step.PCRS: ReceiptStep.PCRS,
}


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the ledger, where it stands, and its way to the root."""

    index: int
    line: bytes
    proof: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A receipt, parsed and **not** verified."""

    entry: Place
    passed: Place
    head: SignedHead
    salt: bytes


@dataclass(frozen=True, slots=True)
class VerifiedReceipt:
    """A receipt that holds: made by `verify_receipt` only."""

    entry: LedgerEntry
    passed: LedgerEntry
    head: SignedHead
    own_quote: bool
    """The quote is the one of the entry's own batch; else of a later one."""
    checked: tuple[ReceiptStep, ...]
    """The steps that were done: all but `REQUEST` or `ANSWER` where it was not at hand."""


def parse_document(data: bytes) -> Document:
    """Parses a receipt of at most 128 KiB.

    Raises:
        MalformedError: it is not one, or not in canonical form.
    """
    if len(data) > MAX_RECEIPT_BYTES:
        raise MalformedError(f"receipt: over {MAX_RECEIPT_BYTES} bytes")
    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT} document")
        document = Document(
            entry=_place(fields["entry"]),
            passed=_place(fields["pass"]),
            head=head_of(fields["head"]),
            salt=unbase64(fields["salt"], SALT_BYTES),
        )
        if len(document.salt) != SALT_BYTES:
            raise ValueError(f"the salt is not {SALT_BYTES} bytes")
        if encode_document(document) != data:
            raise ValueError("not in canonical form")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise MalformedError(f"receipt: {error}") from error
    return document


def _place(fields: Any) -> Place:
    if not isinstance(fields, dict) or not isinstance(fields["proof"], list):
        raise TypeError("an object is missing")
    if len(fields["proof"]) > MAX_PROOF:
        raise ValueError(f"a proof of over {MAX_PROOF} hashes")
    proof = tuple(unbase64(item, HASH_BYTES) for item in fields["proof"])
    return Place(count(fields["index"]), text(fields["line"]).encode(), proof)


def encode_document(document: Document) -> bytes:
    """The canonical bytes."""

    def place(one: Place) -> dict[str, Any]:
        return {"index": one.index, "line": one.line.decode(), "proof": list(one.proof)}

    return canonical(
        {
            "entry": place(document.entry),
            "format": FORMAT,
            "head": document.head.fields,
            "pass": place(document.passed),
            "salt": document.salt,
        }
    )


def verify_receipt(
    data: bytes, *, bundle: TrustBundle, request: bytes | None, answer: bytes | None
) -> VerifiedReceipt:
    """Verifies a receipt.

    `request` and `answer` are the canonical bytes of the exchange (`canonical`); None is for one that is
    not at hand, and its step is then not among those `checked`.

    Raises:
        VerificationError: `step` and the text say what does not hold.
    """
    try:
        document = parse_document(data)
    except MalformedError as error:
        raise VerificationError(ReceiptStep.FORM, error.message) from error
    checked = list(ReceiptStep)
    head = document.head
    entry = _entry(document.entry, ReceiptStep.ENTRY)
    if entry.event != "operation" or not entry.request or bool(entry.response) != (not entry.code):
        raise VerificationError(ReceiptStep.ENTRY, "the entry is not of a request that was executed")
    _included(document.entry, head, ReceiptStep.INCLUSION)
    passed = _entry(document.passed, ReceiptStep.BATCH)
    _verify_pass(entry, passed)
    _included(document.passed, head, ReceiptStep.BATCH_INCLUSION)
    own = _verify_quote(head, passed, bundle)
    for step, commits_to, body in (
        (ReceiptStep.REQUEST, entry.request, request),
        (ReceiptStep.ANSWER, entry.response, answer),
    ):
        if body is None:
            checked.remove(step)
        elif not hmac.compare_digest(commitment(document.salt, body), commits_to):
            raise VerificationError(step, "the entry does not commit to it")
    return VerifiedReceipt(entry, passed, head, own, tuple(checked))


def _entry(place: Place, step: ReceiptStep) -> LedgerEntry:
    try:
        entry = parse_entry(place.line)
    except MalformedError as error:
        raise VerificationError(step, error.message) from error
    if entry.seq != place.index:
        raise VerificationError(step, f"entry {entry.seq} at place {place.index}")
    return entry


def _included(place: Place, head: SignedHead, step: ReceiptStep) -> None:
    try:
        root = root_of(leaf_hash(place.line), place.index, head.size, place.proof)
    except ValueError as error:
        raise VerificationError(step, str(error)) from error
    if not hmac.compare_digest(root, head.root):
        raise VerificationError(step, "the proof leads to another root")


def _verify_pass(entry: LedgerEntry, passed: LedgerEntry) -> None:
    if passed.event != "pass" or not passed.evidence:
        raise VerificationError(ReceiptStep.BATCH, "the entry is not a pass")
    if entry.pass_entry != passed.seq or entry.passed != passed.passed:
        raise VerificationError(ReceiptStep.BATCH, "the entry rests on another pass")
    if not passed.seq < entry.seq <= passed.seq + passed.requests:
        raise VerificationError(ReceiptStep.BATCH, "the entry is not of this pass's batch")


def _verify_quote(head: SignedHead, passed: LedgerEntry, bundle: TrustBundle) -> bool:
    """Whether the quote is that of the pass's own batch."""
    try:
        verify_head(head, bundle)
    except VerificationError as error:
        reason = error.message.removeprefix(f"{error.step}: ")
        raise VerificationError(_OF_QUOTE[Step(error.step)], reason) from error
    own = head.size == passed.seq + 1 + passed.requests
    if own and (head.passed != passed.passed or head.evidence != passed.evidence):
        raise VerificationError(ReceiptStep.QUALIFYING, "the quote names another pass than the entry")
    return own
