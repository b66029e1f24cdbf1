"""Unpacking kernel images and modules, in every format that kernels are packed in."""

from __future__ import annotations

import bz2
import contextlib
import lzma
import random
import struct
import zlib

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hostd.platform import bzimage
from hostd.platform.bzimage import MalformedImageError, unpack, unpack_image

PAYLOAD = b"\x7fELF" + bytes(range(256)) * 400


def _gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def _lz4(data: bytes) -> bytes:
    out = bytes.fromhex("02214c18")
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


FORMATS = {
    "gzip": _gzip,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "lz4": _lz4,
}


def image(payload: bytes, *, sectors: int = 39, offset: int = 100) -> bytes:
    head = bytearray((sectors + 1) * 512)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, offset, len(payload))
    return bytes(head) + bytes(offset) + payload + b"trailing code"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    packed = FORMATS[name](PAYLOAD) + len(PAYLOAD).to_bytes(4, "little")
    if name == "gzip":
        packed = packed[:-4]
    assert unpack_image(image(packed)) == PAYLOAD
    assert unpack(FORMATS[name](PAYLOAD)) == PAYLOAD


def test_a_plain_elf_file_is_itself() -> None:
    assert unpack(PAYLOAD) == PAYLOAD


@pytest.mark.parametrize("name", FORMATS)
def test_cut_short(name: str) -> None:
    packed = FORMATS[name](PAYLOAD)
    for size in (7, len(packed) // 2, len(packed) - 1):
        with pytest.raises(MalformedImageError):
            unpack(packed[:size])


@pytest.mark.parametrize("name", FORMATS)
def test_what_unpacks_to_too_much_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bzimage, "MAX_UNPACKED_BYTES", len(PAYLOAD) - 1)
    with pytest.raises(MalformedImageError):
        unpack(FORMATS[name](PAYLOAD))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MZ" * 400,
        image(b"")[:0x24F],
        image(b""),
        image(b"unknown packing"),
        image(_gzip(PAYLOAD))[:-200],
    ],
)
def test_no_image(data: bytes) -> None:
    with pytest.raises(MalformedImageError):
        unpack_image(data)


@given(st.binary(max_size=1200))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(MalformedImageError):
        unpack_image(data)


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_never_escape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bzimage, "MAX_UNPACKED_BYTES", 16 << 20)
    rng = random.Random(name)
    good = image(FORMATS[name](PAYLOAD))
    start = 40 * 512 + 100
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            at = rng.choice(
                (rng.randrange(start, len(data)), rng.randrange(0x1F0, 0x250), start + rng.randrange(20))
            )
            data[at] = rng.randrange(256)
        with contextlib.suppress(MalformedImageError):
            unpack_image(bytes(data))
