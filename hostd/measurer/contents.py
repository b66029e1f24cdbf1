"""Reads the content of every file segment that hypervisor processes map, as keyed tags.

Two ways to read a segment for its tag, giving the same tag:
- through our mapping, in two threads: 43 MB in 0.8-1.6 ms. A file cut short under the
  reader would end the measurer (SIGBUS), so this is for files that only root can change;
- with pread into a buffer, 43 MB in 6-8 ms, for all others: a process that maps a file of its own and
  truncates it can only spoil its own reading. Of what one process brought only so much is read, and no
  disk is waited for: what is over that, or is not in the page cache, is left out. The last page comes
  through /proc/self/mem, where a fault is an error, because bytes after the end of the file can be executed
  and pread does not show them.
If a disk fails under a root-owned file the measurer dies and the gate closes.

What only hostd's own processes map (some 70 MB of libraries) is read in turn, `OWN_BYTES` in a reading; in
between its last tags are reported, and said to be that: a hypervisor that maps it from now on rests on the
next reading. A request rests on the code of the hypervisors being read anew, not on that of who reads it:
whoever changes that one decides what it says.

A segment that was never identified cannot be good, whatever its tag: it is reported with a tag of zeros
and is not read. So mapping ever new files costs the others nothing.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import Counter
from typing import TYPE_CHECKING, Final

from hostd.core.readings import MAX_ALTERED, AlteredPage, FilesReading, Segment
from hostd.measurer.files import MAX_NAMED, only_root_changes
from hostd.platform.pages import PAGE, whole_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostd.measurer.files import File, Range, Registry
    from hostd.measurer.lane import Lane
    from hostd.measurer.tags import Tagger
    from hostd.platform.pages import OwnPages

LANE_BYTES: Final = 2 << 20
"""Less is not worth handing over to the second thread."""
MAX_STREAMED_PER_OWNER: Final = 16 << 20
"""Bytes of files that others than root can change, of what one process brought: 3 ms in every pass."""
MAX_STREAMED: Final = 64 << 20
"""In all."""
OWN_BYTES: Final = 4 << 20
"""0.2 ms; all of it within twenty readings."""
_CHUNK: Final = 1 << 20
_NO_TAG: Final = bytes(16)


class _Source:
    """Segments of one file."""

    __slots__ = ("file", "items", "stop", "views")

    def __init__(self, file: File, items: list[Range]) -> None:
        self.file = file
        self.items = items
        self.stop: int | None = None
        """Where our mapping may be read up to; negative: not at all. None: not looked at yet."""
        self.views: list[tuple[Range, memoryview]] = []

    def look(self) -> bool:
        """Looks at the file's size and owner anew; whether they ask for other views than before."""
        own = self.file.own
        assert own is not None
        info = os.fstat(self.file.fd)
        stop = min(whole_pages(info.st_size), own.length) if only_root_changes(info) else -1
        if stop == self.stop:
            return False
        self.stop = stop
        self.views = []
        if stop >= 0:
            for item in self.items:
                end = min(item.offset + item.length, stop)
                self.views.append((item, own.view[item.offset : max(end, item.offset)]))
        return True


class _Plan:
    """What one set of claims asks to be read. It holds while the registry gives the very same tuple."""

    def __init__(self, wanted: tuple[Range, ...], registry: Registry) -> None:
        self.wanted = wanted
        self.unknown: list[tuple[Range, File]] = []
        """Not identified yet."""
        self.expected: dict[Range, bytes] = {}
        always: dict[int, _Source] = {}
        ours: dict[int, _Source] = {}
        for item in wanted:
            file = registry.get(item.file)
            # A file that is claimed is not dropped.
            assert file is not None
            if item not in file.tags:
                self.unknown.append((item, file))
                continue
            self.expected[item] = file.tags[item]
            sources = ours if registry.only_ours(item) else always
            sources.setdefault(item.file, _Source(file, [])).items.append(item)
        self.always = list(always.values())
        self.ours = ours
        self.views: list[tuple[Range, memoryview]] | None = None
        """Of `always`, the short ones first."""

    def outdated(self, wanted: tuple[Range, ...]) -> bool:
        return self.wanted is not wanted or any(item in file.tags for item, file in self.unknown)


