"""The kernel's IMA measurement log: entries, and their replay into PCR 10 (pure).

Format of /sys/kernel/security/ima/binary_runtime_measurements (security/integrity/ima/ima_fs.c,
`ima_measurements_show`; little-endian as on x86):

    u32 PCR | 20 bytes template digest (SHA-1) | u32 length | template name |
    u32 length | template data                       (every template but `ima`)

Template data is a row of fields, each `u32 length | bytes` (ima_template_lib.c): `d-ng` is
`algorithm:` NUL digest, `n-ng` a path with NUL, then a signature (`ima-sig`) or bytes (`ima-buf`).
The first template, `ima`, has no lengths: a 20-byte digest and `u32 length | path`.

The SHA-256 bank (since 5.8) is extended with SHA-256 over the template data; an entry whose template
digest is 20 zero bytes is a violation, and extends 32 bytes of 0xff. A template this module does not
know is kept whole and replays all the same; it has no path and no digest.

Trailing bytes that are no whole entry yet are left to the caller; anything else that is not of the
format is a `MalformedLogError`.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

PCR: Final = 10
PCR_START: Final = bytes(32)
VIOLATION_EXTENDS: Final = b"\xff" * 32
MAX_TEMPLATE_NAME: Final = 64
"""IMA_TEMPLATE_NAME_FMT_MAX_LEN is 24 for names; a custom format string may be longer."""
MAX_TEMPLATE_DATA: Final = 512 << 10
"""An entry of `ima-buf` may hold a whole kernel command line, a key, or an SELinux policy's state."""
_MAX_PATH: Final = 4096
_MAX_DIGEST: Final = 64
_SHA1: Final = 20
_LEGACY_NAME_BYTES: Final = 256
"""IMA_EVENT_NAME_LEN_MAX + 1: the name field of `ima` is padded to it before hashing."""
_HEAD: Final = struct.Struct("<I20sI")
_LENGTH: Final = struct.Struct("<I")
_PATH_TEMPLATES: Final = {b"ima-ng": 2, b"ima-sig": 3, b"ima-buf": 3, b"ima-ngv2": 2, b"ima-sigv2": 3,
                          b"ima-modsig": 5}  # fmt: skip


class MalformedLogError(Exception):
    """The bytes are not a measurement log. `offset` is where the entry starts that is not one."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"entry at byte {offset}: {what}")
        self.offset = offset


class Entry(NamedTuple):
    """One measurement. A tuple, as logs have a hundred thousand: a frozen dataclass takes thrice the time."""

    pcr: int
    template: str
    extends: bytes
    """What the SHA-256 bank was extended with, 32 bytes."""
    violation: bool
    path: str
    """Empty in a template this module does not know."""
    algorithm: str
    digest: bytes
    """Of the file's content; empty if unknown, zeros in a violation."""
    end: int
    """Byte after the entry, from the start of the bytes parsed."""

    @property
    def content(self) -> str:
        """`sha256:<hex>`."""
        return f"{self.algorithm}:{self.digest.hex()}"


def parse_entries(data: bytes, start: int = 0) -> list[Entry]:
    """All whole entries from byte `start` on. The last one's `end` says how far they go.

    Raises:
        MalformedLogError: an entry cannot be one, whatever follows.
    """
    entries: list[Entry] = []
    position = start
    while (entry := _parse_entry(data, position)) is not None:
        entries.append(entry)
        position = entry.end
    return entries


def whole_entries(data: bytes) -> int:
    """Byte after the last whole entry, 0 if there is none: where `parse_entries` gets to, without looking
    into template data (five times as fast).

    Raises:
        MalformedLogError: an entry's frame cannot be one.
    """
    start, size = 0, len(data)
    while size - start >= _HEAD.size:
        pcr, _digest, name_length = _HEAD.unpack_from(data, start)
        if pcr > 23 or not 0 < name_length <= MAX_TEMPLATE_NAME:
            raise MalformedLogError(start, f"PCR {pcr}, template name of {name_length} bytes")
        at = start + _HEAD.size + name_length
        if data[at - name_length : at] == b"ima":
            at += _SHA1
        if size - at < _LENGTH.size:
            break
        (length,) = _LENGTH.unpack_from(data, at)
        if length > MAX_TEMPLATE_DATA:
            raise MalformedLogError(start, f"template data of {length} bytes")
        if at + _LENGTH.size + length > size:
            break
        start = at + _LENGTH.size + length
    return start


