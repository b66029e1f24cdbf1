"""What receipts cost: to make, to verify, and what the ledger's commitments add to every request.

A ledger of 100,000 entries with a real embedded TPM, without a gate: times of the functions
alone. What a whole hostd answers with none, references and full receipts is in `tests.bench.gate`.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guestlib.attest.canonical import commitment
from guestlib.attest.receipt import verify_receipt
from hostd.ipc import operations as ops
from hostd.ipc.canonical import answer_bytes, request_bytes
from tests.bench.report import median
from tests.support.receipts import Exchange, House, embedded_tpm

if TYPE_CHECKING:
    from tests.bench.report import Report

ENTRIES = 100_000
BATCH = 250
ROUNDS = 11


def _us(work: Callable[[], Any], times: int) -> list[float]:
    """Microseconds of one call, of so many in a row, each round."""
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - began) / times * 1e6)
    return found


def measure(report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="hostd-bench-") as name, embedded_tpm(Path(name)) as tpm:
        house = House(Path(name), tpm)
        for _ in range(ENTRIES // (BATCH + 1)):
            house.record(*[Exchange()] * BATCH)
        try:
            _measure(report, house)
        finally:
            house.close()


def _measure(report: Report, house: House) -> None:
    result = ops.EncryptResult(b"y" * 312, "key-" + "7" * 32, 1)
    one = Exchange(operation=ops.Encrypt("alias/db", b"x" * 256), result=result)
    entries = house.batch(*[one] * BATCH)
    note = f"Encrypt 256 B, a ledger of {house.ledger.size} entries, swtpm, median"

    def commitments() -> None:
        salt = house.keyring.salt("red", entries[0])
        commitment(salt, request_bytes(one.operation))
        commitment(salt, answer_bytes(one.result))

    report.add(
        "receipt.commitments_us", median(_us(commitments, 2000)), "us", samples=ROUNDS,
        note=f"on every request, whatever it wants: salt, canonical request and answer, two hashes; {note}",
    )  # fmt: skip
    head = house.heads.latest
    assert head is not None

    def batch() -> None:
        # An equal head, but another: nothing is kept from the round before.
        fresh = copy.copy(head)
        for seq in entries:
            house.receipts.document(seq, fresh)

    made = [us / BATCH for us in _us(batch, 1)]
    report.add(
        "receipt.make_us", median(made), "us", samples=ROUNDS * BATCH,
        note=f"full, with the answers of a batch of {BATCH} that all want theirs; {note}",
    )  # fmt: skip
    document = house.document(entries[7])
    report.add("receipt.bytes", len(document), "bytes", samples=1, note=f"full; {note}")
    bundle = house.bundle()

    def verify() -> None:
        verify_receipt(document, bundle=bundle, request=one.request, answer=one.answer)

    report.add(
        "receipt.verify_us", median(_us(verify, 100)), "us", samples=ROUNDS * 100,
        note=f"all ten steps; the ECDSA signature alone is a third to a half; {note}",
    )  # fmt: skip
