"""Digests of everything on disk that may hold code, for making reference values.

`hostd.core.codefile` says which those are; below `/usr/share/` it is every file, because what QEMU reads
there is in the kernel's log whatever it is. A prefix may be a file, or lead to one. Other symbolic links are
not followed and other filesystems not kept out; a file with several names is hashed once and listed under
each. A survey of hostd's own installation folder has hostd's files elsewhere too, whatever they hold
(`hostd.core.ownfiles`).
The walk is cut into steps of some milliseconds, so that readings go on meanwhile.

Needs CAP_DAC_READ_SEARCH.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING, Final

from hostd.core.codefile import holds_code
from hostd.core.ownfiles import DROP_INS, OWN_PATHS
from hostd.measurer.own_files import installation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STEP_BYTES: Final = 1 << 20
"""Hashed in one step: 0.6 ms."""
STEP_FILES: Final = 64
PART_FILES: Final = 1000
"""In one part of the answer, below the 1024 of `SurveyPart`."""
MAX_FILES: Final = 1_000_000
DATA: Final = b"/usr/share/"


def survey(prefixes: Sequence[str]) -> Iterator[dict[str, bytes] | None]:
    """Walks the prefixes; gives None after each step, and a part of the answer (path → SHA-256) when
    there is one. A file that goes away or cannot be read is left out: it then has no reference value."""
    part: dict[str, bytes] = {}
    digests: dict[tuple[int, int], bytes] = {}
    count = 0
    for number, (path, info) in enumerate(_files(prefixes)):
        if number % STEP_FILES == 0:
            yield None
        if info is None:
            continue
        key = (info.st_dev, info.st_ino)
        if key not in digests:
            digest = hashlib.sha256()
            try:
                for chunk in _chunks(path):
                    digest.update(chunk)
                    yield None
            except OSError:
                continue
            digests[key] = digest.digest()
        part[path.decode("utf-8", "backslashreplace")] = digests[key]
        count += 1
        if len(part) >= PART_FILES or count >= MAX_FILES:
            yield part
            part = {}
        if count >= MAX_FILES:
            return
    if part:
        yield part


def _files(prefixes: Sequence[str]) -> Iterator[tuple[bytes, os.stat_result | None]]:
    seen: set[bytes] = set()
    # First: what counts here whatever it holds may stand below a prefix where only code does.
    if any(root.startswith(prefix) for root in installation() for prefix in prefixes):
        for path in _own():
            if path not in seen:
                seen.add(path)
                yield path, _taken(path, None)
    for prefix in prefixes:
        if os.path.isfile(prefix):
            path = os.fsencode(os.path.realpath(prefix))
            if path not in seen:
                seen.add(path)
                yield path, _taken(path, None)
        for directory, _, names in os.walk(os.fsencode(prefix)):
            for name in names:
                path = os.path.join(directory, name)
                if path in seen or len(path) > 4096:
                    continue
                seen.add(path)
                yield path, _taken(path, None if path.startswith(DATA) else name)


def _own() -> Iterator[bytes]:
    yield from map(os.fsencode, OWN_PATHS)
    for folder in DROP_INS:
        for directory, _, names in os.walk(os.fsencode(folder)):
            yield from (os.path.join(directory, name) for name in names)


def _taken(path: bytes, name: bytes | None) -> os.stat_result | None:
    """The file, if it is a regular one that holds code, or any regular one without a name to go by."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISREG(info.st_mode):
        return None
    return info if name is None or holds_code(name, info.st_mode) else None


def _chunks(path: bytes) -> Iterator[bytes]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while chunk := os.read(fd, STEP_BYTES):
            yield chunk
    finally:
        os.close(fd)
