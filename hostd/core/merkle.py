"""The Merkle tree of the ledger: RFC 9162 section 2.1 (hashing, inclusion and consistency proofs).

Pure. A node is named by (level, index): the complete subtree of leaves index * 2^level to
(index + 1) * 2^level - 1. Where nodes are kept is somebody else's (`hostd.vault.treefile`); the
functions here ask for them. `Frontier` is all of a tree that appending and its root need.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Final

from guestlib.attest.merkle import HASH_BYTES, node_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Node = Callable[[int, int], bytes]
    """(level, index) → hash."""

EMPTY_ROOT: Final = sha256(b"").digest()
_RUN: Final = 256
"""Leaves that `Frontier.extend` takes in one go."""


class Frontier:
    """The right edge of a tree: the hashes of the largest complete subtrees, left to right, one for each bit
    that is set in the size."""

    __slots__ = ("_nodes", "_size")

    def __init__(self, size: int = 0, nodes: Iterable[bytes] = ()) -> None:
        """Raises: ValueError, they are not the edge of a tree of that size."""
        self._size = size
        self._nodes = list(nodes)
        if size < 0 or len(self._nodes) != size.bit_count() or any(len(n) != HASH_BYTES for n in self._nodes):
            raise ValueError(f"not the edge of a tree of {size}")

    @property
    def size(self) -> int:
        return self._size

    @property
    def nodes(self) -> tuple[bytes, ...]:
        return tuple(self._nodes)

    def copy(self) -> Frontier:
        return Frontier(self._size, self._nodes)

    def at(self, level: int) -> bytes:
        """The edge's subtree of 2^level leaves. Raises: ValueError, the size has no such bit."""
        if not self._size >> level & 1:
            raise ValueError(f"a tree of {self._size} has no edge at level {level}")
        return self._nodes[(self._size >> (level + 1)).bit_count()]

    def append(self, leaf: bytes) -> None:
        """Adds one leaf hash."""
        rest, nodes = self._size, self._nodes
        while rest & 1:
            leaf = sha256(b"\1" + nodes.pop() + leaf).digest()
            rest >>= 1
        nodes.append(leaf)
        self._size += 1

    def extend(self, leaves: Sequence[bytes]) -> None:
        """Adds leaf hashes; many at once cost less each."""
        at = min(-self._size % _RUN, len(leaves))
        for leaf in leaves[:at]:
            self.append(leaf)
        while len(leaves) - at >= _RUN:
            nodes = leaves[at : at + _RUN]
            while len(nodes) > 1:
                two = iter(nodes)
                nodes = [sha256(b"\1" + left + right).digest() for left, right in zip(two, two, strict=True)]
            self.push(nodes[0], _RUN.bit_length() - 1)
            at += _RUN
        for leaf in leaves[at:]:
            self.append(leaf)

    def push(self, node: bytes, level: int = 0) -> list[tuple[int, bytes]]:
        """Adds a complete subtree; every (level, hash) that this completes, itself first.

        Raises:
            ValueError: the size is not a multiple of the subtree's.
        """
        rest = self._size >> level
        if rest << level != self._size:
            raise ValueError(f"no subtree of level {level} begins at leaf {self._size}")
        self._size += 1 << level
        done = [(level, node)]
        while rest & 1:
            node = node_hash(self._nodes.pop(), node)
            rest >>= 1
            level += 1
            done.append((level, node))
        self._nodes.append(node)
        return done

    def root(self) -> bytes:
        """MTH of all leaves."""
        if not self._nodes:
            return EMPTY_ROOT
        *left, found = self._nodes
        for node in reversed(left):
            found = node_hash(node, found)
        return found


def grow(levels: list[list[bytes]], leaves: Iterable[bytes]) -> None:
    """Appends to a small tree that is held whole: `levels[k]` are its complete subtrees of 2^k leaves."""
    levels[0].extend(leaves)
    level = 0
    while len(levels[level]) > 1:
        below = levels[level]
        if level + 1 == len(levels):
            levels.append([])
        above = levels[level + 1]
        new = iter(below[2 * len(above) : len(below) & ~1])
        above.extend([sha256(b"\1" + left + right).digest() for left, right in zip(new, new, strict=True)])
        level += 1


def _range(node: Node, start: int, end: int) -> bytes:
    """MTH(D[start:end]) where start is a multiple of the smallest power of two that is not below the size."""
    size = end - start
    if size & (size - 1) == 0:
        level = size.bit_length() - 1
        return node(level, start >> level)
    split = start + (1 << ((size - 1).bit_length() - 1))
    return node_hash(_range(node, start, split), _range(node, split, end))


def root(node: Node, size: int) -> bytes:
    """Root of the first `size` leaves."""
    return EMPTY_ROOT if size == 0 else _range(node, 0, size)


def inclusion(node: Node, index: int, size: int) -> list[bytes]:
    """PATH(index, D[size]), RFC 9162 section 2.1.3.1, leaf's sibling first.

    Raises:
        ValueError: no such leaf in a tree of that size.
    """
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of size {size}")
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        split = start + (1 << ((end - start - 1).bit_length() - 1))
        if index < split:
            path.append(_range(node, split, end))
            end = split
        else:
            path.append(_range(node, start, split))
            start = split
    path.reverse()
    return path


def consistency(node: Node, old: int, new: int) -> list[bytes]:
    """PROOF(old, D[new]), RFC 9162 section 2.1.4.1.

    Raises:
        ValueError: not 0 < old <= new.
    """
    if not 0 < old <= new:
        raise ValueError(f"no consistency proof from {old} to {new}")
    path: list[bytes] = []
    start, end = 0, new
    while old != end:
        split = start + (1 << ((end - start - 1).bit_length() - 1))
        if old <= split:
            path.append(_range(node, split, end))
            end = split
        else:
            path.append(_range(node, start, split))
            start = split
    if start:
        path.append(_range(node, start, end))
    path.reverse()
    return path


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> None:
    """RFC 9162 section 2.1.4.2: the tree of `new` leaves begins with the one of `old` leaves.

    Raises:
        ValueError: the proof does not show it.
    """
    if not 0 < old <= new:
        raise ValueError(f"no consistency proof from {old} to {new}")
    if old == new:
        if path or old_root != new_root:
            raise ValueError("two trees of one size are not equal")
        return
    steps = [old_root, *path] if old & (old - 1) == 0 else list(path)
    if not steps:
        raise ValueError("the proof is too short")
    at, last = old - 1, new - 1
    while at & 1:
        at >>= 1
        last >>= 1
    first = second = steps[0]
    for step in steps[1:]:
        if last == 0:
            raise ValueError("the proof is too long")
        if at & 1 or at == last:
            first, second = node_hash(step, first), node_hash(step, second)
            while not at & 1 and at:
                at >>= 1
                last >>= 1
        else:
            second = node_hash(second, step)
        at >>= 1
        last >>= 1
    if last:
        raise ValueError("the proof is too short")
    if first != old_root or second != new_root:
        raise ValueError("the proof leads to other roots")
