"""Reading entries back: each line is compared with its leaf before anybody sees it.

Where a line begins is derived (`Offsets`) and found anew from the segment if it is wrong; only what the
segment then holds is held against it.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from guestlib.attest.merkle import leaf_hash
from hostd.core import ledgercheck
from hostd.core.entry import MAX_ENTRY_BYTES, LedgerError
from hostd.platform.segments import chunks, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from hostd.platform.segments import Offsets, Segment, Segments
    from hostd.vault.treefile import TreeFile

BLOCK: Final = 256
"""Lines read at once."""


class Lines:
    """The durable lines of a ledger."""

    def __init__(self, segments: Segments, offsets: Offsets, durable: Callable[[], int]) -> None:
        self._segments = segments
        self._offsets = offsets
        self._durable = durable

    def stretch(self, tree: TreeFile, start: int, count: int) -> list[bytes]:
        """Lines from `start` on, at most `count`, without newlines: those that were recorded.

        Raises:
            LedgerError: the file does not read, or a line is another: which entry.
            ArchivedError: they begin in a segment that was archived.
        """
        end = min(start + count, self._durable())
        found: list[bytes] = []
        while 0 <= start < end:
            segment, following = self._segments.of(start)
            upto = min(end, start + BLOCK, end if following is None else following)
            found += self._read(tree, segment, start, upto)
            start = upto
        return found

    def _read(self, tree: TreeFile, segment: Segment, start: int, end: int) -> list[bytes]:
        expected = tree.leaves(start, end - start)
        for attempt in range(2):
            try:
                lines = self._lines_at(segment, self._offsets.get(start), end - start)
            except OSError as error:
                raise LedgerError(f"{segment.path}: {error.strerror}") from error
            hashes = [leaf_hash(line) for line in lines]
            if hashes == expected:
                return lines
            if attempt == 0:
                # The offset is derived: found anew from the entries before anything is held against them.
                self._index(segment)
        at = next(
            (i for i, pair in enumerate(zip(hashes, expected, strict=False)) if pair[0] != pair[1]),
            len(hashes),
        )
        raise LedgerError(
            f"{self._segments.place(start + at)} is not entry {start + at} as it was recorded "
            "(`hostctl ledger verify` tells more)"
        )

    @staticmethod
    def _lines_at(segment: Segment, offset: int, count: int) -> list[bytes]:
        with segment.path.open("rb") as file:
            file.seek(offset)
            lines = list(islice(iter(lambda: file.readline(MAX_ENTRY_BYTES + 1), b""), count))
        return [line.removesuffix(b"\n") for line in lines]

    def _index(self, segment: Segment) -> None:
        number, at = segment.first, 0
        try:
            for lines in chunks(segment.path):
                offsets = []
                for line in lines:
                    offsets.append(at)
                    at += len(line)
                self._offsets.put(number, offsets)
                number += len(lines)
        except OSError as error:
            raise LedgerError(f"{self._offsets.path}: {error.strerror}") from error

    def hashes(self, start: int, end: int) -> Iterator[list[bytes]]:
        """Leaf hashes of entries as they are on the disk."""
        for lines in self._segments.lines(start):
            some = lines[: end - start]
            yield [leaf_hash(line.removesuffix(b"\n")) for line in some]
            start += len(some)
            if start >= end:
                return

    def audit(self, tree: TreeFile) -> Generator[int, None, ledgercheck.Fault | None]:
        """Compares every line on the disk with what was recorded; yields how far it has come, and returns the
        first entry that is not (`ledgercheck.audit`). Entries may be appended meanwhile.

        Raises:
            LedgerError: the files do not read.
        """
        first = self._segments.first
        lines = self._segments.lines(first)
        return ledgercheck.audit(lines, tree.leaves, first, self._durable, number_of)
