"""Inclusion proofs in one tree that share their work (pure).

Neighbours' proofs have most of their hashes in common: what was put together for one is kept for the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guestlib.attest.merkle import node_hash

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_KEPT: Final = 4096
"""Hashes kept, half a megabyte; over it all are forgotten."""


class Proofs:
    """Proofs in the first `size` leaves. `node(level, index)` gives the hash of a complete subtree."""

    def __init__(self, node: Callable[[int, int], bytes], size: int) -> None:
        self.size = size
        self._node = node
        self._kept: dict[tuple[int, int], bytes] = {}

    def inclusion(self, index: int) -> list[bytes]:
        """PATH(index, D[size]), RFC 9162 section 2.1.3.1, leaf's sibling first.

        Raises:
            ValueError: no such leaf.
        """
        if not 0 <= index < self.size:
            raise ValueError(f"no leaf {index} in a tree of size {self.size}")
        if len(self._kept) > MAX_KEPT:
            self._kept.clear()
        path: list[bytes] = []
        start, end = 0, self.size
        while end - start > 1:
            split = start + (1 << ((end - start - 1).bit_length() - 1))
            if index < split:
                path.append(self._range(split, end))
                end = split
            else:
                path.append(self._range(start, split))
                start = split
        path.reverse()
        return path

    def _range(self, start: int, end: int) -> bytes:
        """MTH(D[start:end]), as `hostd.core.merkle` has it."""
        found = self._kept.get((start, end))
        if found is None:
            size = end - start
            if size & (size - 1) == 0:
                level = size.bit_length() - 1
                found = self._node(level, start >> level)
            else:
                split = start + (1 << ((size - 1).bit_length() - 1))
                found = node_hash(self._range(start, split), self._range(split, end))
            self._kept[start, end] = found
        return found
