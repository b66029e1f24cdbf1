"""Judges the files that hypervisor processes map (pure), and keeps what is known of each.

A file number becomes known by its `FileIdentity`: SHA-256 of the whole file and tags of its segments,
taken from the same bytes. It is approved if the reference values have that digest for its path (the
path without ` (deleted)`: an upgrade leaves running VMs on the old file, which is legal while its
digest is approved). From then on equal tags are equal bytes. A file has a name in each process that maps it
(links, mounts); one that has its digest approved is enough, so that no process can spoil it for another by
calling it something else.

`FILES` is about approved files: that none of them changed. A file that is not approved, or not known
yet, concerns the VM that maps it and nobody else (`appraise_process`); so one VM cannot close the gate for
the others by mapping something strange.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostd.core.codes import Code
from hostd.core.findings import FILES, Finding, Severity, Status, Verdict
from hostd.core.readings import FileIdentity, Missing, Segment
from hostd.core.reference import DELETED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostd.core.readings import AlteredPage, FilesReading
    from hostd.core.reference import Reference

MAX_FINDINGS: Final = 64
MAX_IDENTIFY: Final = 256
"""File numbers asked for in one verdict; the rest come with the next."""
MAX_KNOWN: Final = 65536

SegmentKey = tuple[int, int, int]
"""(file, offset, length)."""


@dataclass(slots=True)
class KnownFile:
    """What an identity said."""

    path: str
    size: int
    sha256: str
    tags: dict[SegmentKey, bytes] = field(default_factory=dict)

    also: str = ""
    """Another name of it, under which its digest was approved."""

    def approved(self, reference: Reference) -> bool:
        return self.sha256 in reference.expected(self.path) or (
            bool(self.also) and self.sha256 in reference.expected(self.also)
        )

    def called(self, name: str, reference: Reference) -> None:
        """Takes in a name that the file has in a process."""
        if name not in (self.path, self.also) and self.sha256 in reference.expected(name):
            self.also = name


class FileBook:
    """All files known, by the measurer's numbers, and which segments the last reading found good.

    `good`, with what was not read for it and only stands, is for hostd's own processes; hypervisors rest on
    what was read for that very reading, `fresh`."""

    def __init__(self) -> None:
        self.known: dict[int, KnownFile] = {}
        self.unreadable: dict[int, str] = {}
        self.good: frozenset[SegmentKey] = frozenset()
        self.fresh: frozenset[SegmentKey] = frozenset()

    def learn(self, number: int, reading: FileIdentity | Missing) -> None:
        """Takes in what a file is. The first identity stands; a later one with the same digest adds
        segments. An approved file that changed is not made good by being identified again."""
        if isinstance(reading, Missing):
            if number not in self.known and len(self.unreadable) < MAX_KNOWN:
                self.unreadable[number] = reading.reason
            return
        if reading.file != number or (number not in self.known and len(self.known) >= MAX_KNOWN):
            return
        self.unreadable.pop(number, None)
        digest = reading.sha256.hex()
        known = self.known.get(number)
        if known is None:
            known = self.known[number] = KnownFile(reading.path, reading.size, digest)
        if known.sha256 == digest:
            if known.path != reading.path:
                known.also, known.path = known.also or known.path, reading.path
            for segment in reading.segments:
                known.tags.setdefault(_key(segment), segment.tag)

    def appraise(self, reading: FilesReading, reference: Reference, *, processes: int | None) -> Verdict:
        """Judges content. `processes`: hypervisor processes in the last guests reading; None: none yet."""
        good: set[SegmentKey] = set()
        identify: set[int] = set()
        altered: list[Segment] = []
        for segment in reading.segments:
            known = self.known.get(segment.file)
            tag = None if known is None else known.tags.get(_key(segment))
            if known is None or tag is None:
                if segment.file not in self.unreadable:
                    identify.add(segment.file)
            elif not known.approved(reference):
                continue
            elif tag == segment.tag:
                good.add(_key(segment))
            else:
                altered.append(segment)
        self.good = self.fresh = frozenset(good)
        if reading.standing:
            self.fresh = self.good - set(map(_key, reading.segments[-reading.standing :]))
        claims = self._claims(reading, reference)
        wanted = frozenset(sorted(identify)[:MAX_IDENTIFY])
        findings = tuple(self._altered(altered, reading.altered))[:MAX_FINDINGS]
        if findings:
            return Verdict(FILES, Status.DRIFTED, findings, wanted, claims)
        # Without segments there is nothing to be good, unless there is no hypervisor process to have any.
        if good or (not reading.segments and processes == 0):
            return Verdict(FILES, Status.VERIFIED, (), wanted, claims)
        return Verdict(FILES, Status.PENDING, (), wanted, claims)

    def _claims(self, reading: FilesReading, reference: Reference) -> tuple[tuple[str, str], ...]:
        mapped = {segment.file for segment in reading.segments}
        known = [self.known[number] for number in mapped if number in self.known]
        good = sum(key[2] for key in self.good)
        return (
            ("files", str(len(mapped))),
            ("approved", str(sum(file.approved(reference) for file in known))),
            ("not identified", str(len(mapped) - len(known))),
            ("deleted on disk", str(sum(file.path.endswith(DELETED) for file in known))),
            (
                "verified",
                f"{good / 1e6:.1f} MB of {sum(item.length for item in reading.segments) / 1e6:.1f} MB",
            ),
        )

    def _altered(self, segments: Iterable[Segment], pages: tuple[AlteredPage, ...]) -> Iterable[Finding]:
        for segment in segments:
            known = self.known[segment.file]
            end = segment.offset + segment.length
            inside = [
                page
                for page in pages
                if page.file == segment.file and segment.offset <= page.file_offset < end
            ]
            for page in inside:
                yield _finding(
                    known.path,
                    f"bytes {page.expected.hex(' ')} (file of SHA-256 {known.sha256})",
                    f"bytes {page.seen.hex(' ')}",
                    f"{page.symbol}, file offset {page.file_offset:#x}".removeprefix(", "),
                )
            if not inside:
                where = f"file offsets {segment.offset:#x}-{end:#x}"
                yield _finding(known.path, f"content of SHA-256 {known.sha256}", "other content", where)


def _key(segment: Segment) -> SegmentKey:
    return segment.file, segment.offset, segment.length


def _finding(path: str, expected: str, seen: str, where: str) -> Finding:
    return Finding(str(FILES), Code.FILE_ALTERED.value, Severity.CRITICAL, path, expected, seen, where)
