"""`hostd-guest receipt get | verify | list`, and what `--receipt FILE` saves (docs/receipts.md)."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from guestlib.attest.bundle import MAX_BUNDLE_BYTES, parse_bundle
from guestlib.errors import HostdError, MalformedError, NotFoundError, VerificationError
from guestlib.wire.messages import Receipt, Result

if TYPE_CHECKING:
    import argparse

    from guestlib.attest.bundle import TrustBundle
    from guestlib.attest.ledgerentry import LedgerEntry
    from guestlib.client import Client

MAX_FILE_BYTES: Final = 1 << 20
"""A receipt is at most 128 KiB; a request and an answer each fit a frame."""
GET_HINTS: Final[dict[type[HostdError], str]] = {
    NotFoundError: "`hostd-guest receipt list` shows this tenant's entries; only an answered request has"
    " a receipt, and it may have to wait for the TPM's next quote"
}
VERIFY_HINTS: Final[dict[type[HostdError], str]] = {
    VerificationError: "rely on nothing in it; at steps 9 and 10 look whether request and answer are those of"
    " this receipt (the steps are in docs/receipts.md)"
}


def add_commands(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Adds `receipt` and its parts."""
    receipt = commands.add_parser("receipt", help="what the ledger says of this tenant's requests")
    parts = receipt.add_subparsers(required=True, metavar="COMMAND", parser_class=parser_class)
    get = parts.add_parser("get", help="fetch the receipt of an earlier answer, by its ledger entry")
    get.set_defaults(run=get_receipt, offline=False, hints=GET_HINTS)
    get.add_argument("entry", type=int, metavar="ENTRY")
    get.add_argument("-o", "--out", default="-", metavar="FILE", help="default: standard output")
    verify = parts.add_parser("verify", help="verify a receipt step by step, without a connection")
    verify.set_defaults(run=verify_file, offline=True, hints=VERIFY_HINTS)
    verify.add_argument("receipt_file", metavar="RECEIPT")
    verify.add_argument("--request", metavar="FILE", help='what was asked: JSON, {"op": …, "args": …}')
    verify.add_argument("--answer", metavar="FILE", help="what was answered: JSON, the ok object")
    listing = parts.add_parser("list", help="this tenant's entries, each proved against the signed head")
    listing.set_defaults(run=list_entries, offline=False)
    listing.add_argument("--after", type=int, metavar="ENTRY", help="only what comes after this entry")


def save(name: str, result: Any) -> None:
    """Writes a result's receipt to `name`, its request and answer beside it, for this user's eyes only.
    Where the host reads PCRs (`gate.tpm`) the receipt itself is fetched later: a note says how.

    Raises:
        ValueError: there is none, or it cannot be written.
    """
    receipt = result.receipt if isinstance(result, Result) else None
    if receipt is None:
        raise ValueError("this command has no receipt")
    _write(f"{name}.request", receipt.request or b"")
    _write(f"{name}.answer", receipt.answer or b"")
    if receipt.document is None:
        later = f"`hostd-guest receipt get {receipt.ledger} -o {name}`"
        print(f"note: no quote covers the answer yet; its receipt comes later: {later}", file=sys.stderr)
    else:
        _write(name, receipt.document)


def _write(name: str, data: bytes) -> None:
    try:
        with open(name, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                os.fchmod(file.fileno(), 0o600)  # it may have been there, for others to read
            file.write(data)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error


def _read(name: str, limit: int = MAX_FILE_BYTES) -> bytes:
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    if len(data) > limit:
        raise ValueError(f"{name}: over {limit} bytes")
    return data


def _bundle(options: argparse.Namespace) -> TrustBundle:
    try:
        return parse_bundle(_read(options.trust, MAX_BUNDLE_BYTES))
    except MalformedError as error:
        raise ValueError(f"{options.trust}: {error.message}") from None


def get_receipt(client: Client, options: argparse.Namespace) -> None:
    document = client.redeem(Receipt(options.entry, 0)).document
    assert document is not None
    if options.out == "-":
        print(document.decode())
    else:
        _write(options.out, document)


def verify_file(options: argparse.Namespace) -> None:
    """Prints each step that was done; the one that does not hold is the error."""
    from guestlib.attest.receipt import ReceiptStep, verify_receipt

    document = _read(options.receipt_file).rstrip(b"\n")
    request, answer = _request(options.request), _answer(options.answer)
    try:
        verified = verify_receipt(document, bundle=_bundle(options), request=request, answer=answer)
    except VerificationError as error:
        for step in ReceiptStep:
            if step == error.step:
                break
            _tell(options, f"ok        {step}")
        _tell(options, f"REFUSED   {error.step}")
        raise
    if options.json:
        fields = {"checked": [*verified.checked], "own_quote": verified.own_quote}
        print(json.dumps(fields | {"entry": _fields(verified.entry), "pass": _fields(verified.passed)}))
        return
    for step in ReceiptStep:
        print(f"{'ok       ' if step in verified.checked else 'not given'} {step}")
    print(_line(verified.entry, withheld=False))


def _tell(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        print(text, flush=True)


def _request(name: str | None) -> bytes | None:
    from guestlib.attest.canonical import canonical_request

    if name is None:
        return None
    fields = _json(name)
    if not isinstance(fields, dict) or not isinstance(fields.get("args", {}), dict):
        raise ValueError(f"{name}: not a request")
    operation = fields.get("op")
    if not isinstance(operation, str):
        raise ValueError(f"{name}: it names no operation (op)")
    try:
        return canonical_request(operation, fields.get("args", {}))
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{name}: not a request") from None


def _answer(name: str | None) -> bytes | None:
    from guestlib.attest.canonical import canonical

    if name is None:
        return None
    try:
        return canonical(_json(name))
    except (TypeError, UnicodeEncodeError):
        raise ValueError(f"{name}: not an answer") from None


def _json(name: str) -> Any:
    from guestlib.attest.ledgerentry import no_duplicates

    try:
        return json.loads(_read(name).decode(), object_pairs_hook=no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from None


def list_entries(client: Client, options: argparse.Namespace) -> None:
    """Verified page by page before anything of it is shown."""
    from guestlib.attest.audit import verify_page

    bundle = _bundle(options)
    for page in client.audit_log(options.after):
        _, found = verify_page(page.head, page.lines, bundle=bundle)
        for one in found:
            if options.json:
                print(json.dumps(_fields(one.entry) | {"withheld": one.withheld}))
            else:
                print(_line(one.entry, withheld=one.withheld))


def _fields(entry: LedgerEntry) -> dict[str, Any]:
    fields = dataclasses.asdict(entry)
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}


def _line(entry: LedgerEntry, *, withheld: bool) -> str:
    when = datetime.datetime.fromtimestamp(min(entry.time, 10**14) / 1000, datetime.UTC)
    outcome = "withheld" if withheld else entry.outcome + (f" ({entry.code})" if entry.code else "")
    about = [entry.op or entry.event, outcome, entry.principal, entry.key, f"pass {entry.passed}"]
    text = "  ".join(part for part in about if part)
    # What a host writes is not sent to the terminal as it is.
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"{entry.seq:>8}  {when:%Y-%m-%d %H:%M:%S}  {shown}"
