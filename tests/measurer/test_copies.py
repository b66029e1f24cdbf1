"""Tags of a stream, compressed copies, the second thread, names of places: each on its own."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.measurer import tags
from hostd.measurer.copies import CHUNK_BYTES, Copy, compress, first_difference
from hostd.measurer.elf_places import MAX_LABEL, place
from hostd.measurer.lane import Lane
from hostd.measurer.tags import PIECE_BYTES, Tagger
from hostd.platform.pages import PAGE


@pytest.mark.parametrize(
    "size", [0, 1, 4096, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 77]
)
def test_stream_has_the_tag_of_the_whole(size: int) -> None:
    tagger = Tagger()
    data = os.urandom(size)
    for step in (1 << 20, 4096 * 7 + 1, PIECE_BYTES, size or 1):
        stream = tagger.stream()
        for at in range(0, size, step):
            stream.update(memoryview(data)[at : at + step])
        assert stream.finish() == tagger.tag(data)


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 64))
def test_stream_of_any_pieces(parts: list[bytes], piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tags, "PIECE_BYTES", piece)
        tagger = Tagger()
        stream = tagger.stream()
        for part in parts:
            stream.update(memoryview(part))
        assert stream.finish() == tagger.tag(b"".join(parts))


def _copy(data: bytes) -> Copy:
    return Copy(tuple(compress(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)))


def test_copy_names_each_page_that_differs() -> None:
    data = bytes(range(256)) * (3 * CHUNK_BYTES // 256)
    copy = _copy(data)
    assert b"".join(copy.chunks()) == data
    assert copy.size < len(data) // 10
    now = bytearray(data)
    spots = [5, PAGE + 4095, CHUNK_BYTES, 3 * CHUNK_BYTES - 1]
    for spot in spots:
        now[spot] ^= 0xFF

    def read(at: int, length: int) -> bytes:
        return bytes(now[at : at + length])

    assert list(copy.differences(lambda at, length: data[at : at + length], 9)) == []
    found = list(copy.differences(read, 9))
    assert [at for at, _, _ in found] == spots
    for at, was, seen in found:
        end = min(at + 16, at // PAGE * PAGE + PAGE)
        assert (was, seen) == (data[at:end], bytes(now[at:end]))
    assert len(list(copy.differences(read, 2))) == 2
    del now[CHUNK_BYTES + PAGE :]
    cut = list(copy.differences(read, 1000))
    assert len(cut) == 3 + 2 * CHUNK_BYTES // PAGE - 1
    assert cut[3][2] == b""


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_first_difference(expected: bytes, seen: bytes) -> None:
    at, was, is_now = first_difference(expected, seen)
    if expected == seen:
        assert (at, was) == (0, is_now)
    else:
        assert expected[:at] == seen[:at]
        assert expected[at : at + 1] != seen[at : at + 1]


def test_lane() -> None:
    lane = Lane()

    def identity() -> int:
        """Which thread runs; the caller gives the other one time to begin."""
        lane.start(threading.get_ident)
        time.sleep(0.2)
        ident: int = lane.result()
        return ident

    other = identity()
    assert other != threading.get_ident()
    lane.start(lambda a, b: a + b, 2, 3)
    assert lane.result() == 5
    lane.start(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        lane.result()
    lane.start([].pop)
    with pytest.raises(IndexError):
        lane.result()
    assert identity() == other
    # A thread does not survive fork: the child gets one of its own.
    child = os.fork()
    if not child:
        code = 1
        try:
            lane.start(lambda: 7)
            code = 0 if lane.result() == 7 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert identity() == other
    # What the lane has not begun is done by whoever wants it.
    busy = threading.Event()
    lane.start(busy.wait, 5)
    time.sleep(0.1)
    lane._job = [(threading.get_ident, ())]
    assert lane.result() == threading.get_ident()
    busy.set()
    assert lane.result() is True
    lane.close()
    lane.start(lambda: 8)
    assert lane.result() == 8
    lane.close()


def test_places_in_a_real_file() -> None:
    path = next(Path("/lib").glob("*/libc.so.6"))
    data = path.read_bytes()
    names = {place(lambda at, size: data[at : at + size], at) for at in range(0, len(data), 40_000)}
    assert any(name.startswith(".text+0x") for name in names)
    assert sum("+0x" in name for name in names) > 20
    assert all(len(name) <= MAX_LABEL for name in names)
    assert any(not name.startswith(".") for name in names if name)
    assert place(lambda at, size: data[at : at + size], len(data) + 5) == ""


def _elf(symbols: bytes, strings: bytes) -> bytes:
    """Sections: none, .text (file 0x1000-0x2000, address 0x5000), .symtab, its strings."""
    names = b"\0.text\0"
    body = symbols + strings + names
    at = 64 + 5 * 64
    rows = [(0,) * 10, (1, 1, 6, 0x5000, 0x1000, 0x1000, 0, 0, 0, 0)]
    for kind, link, data in ((2, 3, symbols), (3, 0, strings), (3, 0, names)):
        rows.append((0, kind, 0, 0, at, len(data), link, 0, 0, 0))
        at += len(data)
    head = struct.pack(
        "<4sBBBxxxxxxxxxHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 3, 62, 1, 0, 0, 64, 0, 64, 56, 0, 64, 5, 4
    )
    return (head + b"".join(struct.pack("<IIQQQQIIQQ", *row) for row in rows) + body).ljust(0x2000, b"\0")


SYMBOLS = struct.pack("<IBBHQQ", 1, 0x12, 0, 1, 0x5010, 0x20) + struct.pack(
    "<IBBHQQ", 6, 0x11, 0, 1, 0x5030, 8
)
STRINGS = b"\0main\0table\0"


@pytest.mark.parametrize(
    ("offset", "name"),
    [
        (0x1010, "main+0x0"),
        (0x102F, "main+0x1f"),
        (0x1030, "table+0x0"),
        (0x1038, ".text+0x38"),
        (0x1FFF, ".text+0xfff"),
        (0x2000, ""),
        (0, ""),
    ],
)
def test_place(offset: int, name: str) -> None:
    data = _elf(SYMBOLS, STRINGS)
    assert place(lambda at, size: data[at : at + size], offset) == name


def test_place_survives_damage() -> None:
    whole = _elf(SYMBOLS, STRINGS)
    rng = random.Random(9)
    for _ in range(3000):
        changed = bytearray(whole[: rng.choice((len(whole), rng.randrange(600)))])
        for _ in range(rng.randint(1, 4)):
            if changed:
                changed[rng.randrange(min(len(changed), 600))] = rng.randrange(256)
        data = bytes(changed)
        name = place(lambda at, size, data=data: data[at : at + size], 0x1018)  # type: ignore[misc]
        assert len(name) <= MAX_LABEL
        name.encode()


@given(st.binary(max_size=500), st.integers(0, 2**64 - 1))
def test_place_takes_any_bytes(body: bytes, offset: int) -> None:
    data = b"\x7fELF\x02\x01" + body
    place(lambda at, size: data[at : at + size], offset)
