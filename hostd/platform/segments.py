"""The ledger's files: the open segment `ledger.jsonl`, and closed ones in `ledger.d/`, each named by its
first entry (`000000065536.jsonl`). A segment is JSON lines; nothing here is verified but their places.

Beside the closed segments lie derived files, which are never trusted: `hashes-0`, `-8`, `-16`, … hold the
nodes of those levels (32 bytes each, in order), `offsets` where each entry's line begins in its segment
(8 bytes each, little endian).
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.core.entry import MAX_ENTRY_BYTES, ArchivedError, LedgerError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK: Final = 512
"""Lines read at once: some 200 KB, and 2 ms to hash, which is how long comparing keeps others waiting."""
OFFSET_BYTES: Final = 8
FLUSH_BYTES: Final = 512 * OFFSET_BYTES
"""Offsets that may wait in memory."""
_CLOSED: Final = re.compile(r"([0-9]{12,18})\.jsonl")
_SEQ: Final = re.compile(rb'\{"seq":([0-9]{1,18}),')


class Segment(NamedTuple):
    first: int
    path: Path


def number_of(body: bytes) -> int | None:
    """The number that a line says it has."""
    match = _SEQ.match(body)
    return None if match is None else int(match[1])


def folder_of(path: Path) -> Path:
    """Where the closed segments and derived files of the ledger at `path` are."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".d")


def closed_name(first: int) -> str:
    return f"{first:012d}.jsonl"


def closed_segments(folder: Path) -> list[Segment]:
    """The closed segments in a folder, in order.

    Raises:
        OSError: it does not read.
    """
    found = []
    for item in os.scandir(folder) if folder.is_dir() else ():
        match = _CLOSED.fullmatch(item.name)
        if match is not None:
            found.append(Segment(int(match[1]), folder / item.name))
    return sorted(found)


def chunks(path: Path, *, count: int = CHUNK) -> Iterator[list[bytes]]:
    """Lines of a segment with their newlines, `count` at a time. One that is longer
    than any entry comes in pieces, of which only the last ends in a newline.

    Raises:
        LedgerError: it does not read.
    """
    try:
        with path.open("rb") as file:
            while True:
                # readline bounds what one line may take; iterating over the file would not.
                lines = list(islice(iter(lambda: file.readline(MAX_ENTRY_BYTES + 1), b""), count))
                if not lines:
                    return
                yield lines
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}") from error


class Segments:
    """The segments of one ledger, in order; the last is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = folder_of(path)
        self.closed = closed_segments(self.folder)
        self.open_first = 0
        """First entry of the open segment; set by whoever has read it."""
        self.open_path = path
        """Not `path` while the segment that would be open has not begun."""

    @property
    def first(self) -> int:
        """The first entry that is not archived."""
        return self.closed[0].first if self.closed else self.open_first

    def all(self) -> list[Segment]:
        return [*self.closed, Segment(self.open_first, self.open_path)]

    def of(self, index: int) -> tuple[Segment, int | None]:
        """The segment that an entry is in, and where the next one begins (None: it is the open one).

        Raises:
            ArchivedError: its segment is archived.
        """
        if index < self.first:
            raise ArchivedError(f"entries before {self.first} are archived")
        if index >= self.open_first:
            return Segment(self.open_first, self.open_path), None
        at = bisect_right(self.closed, index, key=lambda s: s.first)
        following = self.closed[at].first if at < len(self.closed) else self.open_first
        return self.closed[at - 1], following

    def place(self, index: int) -> str:
        """Where an entry is, for people: file and line."""
        segment, _ = self.of(index)
        return f"{segment.path.name} line {index - segment.first + 1}"

    def lines(self, start: int) -> Iterator[list[bytes]]:
        """All lines from an entry on, across segments, with their newlines, as they are on the disk now.

        Raises:
            LedgerError, ArchivedError: they do not read.
        """
        following: int | None = start
        while following is not None:
            segment, _ = self.of(following)
            skip = following - segment.first
            for lines in chunks(segment.path):
                if skip >= len(lines):
                    skip -= len(lines)
                    continue
                yield lines[skip:]
                skip = 0
            # Asked now: the open segment may have been closed meanwhile.
            _, following = self.of(segment.first)


class Offsets:
    """Where lines begin: derived, checked by whoever reads the line. Waits in memory as the tree does."""

    def __init__(self, folder: Path) -> None:
        """Raises: OSError."""
        self.path = folder / "offsets"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o640)
        self._written = 0
        self._pending = bytearray()
        self._kept = 0

    def get(self, index: int) -> int:
        """0, a segment's start, where nothing is known. Raises: OSError."""
        if index >= self._written:
            at = (index - self._written) * OFFSET_BYTES
            return int.from_bytes(self._pending[at : at + OFFSET_BYTES], "little")
        found = int.from_bytes(os.pread(self._fd, OFFSET_BYTES, index * OFFSET_BYTES), "little")
        return found if found < 1 << 62 else 0

    def put(self, first: int, offsets: list[int]) -> None:
        """Offsets of the entries from `first` on, known from reading them. Raises: OSError."""
        write_all(self._fd, array("Q", offsets).tobytes(), first * OFFSET_BYTES)

    def begin(self, size: int) -> None:
        """What is added from now on is of entries from `size` on."""
        self._written, self._kept = size, 0
        self._pending.clear()

    def add(self, offset: int) -> None:
        self._pending += offset.to_bytes(OFFSET_BYTES, "little")

    def settle(self) -> None:
        """What was added stays. Raises: OSError."""
        self._kept = len(self._pending)
        if self._kept >= FLUSH_BYTES:
            self.flush()

    def rollback(self) -> None:
        del self._pending[self._kept :]

    def flush(self) -> None:
        """Raises: OSError."""
        write_all(self._fd, bytes(self._pending[: self._kept]), self._written * OFFSET_BYTES)
        self._written += self._kept // OFFSET_BYTES
        del self._pending[: self._kept]
        self._kept = 0

    def close(self) -> None:
        os.close(self._fd)


def write_all(fd: int, data: bytes, at: int) -> None:
    """Writes all of it at a place. Raises: OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
