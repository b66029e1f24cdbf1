"""The changing part of a guest's initramfs: guestlib and the Python packages it needs.

The kernel unpacks several cpio archives one after the other, so this part is appended, in L1, to the
``guest-base.cpio`` that came with the image (``guest-base.sh``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

FOLDER: Final = 0o040755
FILE: Final = 0o100000
TRAILER: Final = "TRAILER!!!"


def cpio(files: Iterable[tuple[PurePosixPath, Path]]) -> bytes:
    """A "newc" archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst).

    ``files`` are pairs of a path in the archive, relative to its root, and a local regular file.
    Folders come before what is in them; everything belongs to root and has the time 0.
    """
    archive = bytearray()
    known = {PurePosixPath(".")}
    serial = 0
    for name, source in files:
        for folder in reversed(name.parents):
            if folder not in known:
                known.add(folder)
                serial += 1
                archive += _entry(serial, str(folder), FOLDER, b"")
        serial += 1
        mode = FILE | (0o755 if os.access(source, os.X_OK) else 0o644)
        archive += _entry(serial, str(name), mode, source.read_bytes())
    return bytes(archive + _entry(0, TRAILER, 0, b""))


def tree(folder: Path, at: str) -> Iterator[tuple[PurePosixPath, Path]]:
    """All regular files below ``folder``, to appear at the path ``at``."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield PurePosixPath(at) / path.relative_to(folder).as_posix(), path


def _entry(serial: int, name: str, mode: int, data: bytes) -> bytes:
    links, owner, device, checksum = 1, 0, 0, 0
    fields = (
        *(serial, mode, owner, owner, links, 0, len(data)),
        *(device, device, device, device, len(name) + 1, checksum),
    )
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
