"""The ledger: every use of a key, every refusal and every deed of an officer, append-only.

A file of JSON lines; the entries are the leaves of a Merkle tree (`hostd.core.merkle`), whose head
the TPM signs with every batch (`guestlib.attest.binding.pass_qualifying`). An entry holds no secret
and no data of the caller. `append` adds in memory, `sync` makes it durable: no answer leaves between
the two. A write that fails leaves the ledger closed for good in this process: what is on the disk
then is known only after reading it again.

On opening, a last line without its newline was never acknowledged (the power went during a write)
and is cut off; anything else that does not read is refused.
"""

from __future__ import annotations

import os
import re
from array import array
from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.errors import UnavailableError
from hostd.core.merkle import Tree, leaf_hash

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_ENTRY_BYTES: Final = 32 << 10
"""`detail` is at most 4000 characters, of which each may take six bytes (`\\u0000`)."""


class LedgerError(UnavailableError):
    """The ledger cannot be read or written; nothing is answered without it."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line. Field names are append-only (docs/architecture.md, "Ledger")."""

    seq: int
    time: int
    """UTC, milliseconds since 1970."""
    event: str
    """`operation`, or what hostd or an officer did: `start`, `unseal`, `drift`, `clear`, …"""
    outcome: str
    """`released`, `denied`, `refused-drift`, `withheld`, `failed`; `done` for hostd's own deeds."""
    v: int = 1
    passed: int = 0
    """Number of the pass of readings it rests on; 0 if none."""
    principal: str = ""
    tenant: str = ""
    op: str = ""
    key: str = ""
    version: int = 0
    code: str = ""
    """Error code of `guestlib.errors` for a refusal."""
    detail: str = ""
    """For operators: findings, reasons."""
    request: bytes = b""
    """Commitment to the request, 32 bytes (`guestlib.attest.canonical`); empty if there is none."""
    response: bytes = b""
    """Commitment to the answer, likewise; a refusal has none."""
    pass_entry: int = 0
    """Of an entry of a batch: number of the `pass` entry that the batch begins with."""
    evidence: bytes = b""
    """Of `pass`: the evidence digest that the batch's quote signs, 32 bytes."""
    first_start_ns: int = 0
    last_end_ns: int = 0
    """Of `pass`: when its first reading started and its last one ended, the vault's monotonic clock."""
    readings: tuple[int, ...] = ()
    """Of `pass`: numbers of its first and last reading."""
    requests: int = 0
    """Of `pass`: entries of the batch, which follow at once."""
    withheld: tuple[tuple[int, int], ...] = ()
    """Of `withheld`: first and last of each run of entries whose answers never left, ascending."""


_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(Entry)
_NOTED: Final = re.compile(rb'"event":"(?:drift|clear|officers|manifest|retire|withheld)"')
"""Events that the next start needs to know of. (A caller's text cannot look so: its quotes are escaped.)"""


