"""The ledger: every use of a key, every refusal and every deed of an officer, append-only.

JSON lines in segments (`hostd.platform.segments`); the entries are the leaves of a Merkle tree
(`hostd.vault.treefile`), whose head the TPM signs with every batch
(`guestlib.attest.binding.pass_qualifying`). An entry holds no secret and no data of the caller. `append`
adds in memory, `sync` makes it durable: no answer leaves between the two. A write that fails leaves the
ledger closed for good in this process: what is on the disk then is known only after reading it again.

A segment that is full is closed after a `sync`, and the next begins with a `rotate` entry that carries what
the next start needs. So opening reads the last segment only, and holds it, with the edge that it begins
with, against the head that was signed last. A last line without its newline was never acknowledged (the
power went during a write) and is cut off; anything else that does not read is refused, and left as it is.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.attest.merkle import leaf_hash
from hostd.core import ledgercheck
from hostd.core.entry import MAX_ENTRY_BYTES, ArchivedError, Entry, LedgerError, Rotation
from hostd.core.merkle import Frontier
from hostd.platform.durable import sync_folder
from hostd.platform.segments import (
    CHUNK,
    Offsets,
    Segment,
    Segments,
    chunks,
    closed_name,
    number_of,
    write_all,
)
from hostd.vault.lines import BLOCK, Lines
from hostd.vault.opening import NOTED, NOTHING_SIGNED, Last, Notes, Reading, Signed, last_segment
from hostd.vault.treefile import TreeFile

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

__all__ = ["MAX_ENTRY_BYTES", "NOTHING_SIGNED", "ArchivedError", "Entry", "Ledger", "LedgerError", "Signed"]

SEGMENT_ENTRIES: Final = 1 << 16
SEGMENT_BYTES: Final = 64 << 20
"""A segment that has either is closed. With a batch more, it is what opening reads."""

_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(Entry)


class Ledger:
    """The open ledger."""

    def __init__(
        self,
        path: Path,
        signed: Signed = NOTHING_SIGNED,
        *,
        segment_entries: int = SEGMENT_ENTRIES,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Opens or creates it. `signed` is the head that the TPM signed last, which the entries must lead to.

        Raises:
            LedgerError: it does not read, or is not what was recorded: which entry.
        """
        self.path = path
        self._limits = (segment_entries, segment_bytes)
        self._buffer: list[bytes] = []
        self._failed: str | None = None
        self._notes = Notes()
        self._size_before = 0
        """Bytes of the closed segments."""
        self._fd = -1
        self._end = 0
        """Bytes of the open one, durable."""
        self._position = 0
        """The same with what is buffered."""
        try:
            self._segments = Segments(path)
            last = last_segment(self._segments)
            self._segments.folder.mkdir(mode=0o750, exist_ok=True)
            self._offsets = Offsets(self._segments.folder)
            self._lines = Lines(self._segments, self._offsets, lambda: self._durable)
            self.tree = TreeFile(self._segments.folder, self._lines.hashes)
            self._open(last, signed)
        except OSError as error:
            raise LedgerError(f"{error.filename or path}: {error.strerror}") from error
        self._durable = self.tree.size
        self.open_drift = {component: entry.seq for component, entry in self._notes.drift.items()}
        """As it stood when it was opened: component → entry of a drift that no later entry clears."""
        self.last = dict(self._notes.last)
        """As it stood when it was opened: event of `opening.LAST` → the last such entry."""

    # ── Opening ───────────────────────────────────────────────────────────────────────────────────

    def _open(self, last: Last, signed: Signed) -> None:
        self._segments.open_first = last.segment.first
        if last.closed:
            self._segments.closed.pop()
            self._segments.open_path = last.segment.path
        tree = self.tree
        tree.begin(last.edge)
        root = tree.root() if tree.size == signed.size else None
        reading = Reading(last.segment, closed=last.closed, notes=self._notes)
        for hashes, offsets in reading if last.segment.path.exists() else ():
            self._offsets.put(tree.size, offsets)
            split = signed.size - tree.size
            if 0 < split <= len(hashes):
                tree.load(hashes[:split])
                root = tree.root()
                tree.load(hashes[split:])
            else:
                tree.load(hashes)
        self._offsets.begin(tree.size)
        if tree.size < signed.size:
            raise LedgerError(
                f"{self.path}: has {tree.size} entries, the signed head {signed.size}: entries are missing"
            )
        if (tree.root(signed.size) if root is None else root) != signed.root:
            raise LedgerError(
                f"{self.path}: its first {signed.size} entries are not those that were signed: "
                f"{self._where(last, signed)}"
            )
        first = self._segments.first
        if first and ("archive" not in self._notes.last or int(self._notes.last["archive"].op) < first):
            raise LedgerError(f"{self.path}: entries 0 to {first - 1} are missing, and were not archived")
        self._settle_open(last, reading.end)

    def _where(self, last: Last, signed: Signed) -> str:
        """Which entry is not as it was signed, if the hashes that were kept beside the entries still lead to
        the signed root."""
        path, first = last.segment.path, last.segment.first
        kept = Frontier()
        for at in range(0, signed.size, CHUNK):
            kept.extend(self.tree.stored(at, min(CHUNK, signed.size - at)))
        if kept.size == signed.size and kept.root() == signed.root:
            end = signed.size
            check = ledgercheck.audit(
                chunks(path),
                lambda at, n: self.tree.stored(at, min(n, end - at)),
                first,
                lambda: end,
                number_of,
            )
            fault = ledgercheck.fault_of(check)
            if fault is not None:
                return f"{path.name} line {fault.at - first + 1}: {fault.what}"
        return "entries were edited, replaced or reordered"

    def _settle_open(self, last: Last, end: int) -> None:
        """The entries are those that were recorded: the derived files follow them, and what is torn goes."""
        tree = self.tree
        if tree.differs is not None:
            at = last.segment.first
            for hashes, _ in Reading(last.segment, closed=last.closed, notes=Notes()):
                tree.overwrite(at, hashes)
                at += len(hashes)
        tree.settle()
        tree.flush()
        tree.trim()
        self._durable = tree.size
        self._size_before = sum(s.path.stat().st_size for s in self._segments.closed)
        if last.closed:
            self._segments.closed.append(last.segment)
            self._size_before += end
            self._begin_segment(last.segment.first)
            return
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        if os.fstat(self._fd).st_size != end:
            os.ftruncate(self._fd, end)
            os.fsync(self._fd)
        sync_folder(self.path.parent)
        self._end = self._position = end

    # ── Appending ─────────────────────────────────────────────────────────────────────────────────

    @property
    def size(self) -> int:
        """Entries, those not yet durable included."""
        return self.tree.size

    @property
    def durable(self) -> int:
        """Entries that are on the disk."""
        return self._durable

    @property
    def first(self) -> int:
        """The first entry that is not archived."""
        return self._segments.first

    @property
    def open_first(self) -> int:
        """First entry of the open segment."""
        return self._segments.open_first

    @property
    def drifting(self) -> list[int]:
        """Entries of drifts that no later entry clears."""
        return [entry.seq for entry in self._notes.drift.values()]

    @property
    def closed(self) -> list[Segment]:
        """Segments that take no more entries."""
        return list(self._segments.closed)

    @property
    def stored_bytes(self) -> int:
        """Of all segments that are not archived."""
        return self._size_before + self._end

    @property
    def failed(self) -> str | None:
        """Why it takes no more entries in this process, if it does not."""
        return self._failed

    @property
    def withheld(self) -> list[tuple[int, int]]:
        """Runs of entries whose answers never left, ascending."""
        return self._notes.withheld

    def append(self, entry: Entry) -> None:
        """Adds an entry whose `seq` is `size`; not durable before `sync`."""
        if self._failed:
            raise LedgerError(f"ledger is closed: {self._failed}")
        if entry.seq != self.tree.size:
            raise ValueError(f"entry {entry.seq} at place {self.tree.size}")
        self._put(entry)
        if entry.event in NOTED:
            self._notes.note(entry)

    def _put(self, entry: Entry) -> None:
        body = _ENCODER.encode(entry)
        if len(body) >= MAX_ENTRY_BYTES:
            raise ValueError("entry is too long")
        self._buffer.append(body + b"\n")
        self._offsets.add(self._position)
        self._position += len(body) + 1
        self.tree.append(leaf_hash(body))

    def sync(self) -> None:
        """Writes what was appended and waits for the disk.

        Raises:
            LedgerError: it failed; the ledger takes no more in this process.
        """
        if self._failed:
            raise LedgerError(f"ledger is closed: {self._failed}")
        if not self._buffer:
            return
        self._write()
        try:
            self.tree.settle()
            self._offsets.settle()
            if self.tree.size - self._segments.open_first >= self._limits[0] or self._end >= self._limits[1]:
                self._rotate()
        except (OSError, LedgerError) as error:
            # The entries are durable, and so the answers may leave. No more may be built on what failed.
            self._failed = self._failed or str(error)

    def _write(self) -> None:
        data = b"".join(self._buffer)
        try:
            write_all(self._fd, data, self._end)
            os.fdatasync(self._fd)
        except OSError as error:
            self._failed = error.strerror or str(error)
            self._cut_back()
            raise LedgerError(f"{self.path}: {self._failed}") from error
        self._buffer.clear()
        self._durable = self.tree.size
        self._end = self._position

    def _cut_back(self) -> None:
        """Best effort: takes the unacknowledged tail off the file, so that the next start sees none."""
        self.tree.rollback()
        self._offsets.rollback()
        self._buffer.clear()
        self._position = self._end
        try:
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
        except OSError:
            return

    # ── Segments ──────────────────────────────────────────────────────────────────────────────────

    def _rotate(self) -> None:
        """Closes the open segment and begins the next. At any moment of it the files open again."""
        self.tree.flush(durable=True)
        self._offsets.flush()
        first = self._segments.open_first
        target = self._segments.folder / closed_name(first)
        os.rename(self.path, target)
        self._segments.closed.append(Segment(first, target))
        self._segments.open_first = self.tree.size
        self._size_before += self._end
        self._end = self._position = 0
        sync_folder(self._segments.folder)
        self._begin_segment(first)

    def _begin_segment(self, previous: int) -> None:
        """Writes `rotate` and what it carries, durable at once."""
        new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = new
        self._segments.open_first, self._segments.open_path = self.tree.size, self.path
        seq = self.tree.size
        now = time.time_ns() // 1_000_000
        carried = self._notes.carry(seq + 1, now, self._segments.first)
        self._notes.withheld[:] = [run for run in self._notes.withheld if run[1] >= self._segments.first]
        rotation = Rotation(previous, len(carried), self.tree.edge)
        for entry in (Entry(seq, now, "rotate", "done", rotation=rotation), *carried):
            self._put(entry)
        self._write()
        self.tree.settle()
        self._offsets.settle()
        sync_folder(self.path.parent)

    def drop(self, end: int) -> None:
        """Removes closed segments, all of whose entries are before `end`; an `archive` entry has said so.

        Raises:
            LedgerError: they cannot be removed.
        """
        starts = [segment.first for segment in self._segments.all()]
        try:
            while self._segments.closed and starts[1] <= end:
                gone = self._segments.closed[0]
                size = gone.path.stat().st_size
                gone.path.unlink()
                del self._segments.closed[0], starts[0]
                self._size_before -= size
            sync_folder(self._segments.folder)
        except OSError as error:
            raise LedgerError(f"{error.filename}: {error.strerror}") from error

    # ── Reading ───────────────────────────────────────────────────────────────────────────────────

    def stretch(self, start: int, count: int) -> list[bytes]:
        """Durable lines from `start` on, at most `count`, without newlines: those that were recorded.

        Raises:
            LedgerError: the file does not read, or a line is another: which entry.
            ArchivedError: they begin in a segment that was archived.
        """
        return self._lines.stretch(self.tree, start, count)

    def entries(self, start: int, count: int) -> Iterator[Entry]:
        """Durable entries from `start` on. Raises: as `stretch`."""
        for at in range(start, start + count, BLOCK):
            lines = self.stretch(at, min(BLOCK, start + count - at))
            yield from map(_DECODER.decode, lines)
            if len(lines) < BLOCK:
                return

    def audit(self) -> Generator[int, None, ledgercheck.Fault | None]:
        """`Lines.audit` of all that is not archived."""
        return self._lines.audit(self.tree)

    def place(self, index: int) -> str:
        """File and line of an entry, for people."""
        return self._segments.place(index)

    def close(self) -> None:
        """Safe to call twice."""
        if self._failed is None and self._fd >= 0:
            try:
                self.tree.flush()
                self._offsets.flush()
            except OSError:
                pass  # derived: the next start makes them again
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.tree.close()
            self._offsets.close()
