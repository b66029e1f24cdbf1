"""Reading a ledger that no vault serves: an export, an archive, or a state directory.

Nothing in it is trusted. The checkpoint is verified against a trust bundle; the entries, one after the
other, must lead to its root. If they do not, the hashes kept beside them tell which entry is not as it was
recorded, provided that these lead to the root. Memory is bounded whatever the size.

    export   checkpoint, tile/entries/…, tile/0/…   C2SP tlog-tiles
    archive  checkpoint, archive.json, 000000000000.jsonl, …, hashes-0
    state    checkpoint, ledger.jsonl, ledger.d/
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.attest.checkpoint import Checkpoint, parse_checkpoint, verify_checkpoint
from guestlib.attest.merkle import HASH_BYTES, leaf_hash
from guestlib.errors import MalformedError, NotFoundError, VerificationError
from hostd.core import ledgercheck
from hostd.core.entry import LedgerError
from hostd.core.merkle import Frontier, verify_consistency
from hostd.platform.segments import CHUNK, Segment, Segments, chunks, closed_segments, number_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guestlib.attest.bundle import TrustBundle
    from hostd.core.ledgercheck import Fault

TILE: Final = 256
MAX_BUNDLE_BYTES: Final = TILE * (2 + 0xFFFF)
ARCHIVE_NAME: Final = "archive.json"
CHECKPOINT_NAME: Final = "checkpoint"


class Archive(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`archive.json`: how the archived entries, the first of all, belong to the checkpoint beside it."""

    format: str
    end: int
    """Entries in the archive."""
    root: bytes
    """Of these."""
    consistency: tuple[bytes, ...]
    """Proof (RFC 9162, 2.1.4) from `end` to the checkpoint's size."""


ARCHIVE_FORMAT: Final = "hostd-archive/1"


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found. `problem` is empty if every entry is as it was recorded."""

    kind: str
    first: int
    entries: int
    root: bytes
    vouched: tuple[str, ...]
    """Who signed the checkpoint."""
    problem: str
    later: int = 0
    """Lines that stand after these entries: of a state directory what came after the checkpoint, of an
    archive what is there besides. Nothing here vouches for them."""


def tile_path(index: int) -> str:
    """C2SP tlog-tiles: 1234067 is `x001/x234/067`."""
    parts = [f"{index % 1000:03d}"]
    while index := index // 1000:
        parts.insert(0, f"x{index % 1000:03d}")
    return "/".join(parts)


def tile_name(index: int, width: int) -> str:
    """With `.p/<W>` if it is partial."""
    return tile_path(index) + ("" if width == TILE else f".p/{width}")


def kind_of(folder: Path) -> str:
    """Raises: NotFoundError, it is none."""
    for kind, mark in (("export", "tile"), ("archive", ARCHIVE_NAME), ("state", "ledger.jsonl")):
        if (folder / mark).exists():
            return kind
    raise NotFoundError(f"{folder} is no export, archive or state directory of a ledger")


def verify(folder: Path, bundle: TrustBundle) -> Verified:
    """Verifies all that is in a folder.

    Raises:
        VerificationError: nobody known signed the checkpoint.
        HostdError: something is missing or does not read.
        OSError: it cannot be read.
    """
    kind = kind_of(folder)
    checkpoint = parse_checkpoint((folder / CHECKPOINT_NAME).read_bytes())
    vouched = verify_checkpoint(checkpoint, bundle)
    source: _Source
    if kind == "export":
        source = _Export(folder, checkpoint)
    elif kind == "archive":
        source = _Archived(folder, checkpoint)
    else:
        source = _State(folder, checkpoint)
    fault, root, later = _compare(source)
    problem = "" if fault is None else f"{source.place(fault.at)}: {fault.what}"
    return Verified(kind, source.first, source.end, root, vouched, problem, later)


class _Source:
    """Entries `first` to `end` - 1 and what they must lead to."""

    first = 0
    end: int
    ends = False
    """Nothing follows entry `end` - 1 where it is; else what was appended since may."""
    root: bytes
    edge: Frontier
    """Before `first`."""

    def lines(self) -> Iterator[list[bytes]]:
        raise NotImplementedError

    def leaves(self, start: int, count: int) -> list[bytes]:
        """Hashes kept beside the entries; unverified."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        raise NotImplementedError


