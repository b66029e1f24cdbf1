"""The format of an encrypted file, version 1, without any I/O (docs/files.md).

    header   magic "HDF1" (4) || segment size as a power of two, 12 to 20 (1) || salt (16)
             || length of the wrapped data key (2, big endian) || wrapped data key || HMAC-SHA-256 (32)
    segments AES-256-GCM ciphertext and tag (16) each; all but the last hold exactly a segment's plaintext

This is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár, CRYPTO 2015) as age uses it: the nonce of a segment is
its number (11 bytes, big endian) and one byte that is 1 for the last and 0 for the others. An empty last
segment stands only in an empty file, so that every plaintext has one form.

Both keys come from the data key by HKDF-SHA256 (RFC 5869) with the file's salt: one for the segments, one
for the header's HMAC, which covers the header and the additional data. No key meets a nonce twice, even if
a data key serves several files. The HMAC is verified before any segment, and commits to the data key.

What is damaged is named (`Damage`): when a segment does not open where it stands, the reader tries whether
it would open elsewhere. That is for people; nothing is released on it.
"""

from __future__ import annotations

import enum
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from guestlib.attest.canonical import canonical_aad
from guestlib.errors import InvalidFileError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAGIC: Final = b"HDF1"
SALT_BYTES: Final = 16
TAG_BYTES: Final = 16
MAC_BYTES: Final = 32
DATA_KEY_BYTES: Final = 32
FIXED_BYTES: Final = len(MAGIC) + 1 + SALT_BYTES + 2
"""What comes before the wrapped data key and says how long it is."""
MIN_BITS: Final = 12
MAX_BITS: Final = 20
"""A reader holds one segment in memory: 1 MiB at most."""
DEFAULT_BITS: Final = 18
"""256 KiB: 16 bytes of tag on each are nothing, and a file's first bytes come soon."""
MAX_WRAPPED_BYTES: Final = 4096
"""A data key wrapped by hostd has 88 bytes."""
MAX_SEGMENTS: Final = 2**32
"""Messages under one AES-256-GCM key (SP 800-38D, section 8.3): 1 PiB in the default size."""
_NEAR: Final = 32
"""Places to either side where a segment that does not open is tried."""


class Damage(enum.StrEnum):
    """What is wrong with a file. Names are append-only."""

    NO_FILE = "not a hostd file"
    VERSION = "a version of the format that this reader does not know"
    HEADER = "the header was altered or is another file's, or the additional data is not this file's"
    KEY = "the wrapped key is no data key"
    TRUNCATED = "the end is missing"
    EXTENDED = "something follows the end"
    MOVED = "a segment stands where another belongs: moved, repeated or left out"
    ALTERED = "a segment was altered, cut, or is another file's"


class FileError(InvalidFileError):
    """An encrypted file does not verify. `segment` is the number (from 0) of the one that failed, if any."""

    def __init__(self, damage: Damage, segment: int | None = None, more: str = "") -> None:
        where = "file" if segment is None else f"segment {segment}"
        super().__init__(where, damage.value + more)
        self.damage = damage
        self.segment = segment


@dataclass(frozen=True, slots=True)
class Header:
    """A header as read; `mac` is not verified yet (`Opener` does)."""

    bits: int
    salt: bytes
    wrapped: bytes
    mac: bytes = b""

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"segments of 2^{self.bits} bytes ({MIN_BITS} to {MAX_BITS})")
        if len(self.salt) != SALT_BYTES:
            raise ValueError(f"a salt of {len(self.salt)} bytes")
        if not 0 < len(self.wrapped) <= MAX_WRAPPED_BYTES:
            raise ValueError(f"a wrapped key of {len(self.wrapped)} bytes (limit {MAX_WRAPPED_BYTES})")

    @property
    def segment_bytes(self) -> int:
        """Plaintext bytes of a segment that is not the last."""
        return 1 << self.bits

    def encoded(self) -> bytes:
        """All of it but the HMAC."""
        length = len(self.wrapped).to_bytes(2, "big")
        return MAGIC + bytes([self.bits]) + self.salt + length + self.wrapped


def rest_of_header(fixed: bytes) -> int:
    """How many bytes of header follow the first `FIXED_BYTES`.

    Raises:
        FileError: those are not the beginning of a file.
    """
    if len(fixed) < FIXED_BYTES or fixed[:3] != MAGIC[:3]:
        raise FileError(Damage.NO_FILE)
    if fixed[:4] != MAGIC:
        raise FileError(Damage.VERSION)
    length = int.from_bytes(fixed[-2:], "big")
    if not 0 < length <= MAX_WRAPPED_BYTES or not MIN_BITS <= fixed[4] <= MAX_BITS:
        raise FileError(Damage.HEADER)
    return length + MAC_BYTES


