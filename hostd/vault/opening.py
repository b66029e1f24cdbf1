"""Reading a ledger's last segment: where it begins, its entries in their places, and what of them the vault
has to know.

Nothing is changed here. What does not read raises `LedgerError` naming file and line; a last line without
its newline in the open segment is left out, and so is a beginning that was not written whole.
"""

from __future__ import annotations

import re
from bisect import insort
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from guestlib.attest.merkle import leaf_hash
from hostd.core.entry import MAX_ENTRY_BYTES, Entry, LedgerError, Rotation
from hostd.core.merkle import EMPTY_ROOT, Frontier
from hostd.platform.segments import Segment, Segments, chunks, number_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_DECODER: Final = msgspec.json.Decoder(Entry)
LAST: Final = frozenset({"officers", "manifest", "retire", "archive", "channel", "channel-next"})
"""Events of which the last entry matters to the next start."""
NOTED: Final = LAST | {"drift", "clear", "withheld", "carried"}
_NOTED: Final = re.compile(b'"event":"(?:' + "|".join(sorted(NOTED)).encode() + b')"')
"""(A caller's text cannot look so: its quotes are escaped.)"""
AT_ONCE: Final = 4096
"""Lines read at once while nobody waits."""
MAX_RUNS: Final = 512
"""Runs of withheld entries that one `carried` entry holds, some 12 KiB."""


class Signed(NamedTuple):
    """A head that the TPM signed (`hostd.vault.heads` has verified it)."""

    size: int
    root: bytes


NOTHING_SIGNED: Final = Signed(0, EMPTY_ROOT)


class Notes:
    """What the vault has to know of past entries."""

    def __init__(self) -> None:
        self.drift: dict[str, Entry] = {}
        """Component → entry of a drift that no later entry clears."""
        self.last: dict[str, Entry] = {}
        """Event of `LAST` → its last entry."""
        self.withheld: list[tuple[int, int]] = []
        """Runs of entries whose answers never left, ascending."""

    def note(self, entry: Entry) -> None:
        """Takes an entry of an event of `NOTED`."""
        if entry.event == "carried":
            if entry.carried is not None:
                self.note(entry.carried)
            self._withhold(entry.withheld)
        elif entry.event == "drift":
            self.drift[entry.op] = entry
        elif entry.event == "clear":
            self.drift.pop(entry.op, None)
        elif entry.event == "withheld":
            self._withhold(entry.withheld)
        elif entry.event in LAST:
            self.last[entry.event] = entry

    def _withhold(self, runs: Iterable[tuple[int, int]]) -> None:
        # A batch may be withheld before the one that was executed before it.
        for run in runs:
            insort(self.withheld, run)

    def carry(self, seq: int, now: int, first: int) -> list[Entry]:
        """Entries `seq`, … of a new segment that tell the next start all of this; of what was withheld, what
        is not archived (before entry `first`)."""
        made: list[Entry] = []
        for entry in sorted([*self.drift.values(), *self.last.values()], key=lambda entry: entry.seq):
            made.append(Entry(seq + len(made), now, "carried", "done", op=entry.event, carried=entry))
        runs = [run for run in self.withheld if run[1] >= first]
        for at in range(0, len(runs), MAX_RUNS):
            some = tuple(runs[at : at + MAX_RUNS])
            made.append(Entry(seq + len(made), now, "carried", "done", op="withheld", withheld=some))
        return made


class Last(NamedTuple):
    """The segment that opening reads."""

    segment: Segment
    edge: Frontier
    """Of the tree of all entries before it."""
    closed: bool
    """The open segment has not begun: this is the one before it."""


def last_segment(segments: Segments) -> Last:
    """The last segment that has begun; every one before it is there and follows on its predecessor.

    Raises:
        LedgerError: a segment is missing, or not in its place.
        OSError: it does not read.
    """
    previous: Segment | None = None
    rotation: Rotation | None = None
    for segment in segments.closed:
        found = _head(segment.path)
        if found is None or found[0] != segment.first:
            raise LedgerError(f"{segment.path}: does not begin with entry {segment.first}")
        rotation = found[1]
        _follows(segment, rotation, previous)
        previous = segment
    found = _head(segments.path) if segments.path.exists() else None
    if found is None:
        last = previous or Segment(0, segments.path)
        return Last(last, _edge(last, rotation), closed=previous is not None)
    last = Segment(found[0], segments.path)
    _follows(last, found[1], previous)
    return Last(last, _edge(last, found[1]), closed=False)


def _head(path: Path) -> tuple[int, Rotation | None] | None:
    """First entry of a segment and, unless it is the very first, its rotation. None: not written whole."""
    lines = chain.from_iterable(chunks(path))
    line = next(lines, b"")
    if not line.endswith(b"\n"):
        return None
    first = number_of(line)
    if first == 0:
        return 0, None
    entry = _entry(path, 1, line[:-1])
    if entry.rotation is None:
        raise LedgerError(f"{path}: line 1 is not entry 0, nor the first of a segment")
    for _ in range(entry.rotation.follow):
        if not next(lines, b"").endswith(b"\n"):
            return None
    return entry.seq, entry.rotation


def _entry(path: Path, number: int, body: bytes) -> Entry:
    try:
        return _DECODER.decode(body)
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{path}: line {number} is not an entry") from error


def _follows(segment: Segment, rotation: Rotation | None, previous: Segment | None) -> None:
    if previous is not None and (rotation is None or rotation.previous != previous.first):
        after = "nothing" if rotation is None else f"the segment of entry {rotation.previous}"
        raise LedgerError(
            f"{segment.path}: follows on {after}, not on {previous.path.name}: "
            "a segment is missing or was replaced"
        )


def _edge(segment: Segment, rotation: Rotation | None) -> Frontier:
    try:
        return Frontier(segment.first, () if rotation is None else rotation.frontier)
    except ValueError as error:
        raise LedgerError(f"{segment.path}: line 1: {error}") from error


class Reading:
    """One segment read from its beginning: iterate over (leaf hashes, offsets), in chunks."""

    def __init__(self, segment: Segment, *, closed: bool, notes: Notes) -> None:
        self._segment = segment
        self._closed = closed
        self._notes = notes
        self.end = 0
        """Bytes of whole lines so far."""

    def __iter__(self) -> Iterator[tuple[list[bytes], list[int]]]:
        """Raises: LedgerError, a line is not the entry of its place."""
        path, number = self._segment.path, self._segment.first
        for lines in chunks(path, count=AT_ONCE):
            hashes: list[bytes] = []
            offsets: list[int] = []
            at = self.end
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                body = line[:-1]
                if not line.startswith(b'{"seq":%d,' % number):
                    raise LedgerError(
                        f"{path}: line {number - self._segment.first + 1} is not entry {number}"
                    )
                if _NOTED.search(body):
                    self._notes.note(_entry(path, number - self._segment.first + 1, body))
                hashes.append(leaf_hash(body))
                offsets.append(at)
                at += len(line)
                number += 1
            self.end = at
            yield hashes, offsets
            if len(hashes) < len(lines):
                torn = number - self._segment.first + 1
                if len(lines[len(hashes)]) > MAX_ENTRY_BYTES:
                    raise LedgerError(f"{path}: line {torn} is too long")
                if self._closed:
                    raise LedgerError(f"{path}: line {torn} is not whole")
                return