def _compare(source: _Source) -> tuple[Fault | None, bytes, int]:
    """The first entry that is not as recorded, the root that the lines up to `end` lead to, and how many
    whole lines follow there."""
    edge, kept = source.edge.copy(), source.edge.copy()
    lines = source.lines()
    numbers, behind, later = True, False, 0
    at = source.first
    for chunk in lines:
        some = chunk[: source.end - at]
        if not all(
            line.startswith(b'{"seq":%d,' % number) and line.endswith(b"\n")
            for number, line in enumerate(some, at)
        ):
            numbers = False
        edge.extend([leaf_hash(line[:-1]) for line in some])
        at += len(some)
        if at >= source.end:
            behind = source.ends and len(chunk) > len(some)
            if not source.ends:
                rest = itertools.chain(chunk[len(some) :], itertools.chain.from_iterable(lines))
                later = sum(line.endswith(b"\n") for line in rest)
            break
    if edge.size == source.end and numbers and edge.root() == source.root:
        last = source.end - 1
        fault = ledgercheck.Fault(last, f"something stands after entry {last}") if behind else None
        return fault, edge.root(), later
    for at in range(source.first, source.end, CHUNK):
        kept.extend(source.leaves(at, min(CHUNK, source.end - at)))
    if kept.size == source.end and kept.root() == source.root:
        return _audited(source), edge.root(), 0
    return _by_number(source, edge.size), edge.root(), 0


def _audited(source: _Source) -> Fault | None:
    end = source.end

    def leaves(at: int, count: int) -> list[bytes]:
        return source.leaves(at, max(0, min(count, end - at)))

    check = ledgercheck.audit(_upto(source), leaves, source.first, lambda: end, number_of)
    return ledgercheck.fault_of(check)


def _upto(source: _Source) -> Iterator[list[bytes]]:
    """Lines; of those after `end` (appended after the checkpoint was signed) only what tells where a line
    has gone."""
    ahead = source.end - source.first + ledgercheck.AHEAD
    for chunk in source.lines():
        yield chunk[:ahead]
        ahead -= len(chunk)
        if ahead <= 0:
            return


def _by_number(source: _Source, size: int) -> Fault:
    """Without hashes that lead to the root: only what the lines say of themselves."""
    at = source.first
    for line in itertools.chain.from_iterable(source.lines()):
        if at >= source.end:
            break
        if not line.endswith(b"\n") or number_of(line) != at:
            return ledgercheck.Fault(at, f"something else stands in the place of entry {at}")
        at += 1
    if at < source.end:
        return ledgercheck.Fault(at, f"entries {at} to {source.end - 1} are missing at the end")
    return ledgercheck.Fault(
        source.first,
        f"entries {source.first} to {source.end - 1} do not lead to the signed root; which was edited "
        "cannot be told: the hashes kept beside them do not lead to it either",
    )


class _Files(_Source):
    """Segments, and leaf hashes in one file."""

    segments: list[Segment]
    hashes: Path

    def lines(self) -> Iterator[list[bytes]]:
        for segment in self.segments:
            yield from chunks(segment.path)

    def leaves(self, start: int, count: int) -> list[bytes]:
        try:
            with self.hashes.open("rb") as file:
                file.seek(start * HASH_BYTES)
                data = file.read(count * HASH_BYTES)
        except OSError:
            return []
        return [data[i : i + HASH_BYTES] for i in range(0, len(data) - HASH_BYTES + 1, HASH_BYTES)]

    def place(self, index: int) -> str:
        segment = next(s for s in reversed(self.segments) if s.first <= index or s is self.segments[0])
        return f"{segment.path.name} line {index - segment.first + 1}"


class _Archived(_Files):
    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        try:
            archive = msgspec.json.decode((folder / ARCHIVE_NAME).read_bytes(), type=Archive)
        except msgspec.MsgspecError as error:
            raise MalformedError(f"{folder / ARCHIVE_NAME}: {error}") from error
        if archive.format != ARCHIVE_FORMAT:
            raise MalformedError(f"{folder / ARCHIVE_NAME}: not {ARCHIVE_FORMAT}")
        try:
            verify_consistency(
                archive.end, archive.root, checkpoint.size, checkpoint.root, archive.consistency
            )
        except ValueError as error:
            raise LedgerError(
                f"{folder / ARCHIVE_NAME} does not belong to the checkpoint: {error}"
            ) from error
        self.segments = closed_segments(folder)
        if not self.segments or self.segments[0].first:
            raise LedgerError(f"{folder}: the segment of entry 0 is missing")
        self.end, self.root, self.edge = archive.end, archive.root, Frontier()
        self.hashes = folder / "hashes-0"