class Ledger:
    """The open ledger."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file and rebuilds the tree from it.

        Raises:
            LedgerError: it does not read, or a line is not an entry in its place.
        """
        self.path = path
        self.tree = Tree()
        self.open_drift: dict[str, int] = {}
        """As the file stood when it was opened: component → entry of a drift that no later entry clears."""
        self.last: dict[str, Entry] = {}
        """As the file stood when it was opened: `officers`, `manifest`, `retire` → the last such entry."""
        self.withheld: list[tuple[int, int]] = []
        """Runs of entries whose answers never left, ascending."""
        self._starts = array("Q")
        """Where each line begins in the file, bytes."""
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._failed: str | None = None
        self.bytes = 0
        try:
            created = not path.exists()
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            if created:
                folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
                os.fsync(folder)
                os.close(folder)
            good = self._load()
            if good != os.fstat(self._fd).st_size:
                os.ftruncate(self._fd, good)
                os.fsync(self._fd)
            os.lseek(self._fd, good, os.SEEK_SET)
            self.bytes = good
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}") from error
        self._durable = self.tree.size

    def _load(self) -> int:
        end = 0
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                if len(line) > MAX_ENTRY_BYTES:
                    raise LedgerError(f"{self.path}: line {number + 1} is too long")
                body = line[:-1]
                if b'"seq":%d,' % number not in body[:32]:
                    raise LedgerError(f"{self.path}: line {number + 1} is not entry {number}")
                self.tree.append(leaf_hash(body))
                self._starts.append(end)
                end += len(line)
                if _NOTED.search(body):
                    self._note(number, body)
        return end

    def _note(self, number: int, body: bytes) -> None:
        try:
            entry = _DECODER.decode(body)
        except ValueError as error:
            raise LedgerError(f"{self.path}: line {number + 1} is not an entry") from error
        if entry.event == "drift":
            self.open_drift[entry.op] = entry.seq
        elif entry.event == "clear":
            self.open_drift.pop(entry.op, None)
        elif entry.event == "withheld":
            self.withheld.extend(entry.withheld)
        else:
            self.last[entry.event] = entry

    @property
    def size(self) -> int:
        """Entries, those not yet durable included."""
        return self.tree.size

    def append(self, entry: Entry) -> None:
        """Adds an entry whose `seq` is `size`; not durable before `sync`."""
        if self._failed:
            raise LedgerError(f"ledger is closed: {self._failed}")
        if entry.seq != self.size:
            raise ValueError(f"entry {entry.seq} at place {self.size}")
        body = _ENCODER.encode(entry)
        if len(body) >= MAX_ENTRY_BYTES:
            raise ValueError("entry is too long")
        self._buffer.append(body + b"\n")
        self._starts.append(self.bytes + self._buffered)
        self._buffered += len(body) + 1
        self.tree.append(leaf_hash(body))
        self.withheld.extend(entry.withheld)

    def sync(self) -> None:
        """Writes what was appended and waits for the disk.

        Raises:
            LedgerError: it failed; the ledger takes no more in this process.
        """
        if self._failed:
            raise LedgerError(f"ledger is closed: {self._failed}")
        if not self._buffer:
            return
        data = b"".join(self._buffer)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fdatasync(self._fd)
        except OSError as error:
            self._failed = error.strerror or str(error)
            self._cut_back()
            raise LedgerError(f"{self.path}: {self._failed}") from error
        self._buffer.clear()
        self._buffered = 0
        self._durable = self.tree.size
        self.bytes += len(data)

    def _cut_back(self) -> None:
        """Best effort: takes the unacknowledged tail off the file, so that the next start sees none."""
        self.tree.truncate(self._durable)
        self._buffer.clear()
        self._buffered = 0
        del self._starts[self._durable :]
        try:
            os.ftruncate(self._fd, self.bytes)
            os.fsync(self._fd)
        except OSError:
            return

    @property
    def durable(self) -> int:
        """Entries that are on the disk."""
        return self._durable

    def stretch(self, start: int, count: int) -> list[bytes]:
        """Durable lines from `start` on, at most `count`, as they are on the disk, without newlines.

        Raises:
            LedgerError: the file does not read, or is not what was written.
        """
        end = min(start + count, self._durable)
        if not 0 <= start < end:
            return []
        begin = self._starts[start]
        length = (self._starts[end] if end < len(self._starts) else self.bytes) - begin
        try:
            data = os.pread(self._fd, length, begin)
        except OSError as error:
            raise LedgerError(f"{self.path}: {error.strerror}") from error
        lines = data.split(b"\n")
        if len(data) != length or lines.pop() or len(lines) != end - start:
            raise LedgerError(f"{self.path}: entries {start} to {end - 1} are not what was written")
        return lines

    def entries(self, start: int, count: int) -> Iterator[Entry]:
        """Durable entries from `start` on."""
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file):
                    if number >= min(start + count, self._durable):
                        return
                    if number >= start:
                        yield _DECODER.decode(line)
        except (OSError, ValueError) as error:
            raise LedgerError(f"{self.path}: {error}") from error

    def lines(self) -> Iterator[bytes]:
        """All durable lines as they are on the disk now, without their newlines."""
        try:
            with self.path.open("rb") as file:
                for line in file:
                    yield line.removesuffix(b"\n")
        except OSError as error:
            raise LedgerError(f"{self.path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)
