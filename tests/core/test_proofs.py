"""Shared proofs are the same proofs, and each node is asked for once."""

from __future__ import annotations

import pytest

from guestlib.attest.merkle import leaf_hash, node_hash, root_of
from hostd.core import proofs
from hostd.core.merkle import inclusion, root
from hostd.core.proofs import Proofs

LEAVES = [leaf_hash(b"%d" % number) for number in range(300)]


class Nodes:
    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, level: int, index: int) -> bytes:
        self.asked.append((level, index))
        return whole(level, index)


def whole(level: int, index: int) -> bytes:
    if level == 0:
        return LEAVES[index]
    return node_hash(whole(level - 1, 2 * index), whole(level - 1, 2 * index + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 64, 100, 255, 256, 257, 300])
def test_every_proof_is_the_trees(size: int) -> None:
    shared = Proofs(whole, size)
    for index in range(size):
        proof = shared.inclusion(index)
        assert proof == inclusion(whole, index, size)
        assert root_of(LEAVES[index], index, size, proof) == root(whole, size)


def test_what_neighbours_share_is_asked_for_once() -> None:
    nodes = Nodes()
    shared = Proofs(nodes, 300)
    for index in range(264, 296):
        shared.inclusion(index)
    assert len(nodes.asked) == len(set(nodes.asked))
    alone = Nodes()
    for index in range(264, 296):
        inclusion(alone, index, 300)
    assert len(nodes.asked) < len(alone.asked) / 3


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "MAX_KEPT", 50)
    shared = Proofs(whole, 300)
    for index in range(300):
        assert shared.inclusion(index) == inclusion(whole, index, 300)
        assert len(shared._kept) < 50 + 30


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 3), (3, 3), (9, 3)])
def test_no_such_leaf(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="no leaf"):
        Proofs(whole, size).inclusion(index)
