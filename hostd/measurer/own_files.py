"""hostd's own files, in rounds: a few in each reading.

Of each file the first sight takes the SHA-256; after that a round looks at what the filesystem says of it
(device, inode, size, times, owner, mode) and reads the content anew if any of that moved. Because content may
change without any of that (through a block device, say) every file's content is read again in turn, one
file after the other, as slowly as not to be felt.

A file whose name only root's folders lead to is named by the path that it was found under; symbolic links are
not followed, and one that is called like code is named as what cannot be read.

Needs CAP_DAC_READ_SEARCH.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import guestlib
import hostd
from hostd.core.codefile import holds_code
from hostd.core.ownfiles import DROP_INS, OWN_PATHS
from hostd.core.reading_self import MAX_OWN_FILES, OwnFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LOOKS: Final = 48
"""Files looked at in a reading, 4 us each."""
CONTENT_BYTES: Final = 128 << 10
"""Hashed in a reading: 0.08 ms."""
FIRST_LOOKS: Final = 1024
FIRST_BYTES: Final = 16 << 20
"""The same in the first round: 10 ms a reading, so that it ends soon."""
MAX_FILE_BYTES: Final = 256 << 20
_CHUNK: Final = 128 << 10
ATTEMPTS: Final = 8
"""A file that is another one each time that it is read is as good as unreadable."""
_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


class Stamp(NamedTuple):
    """What moves when a file is replaced or written in the usual ways."""

    device: int
    inode: int
    mode: int
    uid: int
    size: int
    modified: int
    changed: int


class _Known(NamedTuple):
    stamp: Stamp
    file: OwnFile


class Part(NamedTuple):
    """What one reading has of a round."""

    number: int
    position: int
    files: tuple[OwnFile, ...]
    complete: bool


def installation() -> tuple[str, ...]:
    """Folders that hostd's code is loaded from, each ending in `/`: the virtual environment, or in a
    checkout the packages themselves."""
    packages = [str(Path(package.__path__[0]).resolve()) for package in (hostd, guestlib)]
    prefix = os.path.join(sys.prefix, "")
    if sys.prefix != sys.base_prefix and all(package.startswith(prefix) for package in packages):
        return (prefix,)
    return tuple(os.path.join(package, "") for package in packages)


class OwnFiles:
    """Reads the files of some folders, and single ones, round after round."""

    def __init__(
        self, roots: Sequence[str], paths: Sequence[str] = OWN_PATHS, folders: Sequence[str] = DROP_INS
    ) -> None:
        self._roots, self._paths, self._folders = tuple(roots), tuple(paths), tuple(folders)
        self._known: dict[str, _Known] = {}
        self._guarded: dict[str, bool] = {}
        self._steps = self._rounds()
        self._content = self._reread()
        self._out: list[OwnFile] = []
        self._number = 1
        self._position = 0
        self._looks = self._bytes = 0.0

    def read(self, share: float = 1.0) -> Part:
        """The next part of the round. `share`, up to 1: of the work of a whole reading, once the first round
        is over. What one reading does too much the next ones do less, and the other way round."""
        first = self._number == 1
        self._looks = FIRST_LOOKS if first else min(self._looks + LOOKS * share, LOOKS)
        self._bytes = FIRST_BYTES if first else min(self._bytes + CONTENT_BYTES * share, CONTENT_BYTES)
        complete = False
        while self._looks > 0 and self._bytes > 0 and not complete:
            complete = next(self._steps)
        if not first:
            while self._bytes > 0 and next(self._content):
                pass
        out, self._out = tuple(self._out), []
        part = Part(self._number, self._position, out, complete)
        self._position += len(out)
        if complete:
            self._number += 1
            self._position = 0
        return part

    # ── Rounds ────────────────────────────────────────────────────────────────────────────────────

    def _rounds(self) -> Iterator[bool]:
        """Steps of endless rounds; gives True at the end of one."""
        while True:
            seen: set[str] = set()
            self._guarded.clear()
            for path, info in self._all():
                self._looks -= 1
                if info is not None and path not in seen and len(seen) < MAX_OWN_FILES:
                    seen.add(path)
                    yield from self._look(path, info)
                else:
                    yield False
            for path in self._known.keys() - seen:
                del self._known[path]
            yield True

    def _all(self) -> Iterator[tuple[str, os.stat_result | None]]:
        for root in self._roots:
            yield from self._walk(root, code=True)
        for folder in self._folders:
            yield from self._walk(folder, code=False)
        for path in self._paths:
            try:
                yield path, os.lstat(path)
            except OSError:
                yield path, None

    def _walk(self, folder: str, *, code: bool) -> Iterator[tuple[str, os.stat_result | None]]:
        waiting = [folder.rstrip("/")]
        while waiting:
            here = waiting.pop()
            try:
                with os.scandir(here) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError:
                yield here, None
                continue
            for entry in found:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    info = os.lstat(entry.path)
                except OSError:
                    yield entry.path, None
                    continue
                mode = info.st_mode if stat.S_ISREG(info.st_mode) else 0
                wanted = not code or holds_code(os.fsencode(entry.name), mode)
                yield entry.path, info if wanted else None

    def _look(self, path: str, info: os.stat_result) -> Iterator[bool]:
        stamp = _stamp(info)
        known = self._known.get(path)
        guarded = self._is_guarded(path, info)
        if known is None or known.stamp != stamp or known.file.guarded != guarded:
            for _ in range(ATTEMPTS):
                digest = b""
                for piece in self._hash(path, stamp):
                    digest = piece
                    yield False
                if digest:
                    break
                # A package manager may have put another file there meanwhile, or none.
                try:
                    now = _stamp(os.lstat(path))
                except OSError:
                    return
                if now == stamp:
                    break
                stamp = now
            known = self._known[path] = _Known(stamp, OwnFile(_name(path), digest, guarded))
        self._out.append(known.file)
        yield False

    def _is_guarded(self, path: str, info: os.stat_result) -> bool:
        folder = os.path.dirname(path)
        if folder not in self._guarded:
            try:
                self._guarded[folder] = _only_root(os.lstat(folder))
            except OSError:
                self._guarded[folder] = False
        return self._guarded[folder] and _only_root(info)

    # ── Content ───────────────────────────────────────────────────────────────────────────────────

    def _hash(self, path: str, stamp: Stamp) -> Iterator[bytes]:
        """Steps of hashing one file: empty bytes after each, at the end the digest, or empty bytes for what
        cannot be read or is another file by now."""
        digest = hashlib.sha256()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        try:
            left = MAX_FILE_BYTES
            while stat.S_ISREG(stamp.mode) and _stamp(os.fstat(fd)) == stamp and left > 0:
                chunk = os.read(fd, _CHUNK)
                if not chunk:
                    yield digest.digest()
                    return
                digest.update(chunk)
                left -= len(chunk)
                self._bytes -= len(chunk)
                yield b""
        except OSError:
            return
        finally:
            os.close(fd)

    def _reread(self) -> Iterator[bool]:
        """Steps of endless rounds over the content of all files; gives False when there is none."""
        while True:
            for path, known in sorted(self._known.items()):
                digest = b""
                for piece in self._hash(path, known.stamp):
                    digest = piece
                    yield True
                if digest != known.file.sha256 and self._known.get(path) == known:
                    # The next look says what it is by now; its stamp tells a change from a replacement.
                    self._known[path] = _Known(
                        known.stamp, OwnFile(known.file.path, digest, known.file.guarded)
                    )
                self._bytes -= 1024
                yield True
            if not self._known:
                yield False


def _stamp(info: os.stat_result) -> Stamp:
    return Stamp(
        info.st_dev, info.st_ino, info.st_mode, info.st_uid, info.st_size, info.st_mtime_ns, info.st_ctime_ns
    )


def _only_root(info: os.stat_result) -> bool:
    return info.st_uid == 0 and not (info.st_mode & _OTHERS and not stat.S_ISLNK(info.st_mode))


def _name(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")[:4096]
