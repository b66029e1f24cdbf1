"""Reading another process's memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hostd.platform.memory import MAX_BYTES, MAX_VECTOR, PIECE_BYTES, MemoryReader, Places
from hostd.platform.procfs import ProcessGoneError, ProcessHandle

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def reader() -> Iterator[MemoryReader]:
    reader = MemoryReader()
    yield reader
    reader.close()


def test_scattered_ranges_come_in_order(reader: MemoryReader) -> None:
    data = os.urandom(3 * 8 * MAX_VECTOR)
    buffer = ctypes.create_string_buffer(data, len(data))
    start = ctypes.addressof(buffer)
    # More ranges than one system call takes, backwards.
    ranges = [(start + at, 8) for at in range(len(data) - 8, -1, -12)]
    found = reader.read(ProcessHandle(os.getpid()), Places(ranges))
    assert bytes(found) == b"".join(data[a - start : a - start + 8] for a, _ in ranges)


def test_pieces_are_the_ranges_cut(reader: MemoryReader) -> None:
    handle = ProcessHandle(os.getpid())
    data = os.urandom(3 * PIECE_BYTES + 24)
    buffer = ctypes.create_string_buffer(data, len(data))
    start = ctypes.addressof(buffer)
    places = Places([(start, 8), (start + 8, 2 * PIECE_BYTES), (start + 16, 0), (start + 100, PIECE_BYTES)])
    assert [piece.size for piece in places.pieces] == [PIECE_BYTES] * 3 + [8]
    found = {piece.at: bytes(reader.read_piece(handle, piece)) for piece in reversed(places.pieces)}
    whole = data[: 8 + 2 * PIECE_BYTES] + data[100 : 100 + PIECE_BYTES]
    assert b"".join(found[at] for at in sorted(found)) == whole
    everything = reader.read(handle, places)
    assert bytes(everything) == whole
    # Each thread has its window, and neither disturbs what was read as a whole.
    mine, other = (
        reader.read_piece(handle, places.pieces[0], 0),
        reader.read_piece(handle, places.pieces[1], 1),
    )
    assert bytes(mine) + bytes(other) == whole[: 2 * PIECE_BYTES]
    buffer[0:8] = bytes(8)
    assert bytes(reader.read_piece(handle, places.pieces[0], 1))[:8] == bytes(8)
    assert bytes(mine) == whole[:PIECE_BYTES]
    assert bytes(everything) == whole


def test_what_is_not_there(reader: MemoryReader) -> None:
    handle = ProcessHandle(os.getpid())
    for ranges in ([(0x1000, 8)], [(ctypes.addressof(ctypes.create_string_buffer(8)), 8), (0x1000, 8)]):
        with pytest.raises(ProcessGoneError):
            reader.read(handle, Places(ranges))
    assert bytes(reader.read(handle, Places([]))) == b""


def test_ended_process(reader: MemoryReader) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        handle = ProcessHandle(process.pid)
        process.kill()
    with pytest.raises(ProcessGoneError):
        reader.read(handle, Places([(0x400000, 8)]))


def test_bounded() -> None:
    with pytest.raises(ValueError, match="bytes of memory"):
        Places([(0x1000, MAX_BYTES), (0x1000, 1)])
