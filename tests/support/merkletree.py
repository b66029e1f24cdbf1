"""A Merkle tree that is held whole, by the RFC's words: what the ledger's own is compared with."""

from __future__ import annotations

from guestlib.attest.merkle import node_hash
from hostd.core.merkle import EMPTY_ROOT


class Tree:
    """An append-only tree over leaf hashes.

    `_levels[k][i]` is the hash of the complete subtree of leaves i*2^k … (i+1)*2^k - 1.
    """

    def __init__(self) -> None:
        self._levels: list[list[bytes]] = [[]]

    @property
    def size(self) -> int:
        return len(self._levels[0])

    def leaf(self, index: int) -> bytes:
        """Hash of one leaf."""
        return self._levels[0][index]

    def append(self, leaf: bytes) -> None:
        """Adds one leaf hash."""
        level = 0
        self._levels[0].append(leaf)
        while len(self._levels[level]) % 2 == 0:
            nodes = self._levels[level]
            parent = node_hash(nodes[-2], nodes[-1])
            level += 1
            if level == len(self._levels):
                self._levels.append([])
            self._levels[level].append(parent)

    def truncate(self, size: int) -> None:
        """Takes back the last appends; only entries that were never made durable.

        Raises:
            ValueError: the tree is smaller than that.
        """
        if not 0 <= size <= self.size:
            raise ValueError(f"cannot truncate {self.size} to {size}")
        for level, nodes in enumerate(self._levels):
            del nodes[size >> level :]

    def root(self, size: int | None = None) -> bytes:
        """Root of the first `size` leaves (all by default).

        Raises:
            ValueError: no such tree.
        """
        size = self.size if size is None else size
        if not 0 <= size <= self.size:
            raise ValueError(f"no tree of size {size}")
        return EMPTY_ROOT if size == 0 else self._range(0, size)

    def _range(self, start: int, end: int) -> bytes:
        """MTH(D[start:end]) where start is a multiple of the range's own largest power of two."""
        size = end - start
        if size & (size - 1) == 0:
            level = size.bit_length() - 1
            return self._levels[level][start >> level]
        split = 1 << ((size - 1).bit_length() - 1)
        return node_hash(self._range(start, start + split), self._range(start + split, end))

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """PATH(index, D[size]), RFC 9162 section 2.1.3.1, leaf's sibling first.

        Raises:
            ValueError: no such leaf in a tree of that size.
        """
        size = self.size if size is None else size
        if not 0 <= index < size <= self.size:
            raise ValueError(f"no leaf {index} in a tree of size {size}")
        return self._path(index, 0, size)

    def _path(self, index: int, start: int, end: int) -> list[bytes]:
        if end - start == 1:
            return []
        split = start + (1 << ((end - start - 1).bit_length() - 1))
        if index < split:
            return [*self._path(index, start, split), self._range(split, end)]
        return [*self._path(index, split, end), self._range(start, split)]

    def consistency(self, old: int, new: int | None = None) -> list[bytes]:
        """PROOF(old, D[new]), RFC 9162 section 2.1.4.1.

        Raises:
            ValueError: not 0 < old <= new <= size.
        """
        new = self.size if new is None else new
        if not 0 < old <= new <= self.size:
            raise ValueError(f"no consistency proof from {old} to {new}")
        return self._subproof(old, 0, new, whole=True)

    def _subproof(self, old: int, start: int, end: int, *, whole: bool) -> list[bytes]:
        if old == end:
            return [] if whole else [self._range(start, end)]
        split = start + (1 << ((end - start - 1).bit_length() - 1))
        if old <= split:
            return [*self._subproof(old, start, split, whole=whole), self._range(split, end)]
        return [*self._subproof(old, split, end, whole=False), self._range(start, split)]
