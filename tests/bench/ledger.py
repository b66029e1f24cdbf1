"""What the ledger costs: appending, proving, verifying, opening; a million entries as the gate writes them.

`python -m tests.bench.ledger [ENTRIES]` measures it alone. It needs some 600 MB in the temporary directory.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from guestlib.attest.bundle import TrustBundle
from hostd.admin import ledger_read
from hostd.core.ledgercheck import fault_of
from hostd.vault.ledger import Entry, Ledger, Signed
from tests.bench.report import Report, median
from tests.support.ledgers import Desk

if TYPE_CHECKING:
    from collections.abc import Callable

ENTRIES = 1_047_000
"""A million, and the last segment, which opening reads, is nearly full."""
BATCH = 64
"""Requests of a batch, with one `pass` entry before them."""
ROUNDS = 5
PROOFS = 2000


def batch(first: int) -> list[Entry]:
    """A pass and its requests, as `hostd.vault.recording` makes them."""
    now = 1_760_000_000_000 + first
    entries = [
        Entry(
            first, now, "pass", "done", passed=first, evidence=bytes(32), first_start_ns=first,
            last_end_ns=first, readings=(first, first + 9), requests=BATCH,
        )
    ]  # fmt: skip
    for seq in range(first + 1, first + 1 + BATCH):
        entries.append(
            Entry(
                seq, now, "operation", "released", passed=first, tenant="acme", op="Encrypt", version=1,
                principal='VM::"4b5eae0c-9df4-4f3c-8a53-8a6a2d1f1c01"', key=f"key-{seq % 7:032x}",
                request=bytes(32), response=bytes(32), pass_entry=first,
            )
        )  # fmt: skip
    return entries


def ledger(report: Report, count: int = ENTRIES) -> None:
    """Rows of one ledger of at least `count` entries."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        desk = Desk(folder, entries=1 << 16)
        _append(report, desk.ledger, count)
        signed = desk.sign()
        desk.restart()
        _prove(report, desk.ledger)
        _verify(report, desk, folder)
        desk.close()
        _open(report, folder / "ledger.jsonl", signed)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _append(report: Report, made: Ledger, count: int) -> None:
    appended, synced = 0.0, []
    while made.size < count:
        entries = batch(made.size)
        began = time.perf_counter()
        for entry in entries:
            made.append(entry)
        between = time.perf_counter()
        made.sync()
        appended += between - began
        synced.append(time.perf_counter() - between)
    note = f"entry to leaf in memory, batches of {BATCH} + 1, mean"
    length = made.stored_bytes / made.size
    report.add(
        "ledger.append_us", appended / made.size * 1e6, "us", samples=made.size, note=note,
        entry_bytes=round(length),
    )  # fmt: skip
    note = "write, fdatasync, hashes, segments, of a batch, median (disk of the temporary directory)"
    report.add("ledger.sync_us", median(synced) * 1e6, "us", samples=len(synced), note=note)


def _prove(report: Report, made: Ledger) -> None:
    chance = random.Random(1)
    size = made.durable

    def each(draw: Callable[[], int]) -> float:
        return median([_timed(lambda: made.tree.inclusion(draw(), size)) for _ in range(PROOFS)]) * 1e6

    anywhere = each(lambda: chance.randrange(size))
    recent = each(lambda: size - 1 - chance.randrange(1024))
    note = f"inclusion proof in a ledger of {size} entries, median"
    report.add("ledger.prove_us", recent, "us", samples=PROOFS, note=f"{note}, one of the last 1024")
    report.add("ledger.prove_us.any", anywhere, "us", samples=PROOFS, note=f"{note}, anywhere")
    read = median([_timed(lambda: made.stretch(chance.randrange(size), 1)) for _ in range(PROOFS)]) * 1e6
    report.add(
        "ledger.read_us", read, "us", samples=PROOFS, note="one entry anywhere, compared with its leaf"
    )


def _verify(report: Report, desk: Desk, folder: Path) -> None:
    bundle: TrustBundle = desk.bundle
    size = desk.ledger.durable
    seconds = _timed(lambda: ledger_read.verify(folder, bundle))
    note = f"{size} entries, offline (`hostctl ledger verify --dir`)"
    report.add("ledger.verify_entries_per_s", size / seconds, "entries/s", samples=1, note=note)
    seconds = _timed(lambda: fault_of(desk.ledger.audit()))
    note = f"{size} entries, in the vault, slices one after the other"
    report.add("ledger.audit_entries_per_s", size / seconds, "entries/s", samples=1, note=note)


def _open(report: Report, path: Path, signed: Signed) -> None:
    """Each time in a process of its own: also what it holds."""
    seconds, kilobytes, bare = [], 0, 0
    for _ in range(ROUNDS):
        arguments = [str(path), str(signed.size), signed.root.hex()]
        command = [sys.executable, "-m", "tests.bench.ledger", "--open", *arguments]
        said = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, timeout=120
        ).stdout.split()
        seconds.append(float(said[0]))
        bare, kilobytes = int(said[1]), int(said[2])
    note = f"{signed.size} entries, held against the signed head; files in the page cache; median"
    report.add("ledger.open_s", median(seconds), "s", samples=ROUNDS, note=note)
    note = "resident memory, ledger open and every tile read once, beyond the bare process"
    report.add("ledger.open_mb", (kilobytes - bare) / 1024, "MB", samples=1, note=note)


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def _opened(path: Path, size: int, root: str) -> None:
    """The child: seconds, and resident memory before and after (KB)."""
    bare = _resident()
    began = time.perf_counter()
    made = Ledger(path, Signed(size, bytes.fromhex(root)))
    seconds = time.perf_counter() - began
    for index in range(0, size, 256):
        made.tree.leaf(index)
    print(seconds, bare, _resident())
    made.close()


def main() -> None:
    if sys.argv[1:2] == ["--open"]:
        _opened(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        return
    ledger(Report(), int(sys.argv[1]) if len(sys.argv) > 1 else ENTRIES)


if __name__ == "__main__":
    main()
