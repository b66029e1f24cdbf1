"""Files that hypervisor processes map: numbered, held open, tagged, and identified once.

A file is known by (device, inode) as /proc/PID/maps shows them, and kept open, so that the inode cannot
be recycled under its number. It is opened through /proc/PID/map_files, which leads to the mapped file
itself whatever stands at its path by now, and only if it is a regular file: opening a device may do
something. Our own shared mapping of it is the page cache that every other mapper sees.

Two ways to read a segment for its tag, giving the same tag:
- through our mapping: 46 MB in 2.0-2.9 ms. A file cut short under the reader would end the measurer
  (SIGBUS), so this is for files that only root can change;
- with pread into a buffer, 46 MB in 6-8 ms, for all others: a process that maps a file of its own and
  truncates it can only spoil its own reading. The last page comes through /proc/self/mem, where a
  fault is an error, because bytes after the end of the file can be executed and pread does not show them.
If a disk fails under a root-owned file the measurer dies and the gate closes.

`identify` takes SHA-256 and tags from one and the same bytes, and keeps those as the copy that later
differences are shown against. What is not mapped any more is dropped after a while.

Needs CAP_SYS_PTRACE and CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (map_files), CAP_DAC_READ_SEARCH.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.core.reading_types import WINDOW_BYTES
from hostd.core.readings import MAX_ALTERED, AlteredPage, FileIdentity, FilesReading, Segment
from hostd.measurer.elf import ALL_CONSTANT, HEADER_BYTES, Layout, MalformedElfError, parse_layout
from hostd.platform.pages import PAGE, OwnMapping, OwnPages, whole_pages
from hostd.platform.procfs import ProcessGoneError, parse_maps

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostd.measurer.tags import Tagger
    from hostd.platform.procfs import ProcessHandle, Vma

MAX_FILES: Final = 2048
"""Open files; over it a file that is new is not taken on, and its process is not verified."""
MAX_FILES_PER_PROCESS: Final = 512
MAX_FILE_BYTES: Final = 256 << 20
"""A larger file is not read: hashing it once would take over 100 ms. QEMU's is 17 MB."""
MAX_TAGGED_PER_PROCESS: Final = 384 << 20
"""Bytes that one process may have read in every pass: 20 ms. QEMU has 46 MB."""
MAX_COPIES: Final = 256 << 20
"""Bytes of identified segments kept to show differences; over it a finding names the range only."""
MAX_SEGMENTS_PER_FILE: Final = 1024
KEEP_S: Final = 600.0
"""After the last process that mapped a file ended; a VM that is started again finds it identified."""
_CHUNK: Final = 1 << 20
_FOREIGN: Final = frozenset({0x65735546, 0x6969, 0xFF534D42, 0x517B, 0x01021997})
"""FUSE, NFS, CIFS, SMB, 9P (statfs(2)): who serves them can let a read hang, or answer each
differently."""
_libc: Final = ctypes.CDLL(None, use_errno=True)


class TooMuchError(Exception):
    """A process maps more than is measured; it is not verified."""


class Range(NamedTuple):
    """A segment by name: bytes [offset, offset + length) of file number `file`."""

    file: int
    offset: int
    length: int


@dataclass(slots=True)
class File:
    """An open file. `own` is None for one that is not read: `refusal` says why."""

    number: int
    fd: int
    device: str
    inode: int
    path: str
    refusal: str = ""
    size: int = 0
    own: OwnMapping | None = None
    layout: Layout | None = None
    head: bytes = b""
    copies: dict[Range, bytes] = field(default_factory=dict)
    tags: dict[Range, bytes] = field(default_factory=dict)
    """Tags of `copies`."""
    unused_since: float | None = None

    def close(self) -> None:
        if self.own is not None:
            self.own.close()
        os.close(self.fd)


