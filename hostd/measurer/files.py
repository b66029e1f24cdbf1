"""Files that hypervisor processes map: numbered, held open, tagged, and identified once.

A file is known by (device, inode) as /proc/PID/maps shows them, and kept open, so that the inode cannot
be recycled under its number. It is opened through /proc/PID/map_files, which leads to the mapped file
itself whatever stands at its path by now, and only if it is a regular file: opening a device may do
something. Our own shared mapping of it is the page cache that every other mapper sees.

What is claimed is brought into our page table once, so that no pass pays for faults. Each process has its
share of open files, of bytes, and of turns at being identified (`hostd/measurer/identify.py`): what one maps
does not slow the others.

What is not mapped any more is dropped after a while.

Needs CAP_SYS_PTRACE and CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (map_files), CAP_DAC_READ_SEARCH.
"""

from __future__ import annotations

import ctypes
import os
import stat
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.measurer.elf import HEADER_BYTES, layout_of
from hostd.measurer.elf_places import place
from hostd.measurer.identify import identify
from hostd.platform.pages import OwnMapping, populate
from hostd.platform.procfs import ProcessGoneError, parse_maps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostd.core.readings import FileIdentity
    from hostd.measurer.copies import Copy
    from hostd.measurer.elf import Layout
    from hostd.measurer.tags import Tagger
    from hostd.platform.procfs import ProcessHandle, Vma

