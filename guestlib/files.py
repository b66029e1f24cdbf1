"""Files and streams of any size under a key of hostd, in constant memory (docs/files.md).

The host makes a data key for each file (`GenerateDataKey`) and opens it again (`Decrypt`); the data itself is
encrypted and decrypted here, segment by segment, and never leaves this machine. Memory is bounded by some
segments, whatever the size. Sources and targets may be pipes: nothing is sought.

- `encrypt_file` and `decrypt_file` never leave a part of a file under the target's name: they write beside
  it, bring it to the disk and rename it, or leave nothing.
- `decrypt_stream` writes no byte that was not verified, but it writes a segment before it has seen the
  next: what came out before an error is a true beginning of the plaintext, not all of it. Use none of it.

Needs `cryptography`, as `guestlib.attest` does.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

from guestlib import filestream
from guestlib.errors import InvalidCiphertextError, TransportError
from guestlib.filestream import DEFAULT_BITS, Damage, FileError, Header, Opener, Sealer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from guestlib.wire.messages import DataKey, Decrypted

    Progress = Callable[[int], None]
    """Called after each segment with the plaintext bytes done so far."""


class Keys(Protocol):
    """What is needed of a `Client`."""

    def generate_data_key(
        self, key: str, aad: Mapping[str, str] | None = None, *, length: int = 32
    ) -> DataKey: ...

    def decrypt(
        self, ciphertext: bytes, aad: Mapping[str, str] | None = None, *, key: str | None = None
    ) -> Decrypted: ...


@dataclass(frozen=True, slots=True)
class Transferred:
    """What was encrypted or decrypted, and under which key and version."""

    key: str
    version: int
    plaintext_bytes: int
    file_bytes: int
    """Of the encrypted form."""


_TEMPORARY: Final = ".part"


def encrypt_stream(
    keys: Keys,
    key: str,
    source: BinaryIO,
    target: BinaryIO,
    aad: Mapping[str, str] | None = None,
    *,
    segment_bits: int = DEFAULT_BITS,
    progress: Progress | None = None,
) -> Transferred:
    """Encrypts `source` to its end into `target`, under a fresh data key wrapped by `key`.

    `aad` is bound to the file and not stored in it; segments have 2^`segment_bits` bytes (12 to 20).

    Raises:
        HostdError: the host refused, or cannot be reached.
        OSError: reading or writing failed.
        ValueError: `segment_bits`.
    """
    aad = dict(aad or {})
    salt = os.urandom(filestream.SALT_BYTES)
    Header(segment_bits, salt, b"-")  # a mistake is found before a key is asked for
    made = keys.generate_data_key(key, aad, length=filestream.DATA_KEY_BYTES)
    if made.plaintext is None:
        raise TransportError("the host gave no data key")
    header = Header(segment_bits, salt, made.ciphertext)
    sealer = Sealer(made.plaintext, header, aad)
    _write(target, sealer.header)
    done, size = 0, len(sealer.header)
    for segment, last in _segments(source, header.segment_bytes):
        sealed = sealer.seal(segment, last=last)
        _write(target, sealed)
        done, size = done + len(segment), size + len(sealed)
        if progress is not None:
            progress(done)
    return Transferred(made.key, made.version, done, size)


def decrypt_stream(
    keys: Keys,
    source: BinaryIO,
    target: BinaryIO,
    aad: Mapping[str, str] | None = None,
    *,
    key: str | None = None,
    progress: Progress | None = None,
) -> Transferred:
    """Decrypts the file in `source` into `target`, segment by segment as they are verified.

    With `key`, only a file under that key.

    Raises:
        FileError: the file does not verify; it says what is wrong and where. What was written before is
            a beginning of the plaintext: throw it away.
        HostdError: the host refused, or cannot be reached.
        OSError: reading or writing failed.
    """
    aad = dict(aad or {})
    head = _read(source, filestream.FIXED_BYTES)
    head += _read(source, filestream.rest_of_header(head))
    header = filestream.parse_header(head)
    try:
        opened = keys.decrypt(header.wrapped, aad, key=key)
    except InvalidCiphertextError as error:
        raise FileError(Damage.HEADER) from error
    opener = Opener(opened.plaintext, header, aad)
    done, size = 0, len(head)
    for sealed, last in _segments(source, header.segment_bytes + filestream.TAG_BYTES):
        segment = opener.open(sealed, last=last)
        _write(target, segment)
        done, size = done + len(segment), size + len(sealed)
        if progress is not None:
            progress(done)
    return Transferred(opened.key, opened.version, done, size)


def encrypt_file(
    keys: Keys,
    key: str,
    source: str | Path,
    target: str | Path,
    aad: Mapping[str, str] | None = None,
    *,
    segment_bits: int = DEFAULT_BITS,
    progress: Progress | None = None,
) -> Transferred:
    """`encrypt_stream` of a file, whole or not at all; see `replacing` for the target."""
    with open(source, "rb", buffering=0) as reader, replacing(target) as writer:
        return encrypt_stream(keys, key, reader, writer, aad, segment_bits=segment_bits, progress=progress)


def decrypt_file(
    keys: Keys,
    source: str | Path,
    target: str | Path,
    aad: Mapping[str, str] | None = None,
    *,
    key: str | None = None,
    progress: Progress | None = None,
) -> Transferred:
    """`decrypt_stream` of a file, whole or not at all; see `replacing` for the target."""
    with open(source, "rb", buffering=0) as reader, replacing(target) as writer:
        return decrypt_stream(keys, reader, writer, aad, key=key, progress=progress)


@contextlib.contextmanager
def replacing(target: str | Path) -> Iterator[BinaryIO]:
    """A file that takes the target's name when the block ends, and is gone if it ends by an exception.

    It is written in the target's folder with mode 0600, brought to the disk, renamed, and the folder brought
    to the disk. What was there is replaced; a symbolic link stays and what it leads to is replaced. After a
    crash a file whose name ends in `.part` may be left, never a part under the target's name.

    Raises:
        ValueError: the target is there and is no regular file.
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(target))
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{target}: not a regular file")
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    try:
        with open(descriptor, "wb", buffering=0) as writer:
            yield writer
            os.fsync(descriptor)
        os.rename(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ── Reading and writing ───────────────────────────────────────────────────────────────────────────


def _segments(source: BinaryIO, size: int) -> Iterator[tuple[bytes, bool]]:
    """The source in pieces of `size` bytes, each with whether it is the last; one empty piece if it is empty.

    A piece is known to be the last when nothing follows it: one more is read ahead.
    """
    piece = _read(source, size)
    while True:
        following = _read(source, size) if len(piece) == size else b""
        yield piece, not following
        if not following:
            return
        piece = following


def _read(source: BinaryIO, size: int) -> bytes:
    """`size` bytes, less only at the end: a pipe gives what it has.

    Raises:
        BlockingIOError: the source does not wait for data.
    """
    parts: list[bytes] = []
    left = size
    while left:
        part = source.read(left)
        if part is None:
            raise BlockingIOError("the source is not in blocking mode")
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _write(target: BinaryIO, data: bytes) -> None:
    """All of it: a raw file may take a part.

    Raises:
        BlockingIOError: the target does not wait until it can take data.
    """
    rest = memoryview(data)
    while rest:
        taken = target.write(rest)
        if taken is None:
            raise BlockingIOError("the target is not in blocking mode")
        rest = rest[taken:]