class Registry:
    """All files that hypervisor processes map, and which process maps what."""

    def __init__(self, tagger: Tagger, own_pages: OwnPages) -> None:
        self._tagger = tagger
        self._own_pages = own_pages
        self._by_key: dict[tuple[str, int], File] = {}
        self._by_number: dict[int, File] = {}
        self._next = 1
        self._claims: dict[tuple[int, int], frozenset[Range]] = {}
        self._copied = 0
        self.generation = 0
        """Moves when what is known of a file's layout changes."""
        self._buffer = memoryview(mmap.mmap(-1, MAX_FILE_BYTES))
        """Anonymous memory, used only as far as the largest file read with pread."""

    # ── What is mapped ────────────────────────────────────────────────────────────────────────────

    def get(self, number: int) -> File | None:
        return self._by_number.get(number)

    def resolve(self, handle: ProcessHandle, vma: Vma) -> File:
        """The file of a mapping, taken on if it is new.

        Raises:
            ProcessGoneError: the mapping is no more.
            TooMuchError: no room for another file.
        """
        file = self._by_key.get((vma.device, vma.inode))
        if file is None:
            if len(self._by_number) >= MAX_FILES:
                raise TooMuchError(f"over {MAX_FILES} different files are mapped")
            file = self._take_on(handle, vma)
        file.path = vma.name
        return file

    def _take_on(self, handle: ProcessHandle, vma: Vma) -> File:
        held = handle.open(f"map_files/{vma.start:x}-{vma.end:x}", os.O_PATH)
        try:
            info = os.fstat(held)
            file = File(self._next, held, vma.device, vma.inode, vma.name)
            if not stat.S_ISREG(info.st_mode):
                file.refusal = "it is not a regular file"
            elif (kind := _filesystem(held)) in _FOREIGN:
                file.refusal = f"its filesystem ({kind:#x}) is served by another program or machine"
            elif not 0 < info.st_size <= MAX_FILE_BYTES:
                file.refusal = f"it has {info.st_size} bytes, over the bound of {MAX_FILE_BYTES}"
            else:
                # The link leads to the very file that `held` holds, not to a path.
                file.fd = os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                os.close(held)
                held = file.fd
                self._map(file, info.st_size)
        except BaseException:
            os.close(held)
            raise
        self._next += 1
        self._by_key[vma.device, vma.inode] = file
        self._by_number[file.number] = file
        return file

    def _map(self, file: File, size: int) -> None:
        file.size = size
        file.own = OwnMapping(file.fd, size)
        try:
            self._check_same(file)
            file.head = os.pread(file.fd, HEADER_BYTES, 0)
            file.layout = _layout(file.head)
        except BaseException:
            file.own.close()
            raise

    def _check_same(self, file: File) -> None:
        """Between reading maps and opening the link the process may have mapped another file there. The
        kernel's name of the file is compared, not fstat's: they differ on btrfs and overlayfs."""
        assert file.own is not None
        with open("/proc/self/maps", "rb") as lines:
            for vma in parse_maps(lines.read()):
                if vma.start <= file.own.address < vma.end:
                    if (vma.device, vma.inode) == (file.device, file.inode):
                        return
                    break
        raise ProcessGoneError("the mapping was replaced while it was read")

    def claim(self, process: tuple[int, int], ranges: Iterable[Range]) -> None:
        """Says what process (pid, start time) maps now, in place of what it mapped before.

        Raises:
            TooMuchError: over the bounds for one process; its earlier claim stays.
        """
        claimed = frozenset(ranges)
        if len({item.file for item in claimed}) > MAX_FILES_PER_PROCESS:
            raise TooMuchError(f"over {MAX_FILES_PER_PROCESS} files in one process")
        if sum(item.length for item in claimed) > MAX_TAGGED_PER_PROCESS:
            raise TooMuchError(f"over {MAX_TAGGED_PER_PROCESS} bytes of code and constants in one process")
        self._claims[process] = claimed

    def claimed(self, process: tuple[int, int]) -> bool:
        return process in self._claims

    def release_ended(self, alive: Iterable[tuple[int, int]], now: float) -> None:
        """Forgets the claims of processes not in `alive`, and files unused for `KEEP_S`."""
        living = frozenset(alive)
        for process in [process for process in self._claims if process not in living]:
            del self._claims[process]
        used = {item.file for claim in self._claims.values() for item in claim}
        for file in list(self._by_number.values()):
            if file.number in used:
                file.unused_since = None
            elif file.unused_since is None:
                file.unused_since = now
            elif now - file.unused_since >= KEEP_S:
                self._copied -= sum(map(len, file.copies.values()))
                del self._by_number[file.number], self._by_key[file.device, file.inode]
                file.close()

    # ── Readings ──────────────────────────────────────────────────────────────────────────────────

    def read_files(self) -> FilesReading:
        """Tags of everything that is mapped now, and where it differs from what was identified. A segment
        that cannot be read is left out, and so is not verified."""
        segments: list[Segment] = []
        altered: list[AlteredPage] = []
        for item in sorted(frozenset().union(*self._claims.values())):
            file = self._by_number[item.file]
            try:
                data = self._bytes_of(file, item)
            except OSError:
                continue
            tag = self._tagger.tag(data)
            segments.append(Segment(item.file, item.offset, item.length, tag))
            if tag != file.tags.get(item, tag) and item in file.copies:
                altered += _differences(file, item, data, MAX_ALTERED - len(altered))
        return FilesReading(tuple(segments), tuple(altered))

    def _bytes_of(self, file: File, item: Range) -> memoryview:
        """The segment as mapped, in whole pages. What the file does not have (any more) is left out."""
        assert file.own is not None
        info = os.fstat(file.fd)
        end = item.offset + item.length
        if info.st_uid == 0 and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            stop = min(end, whole_pages(info.st_size), file.own.length)
            return file.own.view[item.offset : max(stop, item.offset)]
        filled = 0
        full = min(item.length, max(0, info.st_size // PAGE * PAGE - item.offset))
        while filled < full:
            got = os.preadv(file.fd, [self._buffer[filled:full]], item.offset + filled)
            if not got:
                return self._buffer[:filled]
            filled += got
        if filled < item.length and info.st_size % PAGE:
            try:
                page = self._own_pages.read(file.own.address + item.offset + filled, PAGE)
            except OSError:
                return self._buffer[:filled]
            self._buffer[filled : filled + PAGE] = page
            filled += PAGE
        return self._buffer[:filled]

    def identify(self, number: int) -> FileIdentity:
        """SHA-256 of the whole file and tags of its segments, from the same bytes.

        Raises:
            LookupError: no such number (any more), or the file is one that is not read.
            OSError: it cannot be read.
        """
        file = self._by_number.get(number)
        if file is None:
            raise LookupError("no such file")
        if file.own is None:
            raise LookupError(f"{file.path}: {file.refusal}")
        wanted = sorted({item for claim in self._claims.values() for item in claim if item.file == number})[
            :MAX_SEGMENTS_PER_FILE
        ]
        copies = [bytearray(item.length) for item in wanted]
        digest = hashlib.sha256()
        size = 0
        head = b""
        while size <= MAX_FILE_BYTES and (got := os.preadv(file.fd, [self._buffer[:_CHUNK]], size)):
            chunk = self._buffer[:got]
            digest.update(chunk)
            for item, copy in zip(wanted, copies, strict=True):
                low, high = max(item.offset, size), min(item.offset + item.length, size + got)
                if low < high:
                    copy[low - item.offset : high - item.offset] = chunk[low - size : high - size]
            if len(head) < HEADER_BYTES:
                head += bytes(chunk[: HEADER_BYTES - len(head)])
            size += got
        # The headers that were read when the file was new may not be the ones that this digest covers.
        if head != file.head:
            file.head, file.layout = head, _layout(head)
            self.generation += 1
        tags = [self._tagger.tag(copy) for copy in copies]
        for item, copy, tag in zip(wanted, copies, tags, strict=True):
            self._keep(file, item, bytes(copy), tag)
        return FileIdentity(
            file=number,
            path=file.path,
            device=os.fstat(file.fd).st_dev,
            inode=file.inode,
            size=size,
            sha256=digest.digest(),
            segments=tuple(
                Segment(item.file, item.offset, item.length, tag)
                for item, tag in zip(wanted, tags, strict=True)
            ),
        )

    def _keep(self, file: File, item: Range, copy: bytes, tag: bytes) -> None:
        if item not in file.tags and self._copied + len(copy) <= MAX_COPIES:
            file.tags[item] = tag
            file.copies[item] = copy
            self._copied += len(copy)

    def close(self) -> None:
        for file in self._by_number.values():
            file.close()
        self._by_number.clear()
        self._by_key.clear()
        self._claims.clear()


def _filesystem(fd: int) -> int:
    """Magic number of the filesystem that holds an open file."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer):
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int.from_bytes(buffer.raw[:8], "little")


def _layout(head: bytes) -> Layout | None:
    try:
        return parse_layout(head)
    except MalformedElfError:
        return ALL_CONSTANT


def _differences(file: File, item: Range, now: memoryview, limit: int) -> list[AlteredPage]:
    """Where a segment differs from its copy, page by page."""
    copy = file.copies[item]
    found: list[AlteredPage] = []
    for start in range(0, item.length, PAGE):
        if len(found) >= limit:
            break
        expected, seen = copy[start : start + PAGE], bytes(now[start : start + PAGE])
        if expected != seen:
            at, was, is_now = first_difference(expected, seen)
            found.append(
                AlteredPage(0, file.number, file.path, item.offset + start + at, was, is_now, "content")
            )
    return found


def first_difference(expected: bytes, seen: bytes) -> tuple[int, bytes, bytes]:
    """Offset of the first differing byte and both sides from there on; (0, same, same) if none differs."""
    if expected == seen:
        return 0, expected[:WINDOW_BYTES], seen[:WINDOW_BYTES]
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, seen, strict=False)) if a != b),
        min(len(expected), len(seen)),
    )
    return at, expected[at : at + WINDOW_BYTES], seen[at : at + WINDOW_BYTES]