class ContentsProbe:
    """Reads the files of the registry."""

    def __init__(self, registry: Registry, tagger: Tagger, own_pages: OwnPages, lane: Lane) -> None:
        self._registry = registry
        self._tagger = tagger
        self._own_pages = own_pages
        self._lane = lane
        self._buffer = memoryview(mmap.mmap(-1, _CHUNK))
        self._plan = _Plan((), registry)
        self._segments: dict[Range, Segment] = {}
        """As last reported."""
        self._own: dict[Range, None] = {}
        """Of these, what only hostd's processes map, the longest unread first."""
        self._odd: set[Range] = set()
        """Of these, what is not as it was identified."""

    def read(self) -> FilesReading:
        """Tags of everything that is mapped now, and where it differs from what was identified. A segment
        that cannot be read is left out, and so is not verified."""
        wanted = self._registry.wanted()
        if self._plan.outdated(wanted):
            self._renew(wanted)
        plan = self._plan
        streamed: list[Range] = []
        views = self._views(streamed) + self._own_views(streamed)
        tags = self._tag_views(views)
        for item in self._affordable(streamed):
            try:
                tags[item] = self._tag_stream(self._file(item), item)
            except BlockingIOError:
                # It is fetched while others are read, for the next time.
                os.posix_fadvise(self._file(item).fd, item.offset, item.length, os.POSIX_FADV_WILLNEED)
        for item in streamed:
            if item not in tags:
                self._segments.pop(item, None)
                self._odd.discard(item)
        segments, expected = self._segments, plan.expected
        for item, tag in tags.items():
            known = segments.get(item)
            if known is None or known.tag != tag:
                segments[item] = Segment(*item, tag)
            if tag != expected[item]:
                self._odd.add(item)
            elif self._odd:
                self._odd.discard(item)
        stand = self._own.keys() - tags.keys()
        now = (segments.get(item) for item in wanted if item not in stand)
        reported = (*filter(None, now), *(segments[item] for item in stand))
        return FilesReading(reported, tuple(self._altered()), standing=len(stand))

    def _renew(self, wanted: tuple[Range, ...]) -> None:
        """Another plan. Of what was reported that stands which is read in turn."""
        plan = self._plan = _Plan(wanted, self._registry)
        ours = {item for source in plan.ours.values() for item in source.items}
        self._own = {item: None for item in self._own if item in ours}
        self._segments = {item: self._segments[item] for item in self._own}
        self._odd &= self._own.keys()
        for item, _ in plan.unknown:
            self._segments[item] = Segment(*item, _NO_TAG)

    def _views(self, streamed: list[Range]) -> list[tuple[Range, memoryview]]:
        """Our mapping of what hypervisors map. What must not be read there is added to `streamed`."""
        plan = self._plan
        # All of them are looked at.
        moved = [source.look() for source in plan.always]
        if plan.views is None or any(moved):
            plan.views = [view for source in plan.always for view in source.views]
            plan.views.sort(key=_length)
        for source in plan.always:
            if not source.views:
                streamed += source.items
        return plan.views

    def _own_views(self, streamed: list[Range]) -> list[tuple[Range, memoryview]]:
        """The same of what only hostd's processes map, as far as its turn has come: what was never read, and
        then what has been unread the longest. Of the rest the last tag is reported again."""
        due: set[Range] = set()
        left = OWN_BYTES
        for item in self._own:
            if left <= 0:
                break
            left -= item.length
            due.add(item)
        views: list[tuple[Range, memoryview]] = []
        for source in self._plan.ours.values():
            turn = [item for item in source.items if item in due or item not in self._own]
            if not turn:
                continue
            source.look()
            if not source.views:
                streamed += source.items
                for item in source.items:
                    self._own.pop(item, None)
                continue
            for item, view in source.views:
                if item in due or item not in self._own:
                    views.append((item, view))
                    self._own.pop(item, None)
                    self._own[item] = None
        return views

    def _affordable(self, streamed: list[Range]) -> list[Range]:
        """Those that are read in this pass, small ones first."""
        spent: Counter[int] = Counter()
        found: list[Range] = []
        for item in sorted(streamed, key=lambda item: item.length):
            owner = self._file(item).owner
            if spent.total() + item.length > MAX_STREAMED:
                break
            if spent[owner] + item.length <= MAX_STREAMED_PER_OWNER:
                spent[owner] += item.length
                found.append(item)
        return found

    def _tag_views(self, views: list[tuple[Range, memoryview]]) -> dict[Range, bytes]:
        """Both threads take the next segment until there is none."""
        if sum(map(_length, views)) < LANE_BYTES:
            return self._tag_all(views)
        self._lane.start(self._tag_all, views)
        try:
            tags = self._tag_all(views)
        finally:
            others: dict[Range, bytes] = self._lane.result()
        return tags | others

    def _tag_all(self, views: list[tuple[Range, memoryview]]) -> dict[Range, bytes]:
        """Tags what it takes off the end of `views`: the large ones first."""
        tag = self._tagger.tag
        tags: dict[Range, bytes] = {}
        while True:
            try:
                item, view = views.pop()
            except IndexError:
                return tags
            tags[item] = tag(view)

    def _tag_stream(self, file: File, item: Range) -> bytes:
        stream = self._tagger.stream()
        for part in self._parts(file, item):
            stream.update(part)
        return stream.finish()

    def _parts(self, file: File, item: Range) -> Iterator[memoryview]:
        """The segment as mapped, in whole pages, without our mapping. What the file does not have (any
        more) is left out. Each part is the same buffer again.

        Raises:
            BlockingIOError: it is not in the page cache.
        """
        assert file.own is not None
        size = os.fstat(file.fd).st_size
        filled = 0
        full = min(item.length, max(0, size // PAGE * PAGE - item.offset))
        while filled < full:
            try:
                got = _cached(file.fd, self._buffer[: min(_CHUNK, full - filled)], item.offset + filled)
            except BlockingIOError:
                raise
            except OSError:
                return
            if not got:
                return
            yield self._buffer[:got]
            filled += got
        if filled < item.length and size % PAGE:
            try:
                yield memoryview(self._own_pages.read(file.own.address + item.offset + filled, PAGE))
            except OSError:
                return

    def _altered(self) -> Iterator[AlteredPage]:
        left = MAX_ALTERED
        for item in sorted(self._odd):
            file = self._file(item)
            if item not in file.copies:
                continue
            for at, was, is_now in file.copies[item].differences(self._now(file, item), left):
                left -= 1
                offset = item.offset + at
                symbol = file.place(offset) if left >= MAX_ALTERED - MAX_NAMED else ""
                yield AlteredPage(0, file.number, file.path, offset, was, is_now, "content", symbol)

    def _now(self, file: File, item: Range) -> Callable[[int, int], bytes]:
        def read(offset: int, length: int) -> bytes:
            assert file.own is not None
            parts: list[bytes] = []
            try:
                # Page by page, through /proc/self/mem: what is not there is an error, not a signal.
                for at in range(offset, offset + length, PAGE):
                    parts.append(self._own_pages.read(file.own.address + item.offset + at, PAGE))
            except OSError:
                pass
            return b"".join(parts)

        return read

    def _file(self, item: Range) -> File:
        file = self._registry.get(item.file)
        # A file that is claimed is not dropped.
        assert file is not None
        return file


def _length(view: tuple[Range, memoryview]) -> int:
    return len(view[1])


def _cached(fd: int, buffer: memoryview, offset: int) -> int:
    """Reads what the page cache has.

    Raises:
        BlockingIOError: nothing there.
        OSError: it cannot be read.
    """
    try:
        return os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        # tmpfs, for one, has no such reads, and no disk.
        if error.errno != errno.EOPNOTSUPP:
            raise
    return os.preadv(fd, [buffer], offset)
