"""Headers of /proc/kcore and the file behind them."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.platform.kcore import (
    MAX_RANGES,
    Kcore,
    KcoreError,
    MalformedKcoreError,
    Range,
    parse_header,
    parse_ranges,
)

TEXT = 0xFFFFFFFF81000000


def header(count: int, *, table: int = 64, size: int = 56, kind: int = 4, machine: int = 62) -> bytes:
    return struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        kind,
        machine,
        1,
        0,
        table,
        0,
        0,
        64,
        size,
        count,
        0,
        0,
        0,
    )


def program(start: int, length: int, offset: int, kind: int = 1) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 7, offset, start, 0, length, length, 4096)


def test_ranges_are_those_that_are_memory() -> None:
    table = program(0, 0, 0, kind=4) + program(TEXT, 0x1000, 0x4000) + program(1 << 47, 5, 6)
    assert parse_header(header(3)) == (64, 3)
    assert parse_ranges(table, 3) == (Range(TEXT, 0x1000, 0x4000), Range(1 << 47, 5, 6))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        header(1)[:63],
        header(0),
        header(MAX_RANGES + 1),
        header(1, size=55),
        header(1, kind=2),
        header(1, machine=183),
        header(1, table=1 << 40),
        b"\x7fELF\x01" + header(1)[5:],
    ],
)
def test_other_headers_are_refused(head: bytes) -> None:
    with pytest.raises(MalformedKcoreError):
        parse_header(head)


@pytest.mark.parametrize(
    "table", [b"", program(0, 1, 0)[:-1], program(1, (1 << 64) - 1, 0), program(0, 1, (1 << 63) - 1)]
)
def test_ranges_out_of_bounds_are_refused(table: bytes) -> None:
    with pytest.raises(MalformedKcoreError):
        parse_ranges(table, 1)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for parse in (lambda: parse_header(data), lambda: parse_ranges(data, len(data) // 56)):
        with contextlib.suppress(MalformedKcoreError):
            parse()


def test_mutations_never_escape() -> None:
    rng = random.Random(6)
    good = header(2) + program(TEXT, 0x1000, 0x4000) + program(1 << 47, 5, 6)
    for _ in range(3000):
        data = bytearray(good[: rng.randrange(len(good) + 1)])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(MalformedKcoreError):
            table, count = parse_header(bytes(data))
            parse_ranges(bytes(data[table : table + 56 * count]), count)


@pytest.fixture
def core(tmp_path: Path) -> Path:
    path = tmp_path / "kcore"
    body = bytes(range(256)) * 16
    path.write_bytes((header(1) + program(TEXT, 4096, 4096)).ljust(4096, b"\0") + body)
    return path


def test_memory_is_read_by_address(core: Path) -> None:
    kcore = Kcore(str(core))
    assert kcore.read(TEXT + 255, 3) == b"\xff\x00\x01"
    for address, size in ((TEXT - 1, 2), (TEXT + 4095, 2), (0, 1)):
        with pytest.raises(KcoreError):
            kcore.read(address, size)
    os.truncate(core, 5000)
    with pytest.raises(KcoreError):
        kcore.read(TEXT, 4096)
    kcore.close()


def test_a_file_that_is_none_is_closed_and_refused(tmp_path: Path) -> None:
    (tmp_path / "kcore").write_bytes(b"no")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MalformedKcoreError):
        Kcore(str(tmp_path / "kcore"))
    with pytest.raises(FileNotFoundError):
        Kcore(str(tmp_path / "none"))
    assert len(os.listdir("/proc/self/fd")) == before
