"""Inclusion proofs, RFC 9162 section 2.1.3.2, against the tree that makes them and every false one."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestlib.attest.merkle import leaf_hash, node_hash, root_of

LEAVES = [leaf_hash(str(number).encode()) for number in range(70)]


def root(leaves: list[bytes]) -> bytes:
    """MTH, as the RFC defines it (section 2.1.1)."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return node_hash(root(leaves[:split]), root(leaves[split:]))


def path(index: int, leaves: list[bytes]) -> list[bytes]:
    """PATH, as the RFC defines it (section 2.1.3.1)."""
    if len(leaves) == 1:
        return []
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if index < split:
        return [*path(index, leaves[:split]), root(leaves[split:])]
    return [*path(index - split, leaves[split:]), root(leaves[:split])]


def test_every_leaf_of_every_small_tree() -> None:
    for size in range(1, len(LEAVES) + 1):
        leaves = LEAVES[:size]
        for index in range(size):
            assert root_of(leaves[index], index, size, path(index, leaves)) == root(leaves)


def test_hashes_are_the_rfcs() -> None:
    assert leaf_hash(b"a") == hashlib.sha256(b"\0a").digest()
    assert node_hash(b"l" * 32, b"r" * 32) == hashlib.sha256(b"\1" + b"l" * 32 + b"r" * 32).digest()


@settings(deadline=None)
@given(st.integers(1, 70), st.data())
def test_another_place_or_size_or_proof_leads_elsewhere(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    proof, true = path(index, LEAVES[:size]), root(LEAVES[:size])
    index2 = data.draw(st.integers(0, 80).filter(lambda other: other != index))
    with contextlib.suppress(ValueError):
        assert root_of(LEAVES[index], index2, size, proof) != true
    for at in range(len(proof)):
        changed = [*proof]
        changed[at] = bytes(32)
        assert root_of(LEAVES[index], index, size, changed) != true
    with pytest.raises(ValueError, match="too long"):
        root_of(LEAVES[index], index, size, [*proof, bytes(32)])
    if proof:
        with pytest.raises(ValueError, match="too short"):
            root_of(LEAVES[index], index, size, proof[:-1])
        with pytest.raises(ValueError, match="bytes"):
            root_of(LEAVES[index], index, size, [*proof[:-1], bytes(31)])


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 1), (1, 1), (5, 3)])
def test_no_such_leaf(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="no leaf"):
        root_of(LEAVES[0], index, size, [])
