"""Writing a ledger out: as C2SP tlog-tiles, and closed segments as an archive.

What the vault sends is not taken on trust: entries are hashed here, and the roots must be those that were
signed. A folder that is not finished has no checkpoint.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.attest.checkpoint import parse_checkpoint
from guestlib.attest.merkle import leaf_hash
from guestlib.errors import ConflictError, WrongStateError
from hostd.admin.ledger_read import (
    ARCHIVE_FORMAT,
    ARCHIVE_NAME,
    CHECKPOINT_NAME,
    TILE,
    Archive,
    archived_lines,
    tile_name,
)
from hostd.core.entry import LedgerError
from hostd.core.merkle import Frontier, verify_consistency
from hostd.ipc import operating as adm
from hostd.platform.durable import sync_folder
from hostd.platform.segments import closed_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Ask = Callable[[adm.LedgerCommand, type], object]

PAGE: Final = 1000


def pages(ask: Ask, start: int, end: int) -> Iterator[list[bytes]]:
    """Lines of entries `start` to `end` - 1, without newlines.

    Raises:
        LedgerError: the vault sent others, or fewer.
    """
    while start < end:
        page = ask(adm.ListLedger(start, min(PAGE, end - start)), adm.LedgerPage)
        assert isinstance(page, adm.LedgerPage)
        if page.start != start or not page.lines:
            raise LedgerError(f"the vault has no entry {start}")
        yield list(page.lines)
        start += len(page.lines)


def export(ask: Ask, folder: Path, older: Iterator[list[bytes]] | None, first: int) -> int:
    """Writes tiles, entry bundles and, last, the checkpoint; how many entries. Entries before `first` are
    archived: `older` gives them.

    Raises:
        HostdError: the vault refused, or sent what does not lead to its checkpoint.
        OSError: it cannot be written.
    """
    answer = ask(adm.LedgerCheckpoint(), adm.Checkpoint)
    assert isinstance(answer, adm.Checkpoint)
    checkpoint = parse_checkpoint(answer.note)
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is not empty")
    tiles = _Tiles(folder / "tile")
    for source in (older, pages(ask, first, checkpoint.size)):
        for lines in source or ():
            tiles.add(lines[: checkpoint.size - tiles.size])
    tiles.finish()
    if (tiles.size, tiles.root()) != (checkpoint.size, checkpoint.root):
        raise LedgerError("the entries do not lead to the checkpoint's root (`hostctl ledger verify`)")
    write(folder / CHECKPOINT_NAME, answer.note)
    return checkpoint.size


class _Tiles:
    """Writes tiles as their hashes come; holds one of each level."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._edge = Frontier()
        self._levels: list[list[bytes]] = [[]]
        self._count = [0]
        self._bundle: list[bytes] = []

    @property
    def size(self) -> int:
        return self._edge.size

    def root(self) -> bytes:
        return self._edge.root()

    def add(self, lines: list[bytes]) -> None:
        for line in lines:
            self._bundle.append(len(line).to_bytes(2, "big") + line)
            if len(self._bundle) == TILE:
                self._put("entries", self._edge.size // TILE, TILE, b"".join(self._bundle))
                self._bundle.clear()
            for level, node in self._edge.push(leaf_hash(line)):
                if level % 8 == 0:
                    self._add(level // 8, node)

    def _add(self, level: int, node: bytes) -> None:
        if level == len(self._levels):
            self._levels.append([])
            self._count.append(0)
        tile = self._levels[level]
        tile.append(node)
        if len(tile) == TILE:
            self._put(str(level), self._count[level], TILE, b"".join(tile))
            self._count[level] += 1
            tile.clear()

    def finish(self) -> None:
        """The partial tiles."""
        if self._bundle:
            index = self._edge.size // TILE
            self._put("entries", index, len(self._bundle), b"".join(self._bundle))
        for level, tile in enumerate(self._levels):
            if tile:
                self._put(str(level), self._count[level], len(tile), b"".join(tile))

    def _put(self, kind: str, index: int, width: int, data: bytes) -> None:
        path = self._folder / kind / tile_name(index, width)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def archive(ask: Ask, folder: Path, keep: int) -> tuple[int, int]:
    """Copies the closed segments but the last `keep` to a folder, which may have the ones before them, and
    has the vault remove them; (first, end) of what was archived.

    Raises:
        HostdError: nothing to archive, the vault refused, or the entries are not what was signed.
        OSError: it cannot be written; the vault keeps all.
    """
    bounds, before = _bounds(ask), _archived(folder)
    if before is not None and before.end in bounds[1:]:
        # Copied before, and not removed then. Somebody may have been at the copy since.
        if _root_of_lines(folder, before.end) != before.root:
            raise LedgerError(
                f"{folder} says that it has the first {before.end} entries, and does not: nothing was removed"
            )
        ask(adm.DropSegments(before.end, before.root), adm.Nothing)
        bounds = _bounds(ask)
    ends = bounds[1 : len(bounds) - keep]
    if not ends:
        raise WrongStateError("no closed segment to archive")
    first, end = bounds[0], ends[-1]
    held = 0 if before is None else before.end
    if held != first:
        raise ConflictError(f"{folder} has the first {held} entries; the first to archive is {first}")
    _make_folder(folder)
    proof = ask(adm.LedgerConsistency(end), adm.ConsistencyProof)
    assert isinstance(proof, adm.ConsistencyProof)
    with open(folder / "hashes-0", "r+b" if first else "wb", opener=_private) as hashes:
        hashes.seek(first * 32)
        hashes.truncate()
        for start, upto in zip(bounds, ends, strict=False):
            _copy(ask, folder / closed_name(start), start, upto, hashes.write)
        hashes.flush()
        os.fsync(hashes.fileno())
    root = _root(folder / "hashes-0", end)
    if root != proof.old_root:
        raise LedgerError(f"entries 0 to {end - 1} do not lead to the ledger's root; nothing was removed")
    _describe(ask, folder, end, root)
    ask(adm.DropSegments(end, root), adm.Nothing)
    return first, end


def _bounds(ask: Ask) -> list[int]:
    """First entries of the closed segments, and of the open one."""
    found = ask(adm.ListSegments(), adm.SegmentList)
    assert isinstance(found, adm.SegmentList)
    return [*found.starts, found.end]


def _archived(folder: Path) -> Archive | None:
    """What is in an archive already."""
    try:
        return msgspec.json.decode((folder / ARCHIVE_NAME).read_bytes(), type=Archive)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise LedgerError(f"{folder / ARCHIVE_NAME}: {error}") from error


def _copy(ask: Ask, path: Path, start: int, end: int, hashed: Callable[[bytes], object]) -> None:
    with open(path, "wb", opener=_private) as file:
        for lines in pages(ask, start, end):
            for line in lines:
                file.write(line + b"\n")
                hashed(leaf_hash(line))
        file.flush()
        os.fsync(file.fileno())


def _private(path: str, flags: int) -> int:
    """Entries tell who did what: as in the state directory they are nobody else's to read."""
    return os.open(path, flags | os.O_CLOEXEC, 0o640)


def _make_folder(folder: Path) -> None:
    """Durably: the vault removes its copy of what is put there."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    for one in missing:
        sync_folder(one.parent)


def _root_of_lines(folder: Path, end: int) -> bytes:
    """Raises: LedgerError, there are fewer."""
    edge = Frontier()
    for lines in archived_lines(folder, end):
        edge.extend([leaf_hash(line) for line in lines])
    return edge.root()


def _root(hashes: Path, end: int) -> bytes:
    edge = Frontier()
    with hashes.open("rb") as file:
        for _ in range(end):
            edge.append(file.read(32))
    return edge.root()


def _describe(ask: Ask, folder: Path, end: int, root: bytes) -> None:
    """The checkpoint of a head that covers the archive, and the proof that it does."""
    note = ask(adm.LedgerCheckpoint(), adm.Checkpoint)
    assert isinstance(note, adm.Checkpoint)
    checkpoint = parse_checkpoint(note.note)
    if checkpoint.size < end:
        raise WrongStateError("the last segments are not under a signed head yet: the next batch does it")
    proof = ask(adm.LedgerConsistency(end, checkpoint.size), adm.ConsistencyProof)
    assert isinstance(proof, adm.ConsistencyProof)
    verify_consistency(end, root, checkpoint.size, checkpoint.root, proof.proof)
    write(folder / CHECKPOINT_NAME, note.note)
    described = Archive(ARCHIVE_FORMAT, end, root, proof.proof)
    write(folder / ARCHIVE_NAME, msgspec.json.encode(described))


def write(path: Path, data: bytes) -> None:
    """Whole and durable, or not at all. Raises: OSError."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)
