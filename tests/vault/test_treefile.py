"""The tree in files against one that is held whole, and against files that somebody has changed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestlib.attest.merkle import leaf_hash
from hostd.core.entry import LedgerError
from hostd.core.merkle import Frontier
from hostd.vault.treefile import FLUSH_BYTES, LEVELS, MAX_CACHED, TILE, TreeFile, hashes_name
from tests.support.merkletree import Tree


def leaf(index: int) -> bytes:
    return leaf_hash(b"%d" % index)


class Made:
    """A tree file over entries 0, 1, …, and the oracle."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.read = 0
        self.entries = [leaf(i) for i in range(size)]
        self.oracle = Tree()
        self.file = TreeFile(folder, self.leaves)
        for one in self.entries:
            self.file.append(one)
            self.oracle.append(one)
        self.file.settle()
        self.file.flush()

    def leaves(self, start: int, end: int) -> Iterator[list[bytes]]:
        self.read += end - start
        for at in range(start, end, 100):
            yield self.entries[at : min(end, at + 100)]

    def reopened(self) -> TreeFile:
        """As the next start opens it: from the entries of a last segment."""
        self.file.close()
        self.file = TreeFile(self.folder, self.leaves)
        first = len(self.entries) * 2 // 3
        edge = Frontier()
        for one in self.entries[:first]:
            edge.append(one)
        self.file.begin(edge)
        for at in range(first, len(self.entries), 64):
            self.file.load(self.entries[at : at + 64])
        if self.file.differs is not None:
            self.file.overwrite(first, self.entries[first:])
        self.file.settle()
        self.file.flush()
        self.file.trim()
        return self.file

    def agrees(self, seed: int = 0) -> None:
        chance, size = random.Random(seed), len(self.entries)
        assert self.file.root() == self.oracle.root()
        for _ in range(40):
            tree = chance.randrange(1, size + 1)
            index = chance.randrange(tree)
            assert self.file.root(tree) == self.oracle.root(tree)
            assert self.file.leaf(index) == self.oracle.leaf(index)
            assert self.file.inclusion(index, tree) == self.oracle.inclusion(index, tree)
            assert self.file.consistency(index + 1, tree) == self.oracle.consistency(index + 1, tree)
        assert self.file.leaves(0, size + 9) == self.entries


SIZES = [1, 2, 255, 256, 257, 511, 512, 513, 3000]


@pytest.mark.parametrize("size", SIZES)
def test_as_the_oracle_says(tmp_path: Path, size: int) -> None:
    made = Made(tmp_path, size)
    made.agrees()
    made.reopened()
    made.agrees(1)
    assert made.read == 0, "nothing had to be made anew"


def test_more_than_two_levels_of_tiles(tmp_path: Path) -> None:
    made = Made(tmp_path, TILE * TILE + 700)
    made.agrees()
    made.reopened()
    made.agrees(1)
    assert (tmp_path / hashes_name(16)).stat().st_size == 32
    assert made.read == 0
    assert len(vars(made.file)["_tiles"]) <= MAX_CACHED


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_appending_settling_and_taking_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    kept: list[bytes] = []
    tree = TreeFile(folder, lambda start, end: iter([kept[start:end]]))
    number = 0
    for _ in range(data.draw(st.integers(1, 8))):
        some = [leaf(number + i) for i in range(data.draw(st.integers(0, 300)))]
        number += len(some)
        for one in some:
            tree.append(one)
        oracle = Tree()
        for one in [*kept, *some]:
            oracle.append(one)
        assert tree.root() == oracle.root()
        size = data.draw(st.integers(0, oracle.size))
        assert tree.root(size) == oracle.root(size)
        if size:
            index = data.draw(st.integers(0, size - 1))
            assert tree.inclusion(index, size) == oracle.inclusion(index, size)
        if data.draw(st.booleans()):
            tree.settle()
            kept += some
        else:
            tree.rollback()
        if data.draw(st.booleans()):
            tree.flush()
        assert tree.size == len(kept)
    tree.close()


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    tree = Made(tmp_path, 8).file
    for size in (-1, 9):
        with pytest.raises(ValueError, match="no tree"):
            tree.root(size)
    for index, size in ((-1, 8), (8, 8), (3, 3), (0, 0)):
        with pytest.raises(ValueError, match="no leaf"):
            tree.inclusion(index, size)
    with pytest.raises(ValueError, match="no tree"):
        tree.inclusion(0, 9)
    for old, new in ((0, 8), (5, 4)):
        with pytest.raises(ValueError, match="no consistency"):
            tree.consistency(old, new)
    for level, index in ((0, 8), (0, -1), (3, 1), (4, 0)):
        with pytest.raises(ValueError, match="no node"):
            tree.node(level, index)