class _State(_Files):
    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        found = Segments(folder / "ledger.jsonl")
        first_line = next(itertools.chain.from_iterable(chunks(found.path)), b"")
        found.open_first = number_of(first_line) or 0
        self.segments = found.all()
        self.first = found.first
        self.hashes = found.folder / "hashes-0"
        self.end, self.root = checkpoint.size, checkpoint.root
        self.edge = self._edge() if self.first else Frontier()

    def _edge(self) -> Frontier:
        """Of what is archived, as the first line says: it leads to the root, or the entries do not."""
        line = next(itertools.chain.from_iterable(self.lines()))
        try:
            rotation = msgspec.json.decode(line, type=_First).rotation
            return Frontier(self.first, rotation.frontier)
        except (msgspec.MsgspecError, ValueError) as error:
            raise LedgerError(f"{self.segments[0].path}: line 1: {error}") from error


class _Rotation(msgspec.Struct, frozen=True):
    frontier: tuple[bytes, ...]


class _First(msgspec.Struct, frozen=True):
    rotation: _Rotation


class _Export(_Source):
    ends = True

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self._folder = folder
        self.end, self.root, self.edge = checkpoint.size, checkpoint.root, Frontier()

    def _tile(self, kind: str, index: int) -> Path:
        return self._folder / "tile" / kind / tile_name(index, min(TILE, self.end - index * TILE))

    def lines(self) -> Iterator[list[bytes]]:
        for index in range((self.end + TILE - 1) // TILE):
            path = self._tile("entries", index)
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_BUNDLE_BYTES + 1)
            except OSError as error:
                raise LedgerError(f"{path}: {error.strerror}") from error
            bodies = split_bundle(data)
            rest = data[sum(2 + len(body) for body in bodies) :]
            yield [*(body + b"\n" for body in bodies), *([rest] if rest else [])]

    def leaves(self, start: int, count: int) -> list[bytes]:
        found: list[bytes] = []
        for index in range(start // TILE, (start + count + TILE - 1) // TILE):
            try:
                data = self._tile("0", index).read_bytes()
            except OSError:
                break
            found += [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]
        return found[start % TILE : start % TILE + count]

    def place(self, index: int) -> str:
        return f"{self._tile('entries', index // TILE).relative_to(self._folder)} entry {index % TILE}"


def split_bundle(data: bytes) -> list[bytes]:
    """Entries of a bundle: each after its length, 2 bytes, big endian. What is cut off at the end is left."""
    found, at = [], 0
    while at + 2 <= len(data):
        length = int.from_bytes(data[at : at + 2], "big")
        if at + 2 + length > len(data):
            break
        found.append(data[at + 2 : at + 2 + length])
        at += 2 + length
    return found


def verify_proof(document: object, bundle: TrustBundle) -> tuple[str, ...]:
    """An inclusion proof as `hostctl ledger prove` writes it: who vouches for the checkpoint it leads to.

    Raises:
        MalformedError: it is none.
        VerificationError: it does not hold.
    """
    from guestlib.attest.merkle import root_of
    from guestlib.attest.steps import Step

    try:
        proof = msgspec.convert(document, type=Proof)
    except msgspec.ValidationError as error:
        raise MalformedError(f"proof: {error}") from error
    checkpoint = parse_checkpoint(proof.checkpoint.encode())
    vouched = verify_checkpoint(checkpoint, bundle)
    if number_of(proof.line.encode()) != proof.index:
        raise VerificationError(Step.FORMAT, f"the line is not entry {proof.index}")
    try:
        root = root_of(leaf_hash(proof.line.encode()), proof.index, checkpoint.size, proof.proof)
    except ValueError as error:
        raise VerificationError(Step.FORMAT, str(error)) from error
    if root != checkpoint.root:
        raise VerificationError(Step.FORMAT, "the proof does not lead to the checkpoint's root")
    return vouched


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document of an inclusion proof."""

    index: int
    line: str
    proof: tuple[bytes, ...]
    checkpoint: str
    format: str = "hostd-ledger-proof/1"


def archived_lines(folder: Path, end: int) -> Iterator[list[bytes]]:
    """Lines, without newlines, of the first `end` entries in an archive; nothing of it is verified.

    Raises:
        LedgerError: it has fewer, or does not read.
    """
    left = end
    for segment in closed_segments(folder):
        for lines in chunks(segment.path):
            yield [line.removesuffix(b"\n") for line in lines[:left]]
            left -= min(left, len(lines))
        if not left:
            return
    raise LedgerError(f"{folder}: {left} of the first {end} entries are missing")