def _parse_entry(data: bytes, start: int) -> Entry | None:
    if len(data) - start < _HEAD.size:
        return None
    pcr, template_digest, name_length = _HEAD.unpack_from(data, start)
    if pcr > 23:
        raise MalformedLogError(start, f"PCR {pcr}")
    if not 0 < name_length <= MAX_TEMPLATE_NAME:
        raise MalformedLogError(start, f"template name of {name_length} bytes")
    at = start + _HEAD.size
    if len(data) - at < name_length:
        return None
    name = data[at : at + name_length]
    if name not in _PATH_TEMPLATES and not all(33 <= byte <= 126 for byte in name):
        raise MalformedLogError(start, "template name is not printable")
    at += name_length
    violation = template_digest == bytes(_SHA1)
    if name == b"ima":
        return _parse_legacy(data, start, at, pcr, violation)
    if len(data) - at < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(data, at)
    at += _LENGTH.size
    if length > MAX_TEMPLATE_DATA:
        raise MalformedLogError(start, f"template data of {length} bytes")
    if len(data) - at < length:
        return None
    body = data[at : at + length]
    path, algorithm, digest = "", "", b""
    if name in _PATH_TEMPLATES:
        path, algorithm, digest = _parse_fields(body, _PATH_TEMPLATES[name], start)
    extends = VIOLATION_EXTENDS if violation else hashlib.sha256(body).digest()
    return Entry(pcr, name.decode(), extends, violation, path, algorithm, digest, at + length)


def _parse_fields(body: bytes, count: int, start: int) -> tuple[str, str, bytes]:
    fields: list[bytes] = []
    at, size = 0, len(body)
    while at < size:
        if len(fields) == count or size - at < 4:
            raise MalformedLogError(start, "template data does not split into its fields")
        end = at + 4 + int.from_bytes(body[at : at + 4], "little")
        if end > size:
            raise MalformedLogError(start, "a field is longer than the template data")
        fields.append(body[at + 4 : end])
        at = end
    if len(fields) != count:
        raise MalformedLogError(start, f"{len(fields)} fields instead of {count}")
    label, nul, digest = fields[0].partition(b"\0")
    # `sha256:`; the v2 templates say `ima:sha256:`, or `verity:sha256:` for another kind of digest.
    if not nul or not label.endswith(b":") or not 0 < len(digest) <= _MAX_DIGEST or not label.isascii():
        raise MalformedLogError(start, "the digest field is not `algorithm:` NUL digest")
    name = fields[1]
    if not name.endswith(b"\0") or name.count(b"\0") != 1 or len(name) > _MAX_PATH + 1:
        raise MalformedLogError(start, "the path field is not a string with its NUL")
    return _text(name[:-1]), label[:-1].decode().removeprefix("ima:"), digest


def _parse_legacy(data: bytes, start: int, at: int, pcr: int, violation: bool) -> Entry | None:
    if len(data) - at < _SHA1 + _LENGTH.size:
        return None
    digest = data[at : at + _SHA1]
    (length,) = _LENGTH.unpack_from(data, at + _SHA1)
    at += _SHA1 + _LENGTH.size
    if length >= _LEGACY_NAME_BYTES:
        raise MalformedLogError(start, f"file name of {length} bytes")
    if len(data) - at < length:
        return None
    name = data[at : at + length]
    if b"\0" in name:
        raise MalformedLogError(start, "NUL in a file name")
    hashed = hashlib.sha256(digest + name.ljust(_LEGACY_NAME_BYTES, b"\0")).digest()
    extends = VIOLATION_EXTENDS if violation else hashed
    return Entry(pcr, "ima", extends, violation, _text(name), "sha1", digest, at + length)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def extend(pcr: bytes, entry: Entry) -> bytes:
    """PCR 10 of the SHA-256 bank after `entry`, from what it was before."""
    if entry.pcr != PCR:
        return pcr
    return hashlib.sha256(pcr + entry.extends).digest()


def replay(entries: Iterable[Entry], pcr: bytes = PCR_START) -> bytes:
    """PCR 10 after all `entries`. 32 bytes."""
    for entry in entries:
        pcr = extend(pcr, entry)
    return pcr