# ── Files that are not what was written ───────────────────────────────────────────────────────────


def garble(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    match chance.randrange(5):
        case 0:
            data.clear()
        case 1:
            del data[chance.randrange(len(data)) :]
        case 2:
            at = chance.randrange(len(data))
            data[at] ^= 1 << chance.randrange(8)
        case 3:
            data[:] = os.urandom(len(data))
        case 4:
            data += bytes(77)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(40))
def test_changed_files_are_made_anew(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    made = Made(tmp_path, 1500)
    for _ in range(chance.randrange(1, 3)):
        garble(tmp_path / hashes_name(chance.choice((0, 8))), chance)
    if chance.random() < 0.5:
        made.reopened()
    made.agrees(seed)
    made.reopened()
    made.agrees(seed)
    whole = [(tmp_path / hashes_name(level)).stat().st_size for level in LEVELS[:2]]
    assert whole == [1500 * 32, 1500 // 256 * 32]


def test_a_missing_file(tmp_path: Path) -> None:
    made = Made(tmp_path, 700)
    for level in LEVELS:
        (tmp_path / hashes_name(level)).unlink()
    made.reopened()
    made.agrees()


def test_only_the_tiles_that_differ_are_made_from_entries(tmp_path: Path) -> None:
    made = Made(tmp_path, 256 * 40)
    with (tmp_path / hashes_name(0)).open("r+b") as file:
        file.seek(7 * 256 * 32)
        file.write(bytes(32))
    assert made.file.leaf(7 * 256) == leaf(7 * 256)
    assert made.read == 2 * 256


def test_entries_that_lead_elsewhere_are_named(tmp_path: Path) -> None:
    made = Made(tmp_path, 1000)
    made.entries[300] = leaf(99999)
    # The hashes are still right: they, not the entries, are what was recorded.
    assert made.file.leaf(300) == leaf(300)
    assert made.read == 0
    vars(made.file)["_tiles"].clear()
    with (tmp_path / hashes_name(0)).open("r+b") as file:
        file.seek(300 * 32)
        file.write(leaf(99999))
    with pytest.raises(LedgerError, match="entries 256 to 511 are not those that were recorded"):
        made.file.leaf(300)
    # What that tile does not hold can still be proved.
    assert made.file.inclusion(600) == made.oracle.inclusion(600)


def test_memory_holds_tiles_not_the_tree(tmp_path: Path) -> None:
    made = Made(tmp_path, 256 * (MAX_CACHED + 20))
    for at in range(0, len(made.entries), 256):
        made.file.leaf(at)
    held = vars(made.file)
    assert len(held["_tiles"]) <= MAX_CACHED
    assert sum(map(len, held["_pending"].values())) <= FLUSH_BYTES


def test_what_waits_in_memory_is_bounded(tmp_path: Path) -> None:
    tree = TreeFile(tmp_path, lambda _start, _end: iter(()))
    for i in range(5000):
        tree.append(leaf(i))
        tree.settle()
        assert len(vars(tree)["_pending"][0]) <= FLUSH_BYTES
    tree.close()