MAX_FILES: Final = 2048
"""Open files; over it a file that is new is not taken on, and its process is not verified."""
MAX_FILES_PER_PROCESS: Final = 512
FAIR_FILES: Final = 128
"""What one process may bring once half of all places are taken. QEMU and its libraries are 52."""
MAX_FILE_BYTES: Final = 256 << 20
"""A larger file is not read: hashing it once would take over 100 ms. QEMU's is 17 MB."""
MAX_TAGGED_PER_PROCESS: Final = 256 << 20
"""Bytes that one process may have read in every pass: 10 ms. QEMU has 43 MB."""
MAX_TAGGED: Final = 1 << 30
"""Bytes read in every pass in all; a process that asks for more of its own is not verified."""
MAX_SEGMENTS_PER_FILE: Final = 1024
MAX_PLACES: Final = 64
MAX_NAMED: Final = 16
"""Differences of one reading that are named by symbol: each may take a millisecond, once."""
KEEP_S: Final = 600.0
"""After the last process that mapped a file ended; a VM that is started again finds it identified."""
SETTLE_S: Final = 1.0
"""A file seen so recently is not dropped to make room: whoever maps it may not have claimed it yet."""
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
    magic: bytes = b""
    """Its first 4 bytes."""
    owner: int = 0
    """Pid of the process that brought it."""
    tags: dict[Range, bytes] = field(default_factory=dict)
    """Of the segments as they were when they were first identified."""
    copies: dict[Range, Copy] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)
    seen: float = 0.0
    """When it was last found mapped by a process that was looked at anew."""
    unused_since: float | None = None

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file as it is now; fewer where there are none, or they cannot be read."""
        try:
            return os.pread(self.fd, length, offset)
        except OSError:
            return b""

    def place(self, offset: int) -> str:
        """Symbol or section at an offset, as `name+0x12`; empty if it has none. Going through the symbols
        takes a millisecond, so the latest places are kept: while nobody mends it, the same is found again."""
        known = self.places.get(offset)
        if known is None:
            if len(self.places) >= MAX_PLACES:
                self.places.clear()
            known = self.places[offset] = place(self.read, offset)
        return known

    def close(self) -> None:
        if self.own is not None:
            self.own.close()
        os.close(self.fd)


class Registry:
    """All files that hypervisor processes map, and which process maps what."""

    def __init__(self, tagger: Tagger) -> None:
        self._tagger = tagger
        self._by_key: dict[tuple[str, int], File] = {}
        self._by_number: dict[int, File] = {}
        self._next = 1
        self._claims: dict[tuple[int, int], frozenset[Range]] = {}
        self._uses: Counter[Range] = Counter()
        self._ours: frozenset[tuple[int, int]] = frozenset()
        self._own_uses: Counter[Range] = Counter()
        self._bytes = 0
        self._sorted: tuple[Range, ...] | None = None
        self.generation = 0
        """Moves when what is known of a file's layout changes."""

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
            self._make_room(handle.pid)
            file = self._take_on(handle, vma)
        file.seen = time.monotonic()
        # Sharing one string: a hundred processes name the same fifty files.
        file.path = file.path if file.path == vma.name else vma.name
        return file

    def _make_room(self, owner: int) -> None:
        """Drops what nobody uses until a process may bring another file: its own first."""
        brought = [file for file in self._by_number.values() if file.owner == owner]
        limit = MAX_FILES_PER_PROCESS if len(self._by_number) < MAX_FILES // 2 else FAIR_FILES
        if len(brought) >= limit and not self._drop_oldest(brought):
            raise TooMuchError(f"it maps over {limit} files of its own")
        if len(self._by_number) >= MAX_FILES and not self._drop_oldest(self._by_number.values()):
            raise TooMuchError(f"over {MAX_FILES} different files are mapped")

    def _drop_oldest(self, files: Iterable[File]) -> bool:
        used = {item.file for item in self._uses}
        settled = time.monotonic() - SETTLE_S
        unused = [file for file in files if file.number not in used and file.seen <= settled]
        if unused:
            self._drop(min(unused, key=lambda file: file.seen))
        return bool(unused)

    def _drop(self, file: File) -> None:
        del self._by_number[file.number], self._by_key[file.device, file.inode]
        file.close()

    def _take_on(self, handle: ProcessHandle, vma: Vma) -> File:
        held = handle.open(f"map_files/{vma.start:x}-{vma.end:x}", os.O_PATH)
        try:
            info = os.fstat(held)
            file = File(self._next, held, vma.device, vma.inode, vma.name, owner=handle.pid)
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
            head = os.pread(file.fd, HEADER_BYTES, 0)
            file.magic, file.layout = head[:4], layout_of(head)
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

    def claim(self, process: tuple[int, int], ranges: Iterable[Range], *, own: bool = False) -> None:
        """Says what process (pid, start time) maps now, in place of what it mapped before. `own`: it is one
        of hostd's.

        Raises:
            TooMuchError: over the bounds for one process; its earlier claim stays.
        """
        claimed = frozenset(ranges)
        if len({item.file for item in claimed}) > MAX_FILES_PER_PROCESS:
            raise TooMuchError(f"over {MAX_FILES_PER_PROCESS} files in one process")
        if sum(item.length for item in claimed) > MAX_TAGGED_PER_PROCESS:
            raise TooMuchError(f"over {MAX_TAGGED_PER_PROCESS} bytes of code and constants in one process")
        new = [item for item in claimed if item not in self._uses]
        size = sum(item.length for item in new)
        if new and self._bytes + size > MAX_TAGGED:
            raise TooMuchError(f"over {MAX_TAGGED} bytes of code and constants in all processes")
        self._uses.update(claimed)
        self._bytes += size
        self._release(process)
        self._claims[process] = claimed
        if own:
            self._ours |= {process}
            self._own_uses.update(claimed)
        self._sorted = None
        for item in new:
            self._bring_in(item)

    def _bring_in(self, item: Range) -> None:
        file = self._by_number[item.file]
        if file.own is not None and only_root_changes(os.fstat(file.fd)):
            populate(file.own.address + item.offset, item.length)

    def _release(self, process: tuple[int, int]) -> None:
        self._sorted = None
        own = process in self._ours
        self._ours -= {process}
        for item in self._claims.pop(process, ()):
            self._uses[item] -= 1
            if own:
                self._own_uses[item] -= 1
            if not self._uses[item]:
                del self._uses[item], self._own_uses[item]
                self._bytes -= item.length

    def wanted(self) -> tuple[Range, ...]:
        """Every segment that any process maps, in order."""
        if self._sorted is None:
            self._sorted = tuple(sorted(self._uses))
        return self._sorted

    def only_ours(self, item: Range) -> bool:
        """Whether none but hostd's own processes map it."""
        return self._own_uses[item] == self._uses[item]

    def claimed(self, process: tuple[int, int]) -> bool:
        return process in self._claims

    def release_ended(self, alive: frozenset[tuple[int, int]], now: float) -> None:
        """Forgets the claims of processes not in `alive`, and files unused for `KEEP_S`."""
        for process in self._claims.keys() - alive:
            self._release(process)
        used = {item.file for item in self._uses}
        for file in list(self._by_number.values()):
            if file.number in used:
                file.unused_since = None
            elif file.unused_since is None:
                file.unused_since = now
            elif now - file.unused_since >= KEEP_S:
                self._drop(file)

    # ── What it is ────────────────────────────────────────────────────────────────────────────────

    def identify_steps(self, number: int) -> Iterator[FileIdentity | None]:
        """SHA-256 of the whole file and tags of its segments, from the same bytes, a millisecond at a time.

        Gives None after each step, the identity once, and then None again while the copy is made that
        differences are shown against; that may be left undone. Between two steps anything else may be
        read. `hostd.measurer.identify.Turns` takes such steps for several files, fairly.

        Raises (from `next`):
            LookupError: no such number (any more), or the file is one that is not read.
            OSError: it cannot be read.
        """
        file = self._by_number.get(number)
        if file is None:
            raise LookupError("no such file")
        if file.own is None:
            raise LookupError(f"{file.path}: {file.refusal}")
        wanted = sorted(item for item in self._uses if item.file == number)[:MAX_SEGMENTS_PER_FILE]
        for step in identify(file, wanted, self._tagger, self._room_for_copies, self.only_ours):
            # The descriptor of a file that was dropped may be another file's by now.
            if self._by_number.get(number) is not file:
                raise LookupError("no such file any more")
            if step is None:
                yield None
                continue
            if (step.magic, step.layout) != (file.magic, file.layout):
                # The headers read when the file was new may not be the ones that this digest covers.
                file.magic, file.layout = step.magic, step.layout
                self.generation += 1
            yield step.identity

    def identify(self, number: int) -> FileIdentity:
        """All steps of `identify_steps` at once.

        Raises:
            LookupError, OSError: as there.
        """
        (identity,) = [step for step in self.identify_steps(number) if step is not None]
        return identity

    def _room_for_copies(self, owner: int) -> tuple[int, int]:
        """Compressed bytes held: of what one process brought, and in all."""
        held = [
            (file.owner == owner, sum(copy.size for copy in file.copies.values()))
            for file in self._by_number.values()
        ]
        return sum(size for own, size in held if own), sum(size for _, size in held)

    def close(self) -> None:
        for file in self._by_number.values():
            file.close()
        self._by_number.clear()
        self._by_key.clear()
        self._claims.clear()
        self._uses.clear()
        self._own_uses.clear()
        self._sorted = None


def _filesystem(fd: int) -> int:
    """Magic number of the filesystem that holds an open file."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer):
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int.from_bytes(buffer.raw[:8], "little")


def only_root_changes(info: os.stat_result) -> bool:
    """Whether nobody but root can cut the file short under a reader."""
    return info.st_uid == 0 and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
