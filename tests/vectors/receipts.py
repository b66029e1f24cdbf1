"""`python -m tests.vectors.receipts`: makes tests/vectors/receipt-*.json anew, with a real embedded TPM.

The files are for whoever implements the verification of docs/receipts.md: each has a trust bundle and
cases, good ones with the steps that are done and false ones with the step that refuses them. A new run
makes other files (other keys, other quotes) that say the same.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from guestlib.attest.bundle import encode_bundle
from guestlib.attest.receipt import Document, ReceiptStep, encode_document, parse_document, verify_receipt
from guestlib.errors import DeniedError, VerificationError
from hostd.ipc import operations as ops
from hostd.ipc.many_operations import EncryptItem, EncryptMany, EncryptManyResult
from tests.support.receipts import BLUE, Exchange, House, embedded_tpm, exchanges

HERE = Path(__file__).parent
MANY = Exchange(
    operation=EncryptMany("alias/db", (EncryptItem(b"one"), EncryptItem(b"two", {"row": "2"}))),
    result=EncryptManyResult((b"HDC1 one", b"HDC1 two"), "key-" + 32 * "7", 2),
)
TEXTS = Exchange(
    operation=ops.Encrypt("alias/db", b"\xff", {"\u00e9": '\u2028\t\x01"\\/', "a": "\U0001f511"}),
)
FALSE: dict[str, Callable[[Document, Document], Document]] = {
    "entry and pass swapped": lambda d, o: replace(d, entry=d.passed, passed=d.entry),
    "another place": lambda d, o: replace(d, entry=replace(d.entry, index=d.entry.index + 1)),
    "a byte of the entry": lambda d, o: _line(d, b'"outcome":"released"', b'"outcome":"Released"'),
    "another proof": lambda d, o: replace(d, entry=replace(d.entry, proof=o.entry.proof)),
    "another root": lambda d, o: replace(d, head=replace(d.head, root=bytes(32))),
    "another pass": lambda d, o: replace(d, passed=o.passed),
    "a byte of the pass": lambda d, o: replace(
        d, passed=replace(d.passed, line=d.passed.line.replace(b'"outcome":"done"', b'"outcome":"Done"'))
    ),
    "another signature": lambda d, o: replace(d, head=replace(d.head, signature=o.head.signature)),
    "other evidence": lambda d, o: replace(d, head=replace(d.head, evidence=bytes(32))),
    "another PCR value": lambda d, o: replace(d, head=replace(d.head, pcrs={**d.head.pcrs, 0: b"x" * 32})),
    "another salt": lambda d, o: replace(d, salt=bytes(16)),
}


def _line(document: Document, old: bytes, new: bytes) -> Document:
    return replace(document, entry=replace(document.entry, line=document.entry.line.replace(old, new)))


def make() -> dict[str, Any]:
    """File name → content."""
    with tempfile.TemporaryDirectory(prefix="hostd-vectors-") as name, embedded_tpm(Path(name)) as tpm:
        house = House(Path(name), tpm)
        try:
            return _made(house)
        finally:
            house.close()


def _made(house: House) -> dict[str, Any]:
    refusal = Exchange(error=DeniedError("no"))
    batch = [Exchange(), MANY, TEXTS, Exchange(BLUE), refusal, *exchanges(6)]
    alone = house.batch(Exchange())[0]
    first = house.document(alone)
    entries = house.batch(*batch)
    own = [house.document(seq) for seq in entries[:3]]
    of_refusal = house.document(entries[4])
    for _ in range(3):
        house.batch(*exchanges(5))
    later = house.document(entries[0])
    other = parse_document(house.document(house.batch(*exchanges(2))[1]))
    good = [
        _case(house, "a batch of one, the first of all", first, Exchange()),
        _case(house, "under the quote of its own batch", own[0], batch[0]),
        _case(house, "a batch operation", own[1], MANY),
        _case(house, "text that JSON escapes, and text that it does not", own[2], TEXTS),
        _case(house, "under a later quote", later, batch[0]),
        _case(house, "a refusal, which has no answer", of_refusal, refusal, answer=False),
        _case(house, "the answer is not at hand", own[0], batch[0], answer=False),
    ]
    false = [
        _case(house, what, encode_document(falsify(parse_document(later), other)), batch[0])
        for what, falsify in FALSE.items()
    ]
    false += [
        _case(house, "not in canonical form", later.replace(b'"format":', b'"format": '), batch[0]),
        _case(house, "another request", own[0], replace(batch[0], operation=MANY.operation)),
        _case(house, "the answer to another request", own[0], replace(batch[0], result=MANY.result)),
    ]
    with tempfile.TemporaryDirectory(prefix="hostd-vectors-") as name, embedded_tpm(Path(name)) as stranger:
        pinned = replace(house.bundle(), aks=(stranger.record.ak_public,))
    strange = _case(house, "the key of another TPM", own[0], batch[0], bundle=pinned)
    return {
        "receipt-good.json": _file(house.bundle(), good),
        "receipt-false.json": _file(house.bundle(), false),
        "receipt-stranger.json": _file(pinned, [strange]),
    }


def _file(bundle: Any, cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {"bundle": json.loads(encode_bundle(bundle)), "cases": cases}


def _case(
    house: House, what: str, document: bytes, exchange: Exchange, *, answer: bool = True, bundle: Any = None
) -> dict[str, Any]:
    request, said = exchange.request, exchange.answer if answer else None
    case: dict[str, Any] = {
        "what": what,
        "document": document.decode(),
        "request": request.decode(),
        "answer": None if said is None else said.decode(),
    }
    try:
        done = verify_receipt(document, bundle=bundle or house.bundle(), request=request, answer=said)
    except VerificationError as error:
        return case | {"refused": str(ReceiptStep(error.step))}
    opened = {"salt": base64.b64encode(parse_document(document).salt).decode(), "op": done.entry.op}
    return case | {"steps": [str(step) for step in done.checked], **opened}


def main() -> None:
    for name, content in make().items():
        (HERE / name).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
