"""The ledger's tree in files beside its entries: nodes of levels 0, 8, 16, …, 32 bytes each, in order.

256 hashes of one file are a tile, as in C2SP tlog-tiles: the nodes of eight levels, of which the file holds
the lowest. Memory holds the tree's right edge, what is not written yet and some tiles, whatever the size.

The files are derived, and never trusted: a tile is read whole and its root compared with its parent in the
next file, up to the right edge; an incomplete one is compared with the edge itself. The edge comes from
entries. A tile that does not agree is made anew from entries; if those lead to another root too, they are
not what was recorded.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from guestlib.attest.merkle import HASH_BYTES
from hostd.core import merkle
from hostd.core.entry import ArchivedError, LedgerError
from hostd.core.merkle import Frontier
from hostd.platform.segments import write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

TILE_BITS: Final = 8
TILE: Final = 1 << TILE_BITS
LEVELS: Final = (0, 8, 16, 24, 32)
"""The top one becomes a tile of its own after 2^40 entries."""
MAX_CACHED: Final = 64
"""Tiles held, 33 KB each."""
FLUSH_BYTES: Final = 512 * HASH_BYTES
"""Leaf hashes that may wait in memory: a write per batch would cost more than the hashing."""


def hashes_name(level: int) -> str:
    return f"hashes-{level}"


class TreeFile:
    """An append-only tree. What was appended counts at once; `settle` keeps it, `rollback` takes it back."""

    def __init__(self, folder: Path, leaves: Callable[[int, int], Iterator[list[bytes]]]) -> None:
        """`leaves(start, end)`: leaf hashes computed from the entries themselves, in chunks.

        Raises:
            OSError: a file cannot be opened.
        """
        self._folder = folder
        self._from_entries = leaves
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fds = {level: os.open(folder / hashes_name(level), flags, 0o640) for level in LEVELS}
        self._edge = Frontier()
        self._kept = Frontier()
        self._pending = {level: bytearray() for level in LEVELS}
        self._kept_pending = dict.fromkeys(LEVELS, 0)
        self._written = dict.fromkeys(LEVELS, 0)
        """Nodes of each level before the pending ones."""
        self._tiles: OrderedDict[tuple[int, int], list[list[bytes]]] = OrderedDict()
        self.differs: int | None = None
        """The first leaf that `load` found otherwise in the file."""

    @property
    def size(self) -> int:
        return self._edge.size

    @property
    def edge(self) -> tuple[bytes, ...]:
        """Right edge, as a `rotate` entry carries it."""
        return self._edge.nodes

    # ── Opening ───────────────────────────────────────────────────────────────────────────────────

    def begin(self, edge: Frontier) -> None:
        """Starts from the edge of all that is before the last segment."""
        self._edge, self._kept = edge.copy(), edge.copy()
        self._written = {level: edge.size >> level for level in LEVELS}

    def load(self, hashes: list[bytes]) -> None:
        """Appends leaf hashes of entries that were just read. Where the file of leaves has others, it is left
        for the time being, and `differs` tells the first. Raises: OSError."""
        data, at = b"".join(hashes), self.size
        there = os.pread(self._fds[0], len(data), at * HASH_BYTES)
        if there != data:
            same = _common(there, data)
            if len(there) - same * HASH_BYTES < HASH_BYTES:
                write_all(self._fds[0], data[same * HASH_BYTES :], (at + same) * HASH_BYTES)
            elif self.differs is None:
                self.differs = at + same
        done = 0
        while done < len(hashes):
            if self.size % TILE or len(hashes) - done < TILE:
                self._push(hashes[done])
                done += 1
                continue
            # A tile in one go: opening reads some hundred of them.
            levels: list[list[bytes]] = [[]]
            merkle.grow(levels, hashes[done : done + TILE])
            self._complete(self._edge.push(levels[TILE_BITS][0], TILE_BITS))
            done += TILE
        self._written[0] = self.size
        self._pending[0].clear()

    def overwrite(self, first: int, hashes: list[bytes]) -> None:
        """Puts the leaf hashes of entries in place. Raises: OSError."""
        write_all(self._fds[0], b"".join(hashes), first * HASH_BYTES)

    def stored(self, first: int, count: int) -> list[bytes]:
        """Leaf hashes as the file has them, unverified; fewer where it ends. Raises: OSError."""
        data = os.pread(self._fds[0], count * HASH_BYTES, first * HASH_BYTES)
        return _split(data[: len(data) - len(data) % HASH_BYTES])

    # ── Appending ─────────────────────────────────────────────────────────────────────────────────

    def append(self, leaf: bytes) -> None:
        """Adds one leaf hash."""
        self._push(leaf)

    def _push(self, leaf: bytes) -> None:
        self._pending[0] += leaf
        edge = self._edge
        if (edge.size + 1) % TILE:
            edge.append(leaf)
            return
        self._complete(edge.push(leaf))

    def _complete(self, nodes: list[tuple[int, bytes]]) -> None:
        for level, node in nodes:
            if level and level in self._pending:
                self._pending[level] += node

    def settle(self) -> None:
        """What was appended so far stays: its entries are durable.

        Raises:
            OSError: it could not be written to the files (it is still counted).
        """
        self._kept = self._edge.copy()
        self._kept_pending = {level: len(data) for level, data in self._pending.items()}
        if len(self._pending[0]) >= FLUSH_BYTES:
            self.flush()

    def rollback(self) -> None:
        """Takes back what was appended since `settle`."""
        self._edge = self._kept.copy()
        for level, length in self._kept_pending.items():
            del self._pending[level][length:]
        self._tiles.clear()

    def flush(self, *, durable: bool = False) -> None:
        """Writes what is settled, and all of it if nothing else is pending. Raises: OSError."""
        for level, data in self._pending.items():
            length = self._kept_pending[level]
            if length:
                write_all(self._fds[level], bytes(data[:length]), self._written[level] * HASH_BYTES)
                self._written[level] += length // HASH_BYTES
                del data[:length]
                self._kept_pending[level] = 0
            if durable:
                os.fdatasync(self._fds[level])

    def trim(self) -> None:
        """Cuts off what the files have behind the tree. Raises: OSError."""
        for level, fd in self._fds.items():
            if os.fstat(fd).st_size > self._written[level] * HASH_BYTES:
                os.ftruncate(fd, self._written[level] * HASH_BYTES)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    # ── Proofs ────────────────────────────────────────────────────────────────────────────────────

    def root(self, size: int | None = None) -> bytes:
        """Root of the first `size` leaves (all by default).

        Raises:
            ValueError: no such tree.
            LedgerError: the entries contradict it.
        """
        if size is None or size == self.size:
            return self._edge.root()
        if not 0 <= size < self.size:
            raise ValueError(f"no tree of size {size}")
        return merkle.root(self.node, size)

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """`merkle.inclusion` in the first `size` leaves. Raises: as `root`."""
        size = self._of(size)
        return merkle.inclusion(self.node, index, size)

    def consistency(self, old: int, new: int | None = None) -> list[bytes]:
        """`merkle.consistency`. Raises: as `root`."""
        return merkle.consistency(self.node, old, self._of(new))

    def _of(self, size: int | None) -> int:
        size = self.size if size is None else size
        if size > self.size:
            raise ValueError(f"no tree of size {size}")
        return size

    def leaf(self, index: int) -> bytes:
        """Hash of one leaf. Raises: as `root`."""
        return self.node(0, index)

    def leaves(self, start: int, count: int) -> list[bytes]:
        """Leaf hashes from `start` on, at most `count`, authenticated. Raises: as `root`."""
        end = min(start + count, self.size)
        found: list[bytes] = []
        while start < end:
            tile, first = self._tile(0, start >> TILE_BITS)[0], start & -TILE
            found += tile[start - first : end - first]
            start = first + TILE
        return found

    def node(self, level: int, index: int) -> bytes:
        """Hash of one complete subtree. Raises: as `root`."""
        if not 0 <= (index + 1) << level <= self.size or index < 0:
            raise ValueError(f"no node {index} at level {level} of a tree of size {self.size}")
        base = level - level % TILE_BITS
        at = index << (level - base)
        return self._tile(base, at >> TILE_BITS)[level - base][(at % TILE) >> (level - base)]

    # ── Tiles ─────────────────────────────────────────────────────────────────────────────────────

    def _tile(self, base: int, tile: int) -> list[list[bytes]]:
        """A tile's subtrees by level, authenticated."""
        first = tile << TILE_BITS
        count = min(TILE, (self.size >> base) - first)
        levels = self._tiles.get((base, tile))
        if levels is not None and len(levels[0]) == count:
            self._tiles.move_to_end((base, tile))
            return levels
        held = 0 if levels is None else len(levels[0])
        levels = levels or [[]]
        merkle.grow(levels, self._read(base, first + held, count - held))
        if not self._authentic(base, tile, count, levels):
            self._tiles.pop((base, tile), None)
            levels = self._repaired(base, tile, count)
        self._tiles[base, tile] = levels
        if len(self._tiles) > MAX_CACHED:
            self._tiles.popitem(last=False)
        return levels

    def _read(self, level: int, first: int, count: int) -> list[bytes]:
        """Nodes of a file, with what is not written yet; unverified."""
        data, written = b"", self._written[level]
        try:
            if first < written:
                wanted = min(count, written - first) * HASH_BYTES
                data = os.pread(self._fds[level], wanted, first * HASH_BYTES).ljust(wanted, b"\0")
        except OSError as error:
            raise LedgerError(f"{self._folder / hashes_name(level)}: {error.strerror}") from error
        start = (first - written) * HASH_BYTES + len(data)
        return _split(data + self._pending[level][start : start + count * HASH_BYTES - len(data)])

    def _authentic(self, base: int, tile: int, count: int, levels: list[list[bytes]]) -> bool:
        if len(levels[0]) != count:
            return False
        if count == TILE:
            return levels[TILE_BITS][0] == self.node(base + TILE_BITS, tile)
        at = 0
        for level in reversed(range(TILE_BITS)):
            if count >> level & 1:
                if levels[level][at >> level] != self._edge.at(base + level):
                    return False
                at += 1 << level
        return True

    def _repaired(self, base: int, tile: int, count: int) -> list[list[bytes]]:
        """The tile from entries, put into the file with all that is below it."""
        start, end = tile << (base + TILE_BITS), ((tile << TILE_BITS) + count) << base
        levels: list[list[bytes]] = [[]]
        try:
            for _ in self._made(start, end, base, levels[0]):
                pass
        except ArchivedError as error:
            raise LedgerError(
                f"the hashes of entries {start} to {end - 1} are damaged, and {error.message}: "
                "bring the archived segments back and start again"
            ) from error
        nodes, levels = levels[0], [[]]
        merkle.grow(levels, nodes)
        if not self._authentic(base, tile, count, levels):
            raise LedgerError(
                f"entries {start} to {end - 1} are not those that were recorded, nor are their hashes"
            )
        try:
            for level, first, data in self._made(start, end, base, []):
                end_of = self._written[level]
                write_all(self._fds[level], data[: max(0, end_of - first) * HASH_BYTES], first * HASH_BYTES)
        except OSError as error:
            raise LedgerError(f"{self._folder}: {error.strerror}") from error
        self._tiles.clear()
        return levels

    def _made(self, start: int, end: int, top: int, nodes: list[bytes]) -> Iterator[tuple[int, int, bytes]]:
        """(level, first, hashes) of all nodes up to level `top` between two leaves; those of `top` go to
        `nodes`."""
        own = Frontier()
        for hashes in self._from_entries(start, end):
            made: dict[int, list[bytes]] = {level: [] for level in LEVELS if level <= top}
            first = {level: (start + own.size) >> level for level in made}
            for leaf in hashes:
                for level, node in own.push(leaf):
                    if level in made:
                        made[level].append(node)
            nodes += made[top]
            for level, some in made.items():
                yield level, first[level], b"".join(some)


def _common(one: bytes, other: bytes) -> int:
    """Whole hashes with which both begin."""
    low, high = 0, min(len(one), len(other)) // HASH_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * HASH_BYTES] == other[: middle * HASH_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def _split(data: Sequence[int] | bytes | bytearray) -> list[bytes]:
    whole = bytes(data)
    return [whole[i : i + HASH_BYTES] for i in range(0, len(whole), HASH_BYTES)]
