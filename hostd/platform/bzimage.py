"""Unpacks a bzImage: the `vmlinux` inside it, and the table of its relocations.

The layout is that of Documentation/arch/x86/boot.rst: a setup header at 0x1f1, behind the real-mode
code the protected-mode code, and in that the payload. The payload is `vmlinux` (an ELF file without
symbols) with its relocations behind it, compressed (arch/x86/boot/compressed/Makefile); all formats but
gzip have the unpacked size, 4 bytes, behind them. Modules are compressed in the same formats.

Nothing here is trusted because it unpacks; the caller has the digest of the file.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from typing import TYPE_CHECKING, Final

import lz4.block
import zstandard

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_IMAGE_BYTES: Final = 128 << 20
"""Of the file; Debian's is 14 MB."""
MAX_UNPACKED_BYTES: Final = 512 << 20
"""Debian's is 53 MB."""
_SETUP: Final = 0x1F1
_MAGIC: Final = 0x202
_PAYLOAD: Final = 0x248
_LZ4_MAGIC: Final = bytes.fromhex("02214c18")
_LZ4_BLOCK: Final = 8 << 20
"""Bytes that each block of the legacy format unpacks to; the last may have fewer."""
_BROKEN: Final = (
    *(ValueError, EOFError, OSError, MemoryError),
    *(zlib.error, lzma.LZMAError, zstandard.ZstdError, lz4.block.LZ4BlockError),
)


class MalformedImageError(Exception):
    """The bytes are no bzImage, or what is in it does not unpack."""


def unpack_image(image: bytes) -> bytes:
    """The unpacked payload: an ELF file followed by its relocations.

    Raises:
        MalformedImageError: not a bzImage of boot protocol 2.08 or later, or damaged.
    """
    if len(image) > MAX_IMAGE_BYTES:
        raise MalformedImageError(f"over {MAX_IMAGE_BYTES} bytes")
    if len(image) < _PAYLOAD + 8 or image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise MalformedImageError("no setup header")
    # 0 means 4, for images older than the field.
    sectors = image[_SETUP] or 4
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = (sectors + 1) * 512 + offset
    if not length or start + length > len(image):
        raise MalformedImageError("the payload lies outside the file")
    return unpack(image[start : start + length], trailer=4)


def unpack(data: bytes, *, trailer: int = 0) -> bytes:
    """Unpacks a file by its magic; one that is an ELF file is returned as it is.

    `trailer`: bytes of unpacked size that may stand behind the packed data.

    Raises:
        MalformedImageError: of no known format, damaged, or larger than `MAX_UNPACKED_BYTES`.
    """
    if data.startswith(b"\x7fELF"):
        return data
    for magic, method in _METHODS:
        if data.startswith(magic):
            try:
                return method(data, trailer)
            except _BROKEN as error:
                raise MalformedImageError(f"does not unpack: {error}") from error
    raise MalformedImageError(f"unknown compression {data[:6].hex(' ')}")


def _bounded(out: bytes) -> bytes:
    if len(out) > MAX_UNPACKED_BYTES:
        raise MalformedImageError(f"unpacks to over {MAX_UNPACKED_BYTES} bytes")
    return out


def _lz4(data: bytes, trailer: int) -> bytes:
    """Legacy frame: magic, then blocks of a 4-byte length and that many bytes."""
    end = len(data) - trailer
    at, out = len(_LZ4_MAGIC), bytearray()
    while at + 4 <= end:
        length = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if not 0 < length <= end - at:
            raise MalformedImageError("an LZ4 block lies outside the payload")
        out += lz4.block.decompress(data[at : at + length], uncompressed_size=_LZ4_BLOCK)
        at += length
        if len(out) > MAX_UNPACKED_BYTES:
            raise MalformedImageError(f"unpacks to over {MAX_UNPACKED_BYTES} bytes")
    if at != end or not out:
        raise MalformedImageError("ends amid a block")
    return bytes(out)


def _gzip(data: bytes, _trailer: int) -> bytes:
    return _whole(zlib.decompressobj(31), data)


def _whole(unpacker: zlib._Decompress, data: bytes) -> bytes:
    out = unpacker.decompress(data, MAX_UNPACKED_BYTES + 1)
    if not unpacker.eof and len(out) <= MAX_UNPACKED_BYTES:
        raise MalformedImageError("ends too early")
    return _bounded(out)


def _xz(data: bytes, _trailer: int) -> bytes:
    return _stream(lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=MAX_UNPACKED_BYTES), data)


def _bzip2(data: bytes, _trailer: int) -> bytes:
    return _stream(bz2.BZ2Decompressor(), data)


def _stream(unpacker: lzma.LZMADecompressor | bz2.BZ2Decompressor, data: bytes) -> bytes:
    out = unpacker.decompress(data, MAX_UNPACKED_BYTES + 1)
    if not unpacker.eof and len(out) <= MAX_UNPACKED_BYTES:
        raise MalformedImageError("ends too early")
    return _bounded(out)


def _zstd(data: bytes, _trailer: int) -> bytes:
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    out = bytearray()
    for at in range(0, len(data), 1 << 20):
        out += unpacker.decompress(data[at : at + (1 << 20)])
        if len(out) > MAX_UNPACKED_BYTES:
            raise MalformedImageError(f"unpacks to over {MAX_UNPACKED_BYTES} bytes")
        if unpacker.eof:
            return bytes(out)
    raise MalformedImageError("ends too early")


_METHODS: Final[tuple[tuple[bytes, Callable[[bytes, int], bytes]], ...]] = (
    (_LZ4_MAGIC, _lz4),
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\x00", _xz),
    (b"\x5d\x00\x00", _xz),
    (b"BZh", _bzip2),
    (b"\x28\xb5\x2f\xfd", _zstd),
)
