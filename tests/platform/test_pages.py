"""Page tables: spans over runs, and the entries of real mappings."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.platform.pages import (
    ENTRY_BYTES,
    FILE,
    FRAME,
    GAP_PAGES,
    PAGE,
    PRESENT,
    SWAPPED,
    OwnPages,
    Run,
    Spans,
    differing,
)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 50)), min_size=1, max_size=20), st.randoms())
def test_spans_give_the_entries_of_the_runs(parts: list[tuple[int, int]], rng: object) -> None:
    """Whatever the gaps and the order: each run's own entries, in the order of the runs."""
    runs = []
    page = 16
    for gap, pages in parts:
        page += gap
        runs.append(Run(page * PAGE, 0, pages))
        page += pages
    rng.shuffle(runs)  # type: ignore[attr-defined]
    table = os.memfd_create("table")
    try:
        os.write(table, struct.pack(f"<{page + 8}Q", *range(page + 8)))
        spans = Spans.over(runs)
        wanted = [
            number for run in runs for number in range(run.start // PAGE, run.start // PAGE + run.pages)
        ]
        assert spans.entries(table) == struct.pack(f"<{len(wanted)}Q", *wanted)
        read = sum(size for size, _ in spans.reads)
        assert read <= (sum(run.pages for run in runs) + len(runs) * GAP_PAGES) * ENTRY_BYTES
        os.ftruncate(table, (page - 1) * ENTRY_BYTES)
        assert spans.entries(table) is None
    finally:
        os.close(table)


def test_no_runs() -> None:
    assert Spans.over([]).entries(-1) == b""


_ENTRY = st.builds(
    lambda present, swapped, file, frame, other: present | swapped | file | frame | other << 55,
    st.sampled_from((0, PRESENT)),
    st.sampled_from((0, SWAPPED)),
    st.sampled_from((0, FILE)),
    st.sampled_from((0, 1, 2, FRAME)),
    st.integers(0, 15),
)


@given(st.lists(st.tuples(_ENTRY, _ENTRY), max_size=30))
def test_differing_is_the_plain_rule(pairs: list[tuple[int, int]]) -> None:
    target = struct.pack(f"<{len(pairs)}Q", *(pair[0] for pair in pairs))
    own = struct.pack(f"<{len(pairs)}Q", *(pair[1] for pair in pairs))
    identity = PRESENT | SWAPPED | FILE | FRAME
    plain = [
        index
        for index, (theirs, mine) in enumerate(pairs)
        if theirs & SWAPPED or (theirs & PRESENT and (theirs ^ mine) & identity)
    ]
    assert differing(target, own) == plain


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_differing_takes_whole_pairs_only(target: bytes, own: bytes) -> None:
    if len(target) == len(own) and not len(target) % ENTRY_BYTES:
        differing(target, own)
    else:
        with pytest.raises(ValueError, match="pair"):
            differing(target, own)


def test_own_pages() -> None:
    if os.geteuid():
        pytest.skip("page frames are for root")
    pages = OwnPages()
    with mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        area[0] = 1
        first, second = struct.unpack("<2Q", pages.entries(address, 2))
        assert first & PRESENT
        assert not first & FILE
        assert not second & PRESENT
        assert pages.read(address, 4) == b"\x01\0\0\0"
    with pytest.raises(OSError, match=r"\[Errno"):
        pages.read(0, 1)
    assert pages.entries(0, 2) == bytes(16)
    pages.close()