def parse_header(data: bytes) -> Header:
    """The header in `data`, which is exactly one.

    Raises:
        FileError: it is not.
    """
    rest = rest_of_header(data[:FIXED_BYTES])
    if len(data) != FIXED_BYTES + rest:
        raise FileError(Damage.TRUNCATED, more=": it ends within the header")
    salt = data[len(MAGIC) + 1 : FIXED_BYTES - 2]
    return Header(data[4], salt, data[FIXED_BYTES:-MAC_BYTES], data[-MAC_BYTES:])


class _Keys:
    """The two keys of one file.

    Raises:
        FileError: the data key has not 32 bytes.
    """

    def __init__(self, data_key: bytes, header: Header) -> None:
        if len(data_key) != DATA_KEY_BYTES:
            raise FileError(Damage.KEY)
        self.aead = AESGCM(_derive(data_key, header.salt, b"hostd file v1 segments"))
        self._header = _derive(data_key, header.salt, b"hostd file v1 header")

    def mac(self, header: Header, aad: Mapping[str, str]) -> bytes:
        return hmac.digest(self._header, header.encoded() + canonical_aad(aad), "sha256")


def _derive(data_key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=salt, info=info).derive(data_key)


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\1" if last else b"\0")


class Sealer:
    """Makes one file: `header`, then `seal` for each segment in order, the last with `last`."""

    def __init__(self, data_key: bytes, header: Header, aad: Mapping[str, str]) -> None:
        keys = _Keys(data_key, header)
        self.header = header.encoded() + keys.mac(header, aad)
        self._aead = keys.aead
        self._size = header.segment_bytes
        self._number = 0
        self._ended = False

    def seal(self, plaintext: bytes, *, last: bool) -> bytes:
        """The next segment.

        Raises:
            ValueError: the size is not that of a segment, or the file has ended or is too long.
        """
        fits = 0 < len(plaintext) <= self._size or (not plaintext and last and self._number == 0)
        if self._ended or not fits or not (last or len(plaintext) == self._size):
            raise ValueError("this is no segment of the file")
        if self._number >= MAX_SEGMENTS:
            raise ValueError("the file has too many segments")
        sealed = self._aead.encrypt(_nonce(self._number, last), plaintext, None)
        self._number += 1
        self._ended = last
        return sealed


class Opener:
    """Reads one file: `open` for each segment in order, the last with `last` (nothing follows it).

    Raises:
        FileError: the header is not this data key's, or not for this additional data.
    """

    def __init__(self, data_key: bytes, header: Header, aad: Mapping[str, str]) -> None:
        keys = _Keys(data_key, header)
        if not hmac.compare_digest(keys.mac(header, aad), header.mac):
            raise FileError(Damage.HEADER)
        self._aead = keys.aead
        self._size = header.segment_bytes
        self._number = 0

    def open(self, sealed: bytes, *, last: bool) -> bytes:
        """The plaintext of the next segment, verified.

        Raises:
            FileError: it is not the segment that belongs here. Nothing of the file may be read on.
        """
        number = self._number
        if not sealed and last:
            raise FileError(Damage.TRUNCATED, number)
        plaintext = self._try(sealed, number, last) if number < MAX_SEGMENTS else None
        if plaintext is None:
            raise FileError(self._damage(sealed, last), number)
        if (not last and len(plaintext) != self._size) or (not plaintext and number):
            raise FileError(Damage.ALTERED, number)  # made by somebody with the key, not in the one form
        self._number += 1
        return plaintext

    def _try(self, sealed: bytes, number: int, last: bool) -> bytes | None:
        try:
            return self._aead.decrypt(_nonce(number, last), sealed, None)
        except (InvalidTag, ValueError):
            return None

    def _damage(self, sealed: bytes, last: bool) -> Damage:
        """Why a segment does not open where it stands."""
        if self._try(sealed, self._number, not last) is not None:
            return Damage.TRUNCATED if last else Damage.EXTENDED
        first = max(0, self._number - _NEAR)
        for number in range(first, self._number + _NEAR + 1):
            if any(self._try(sealed, number, end) is not None for end in (False, True)):
                return Damage.MOVED
        return Damage.ALTERED
