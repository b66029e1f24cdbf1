"""Says what a file is: SHA-256 of the whole, and tags of its segments, taken from one and the same bytes.

Both run over the file as it streams by, a step of a millisecond at a time, so that a file of 256 MiB
keeps nothing else waiting. Whoever finds equal tags later has found the bytes that were hashed,
whatever happened to the file between two steps. `Turns` gives the processes that brought files a step each in
turn: one that brings large files waits for them itself.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.core.readings import FileIdentity, Missing, Segment
from hostd.measurer.copies import CHUNK_BYTES, MAX_COPIES, MAX_COPIES_PER_OWNER, Copy, compress
from hostd.measurer.elf import HEADER_BYTES, layout_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from hostd.measurer.elf import Layout
    from hostd.measurer.files import File, Range, Registry
    from hostd.measurer.tags import Tagger, TagStream

STEP_BYTES: Final = 1 << 20
"""Hashed in one step: 0.7 ms."""
MAX_BYTES: Final = 256 << 20
"""A file that grows while it is read is read no further."""
MAX_UNFINISHED: Final = 64
"""Files waiting for their copies; a later one goes without."""


class Identified(NamedTuple):
    identity: FileIdentity
    magic: bytes
    layout: Layout | None
    """By the file's first bytes, of those that were hashed."""


def identify(
    file: File,
    wanted: Sequence[Range],
    tagger: Tagger,
    held: Callable[[int], tuple[int, int]],
    uncopied: Callable[[Range], bool],
) -> Iterator[Identified | None]:
    """The steps for one open file and these segments of it. `held` says how many bytes of
    copies there are: of the process that brought the file, and in all. Of segments that are `uncopied`
    none is made: a difference in them is named by its range.

    Raises (from `next`):
        OSError: it cannot be read.
    """
    # Of what reading takes nothing is held while the copies wait for their turn.
    yield (yield from _read(file, wanted, tagger))
    for item in wanted:
        if item not in file.copies and not uncopied(item):
            yield from _keep(file, item, tagger.stream(), held)


def _read(
    file: File, wanted: Sequence[Range], tagger: Tagger
) -> Generator[Identified | None, None, Identified]:
    """Reads the file once; returns what it is."""
    digest = hashlib.sha256()
    feeds = [_Feed(item, tagger.stream()) for item in wanted]
    buffer = memoryview(bytearray(STEP_BYTES))
    head = b""
    size = 0
    while size <= MAX_BYTES and (got := os.preadv(file.fd, [buffer], size)):
        chunk = buffer[:got]
        digest.update(chunk)
        for feed in feeds:
            feed.take(size, chunk)
        if len(head) < HEADER_BYTES:
            head += bytes(chunk[: HEADER_BYTES - len(head)])
        size += got
        yield None
    segments = tuple(Segment(*feed.item, feed.finish()) for feed in feeds)
    for item, segment in zip(wanted, segments, strict=True):
        file.tags.setdefault(item, segment.tag)
    device = os.fstat(file.fd).st_dev
    identity = FileIdentity(file.number, file.path, device, file.inode, size, digest.digest(), segments)
    return Identified(identity, head[:4], layout_of(head))


class _Feed:
    """The tag of one segment, from a file that streams by."""

    def __init__(self, item: Range, stream: TagStream) -> None:
        self.item = item
        self._stream = stream
        self._taken = 0

    def take(self, at: int, chunk: memoryview) -> None:
        """`chunk` stands at offset `at` of the file; chunks come in order."""
        low = max(self.item.offset, at)
        high = min(self.item.offset + self.item.length, at + len(chunk))
        if low < high:
            self._stream.update(chunk[low - at : high - at])
            self._taken += high - low

    def finish(self) -> bytes:
        """A segment is whole pages: after the file's end come zeros."""
        left = self.item.length - self._taken
        while left:
            zeros = bytes(min(left, STEP_BYTES))
            self._stream.update(memoryview(zeros))
            left -= len(zeros)
        return self._stream.finish()


def _keep(
    file: File, item: Range, stream: TagStream, held: Callable[[int], tuple[int, int]]
) -> Iterator[None]:
    """Makes the copy of one segment; it counts only if these bytes, too, have the tag."""
    chunks: list[bytes] = []
    size = 0
    for at in range(item.offset, item.offset + item.length, CHUNK_BYTES):
        length = min(CHUNK_BYTES, item.offset + item.length - at)
        chunk = file.read(at, length).ljust(length, b"\0")
        stream.update(memoryview(chunk))
        chunks.append(compress(chunk))
        size += len(chunks[-1])
        own, total = held(file.owner)
        if own + size > MAX_COPIES_PER_OWNER or total + size > MAX_COPIES:
            return
        yield None
    if stream.finish() == file.tags[item]:
        file.copies[item] = Copy(tuple(chunks))


class Turns:
    """Identifications under way: a step for each process that brought a file, in turn.

    `ask` takes a question on, `step` does one step of about a millisecond (up to 3 while copies are made)
    and gives an answer when one is ready. Questions before copies: a copy is made when no question waits.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._asked: deque[tuple[int, deque[tuple[int, Iterator[FileIdentity | None]]]]] = deque()
        self._copying: deque[Iterator[FileIdentity | None]] = deque()

    @property
    def waiting(self) -> int:
        """Questions without an answer yet."""
        return sum(len(jobs) for _, jobs in self._asked)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, not even a copy to make."""
        return not self._asked and not self._copying

    def ask(self, ticket: int, number: int) -> None:
        """`ticket` comes back with the answer."""
        file = self._registry.get(number)
        owner = 0 if file is None else file.owner
        job = ticket, self._registry.identify_steps(number)
        for known, jobs in self._asked:
            if known == owner:
                jobs.append(job)
                return
        self._asked.append((owner, deque([job])))

    def step(self) -> tuple[int, FileIdentity | Missing] | None:
        """One step of whose turn it is."""
        if not self._asked:
            self._copy()
            return None
        owner, jobs = self._asked.popleft()
        ticket, steps = jobs[0]
        answer: FileIdentity | Missing | None
        try:
            answer = next(steps)
        except (LookupError, OSError) as error:
            answer = Missing(str(error)[:512], absent=False)
        if answer is not None:
            jobs.popleft()
            if isinstance(answer, FileIdentity) and len(self._copying) < MAX_UNFINISHED:
                self._copying.append(steps)
        if jobs:
            self._asked.append((owner, jobs))
        return None if answer is None else (ticket, answer)

    def _copy(self) -> None:
        if self._copying:
            try:
                next(self._copying[0])
            except (StopIteration, LookupError, OSError):
                self._copying.popleft()

    def clear(self) -> None:
        """Forgets questions: whoever asked is gone."""
        self._asked.clear()
