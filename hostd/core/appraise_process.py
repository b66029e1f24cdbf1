"""Judges one hypervisor process (pure).

Good means: the process is who it was; its own executable is mapped; every mapping of code or constants
belongs to an approved file, in a segment that the last files reading found good, and is not
writable; nothing else is executable but the vDSO; and no page differs from the file's. Under TCG, if
the configuration accepts a JIT, one anonymous area of the size that QEMU gives its code buffer is
accepted where it was when it was first seen: it may shrink or be split, and never grow or move. Anything
else that is anonymous and executable is a finding, and under KVM all of it is.

A file not known yet makes the process PENDING and is asked for. A process that is gone is PENDING too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostd.core.codes import Code
from hostd.core.findings import SELF, Component, Finding, Severity, Status, Verdict
from hostd.core.readings import EXEC, READ, WRITE
from hostd.core.reference import DELETED, date_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from hostd.core.appraise_files import FileBook
    from hostd.core.readings import AlteredPage, Hypervisor, Mapping, ProcessReading
    from hostd.core.reference import Reference

MAX_FINDINGS: Final = 64
MAX_PROCESSES: Final = 8192
VDSO: Final = "[vdso]"
MIN_JIT, MAX_JIT = 1 << 20, 2 << 30
"""Bytes of TCG's code buffer (tcg/region.c: MIN_CODE_GEN_BUFFER_SIZE, MAX_CODE_GEN_BUFFER_SIZE)."""
JIT_GAP: Final = 64 << 10
"""Guard pages stand between the regions of the buffer."""
_REASONS: Final = {
    "private": "a copy of the page",
    "frame": "another page than the file's",
    "swapped": "a copy of the page, swapped out",
}

Key = tuple[int, int]
"""(pid, start time)."""


@dataclass(slots=True)
class _Seen:
    """A process as it was before."""

    hypervisor: Hypervisor
    base: int = 0
    """Where its own code began when that was first seen. Only execve(2) moves it: a process that executes
    the same program again keeps its pid and start time, and is another (another machine, say)."""
    jit: tuple[tuple[int, int], ...] = ()


class Processes:
    """What is kept of each process between its readings."""

    def __init__(self, *, allow_jit: bool) -> None:
        self._allow_jit = allow_jit
        self._seen: dict[Key, _Seen] = {}

    def keep_only(self, alive: Collection[Key]) -> None:
        """Forgets processes that are not in the latest guests reading."""
        for key in [key for key in self._seen if key not in alive]:
            del self._seen[key]

    def appraise(
        self, component: Component, reading: ProcessReading, files: FileBook, reference: Reference
    ) -> Verdict:
        """Judges a reading that answers for `component`."""
        hypervisor = reading.hypervisor
        key = (hypervisor.pid, hypervisor.start_time)
        if hypervisor.vm != component.vm or (key not in self._seen and len(self._seen) >= MAX_PROCESSES):
            return Verdict(component, Status.PENDING)
        judge = _Judge(component, hypervisor, files, reference)
        seen = self._seen.setdefault(key, _Seen(hypervisor))
        judge.identity(seen.hypervisor)
        seen.base = seen.base or _base(reading)
        judge.place(seen.base, _base(reading))
        anonymous = [mapping for mapping in reading.mappings if mapping.file is None]
        judge.anonymous(anonymous, self._regions(seen, anonymous))
        for mapping in reading.mappings:
            if mapping.file is not None:
                judge.mapping(mapping, mapping.file)
        judge.pages(reading)
        verdict = judge.verdict(reading)
        if not any(finding.code == Code.IDENTITY_CHANGED for finding in verdict.findings):
            seen.hypervisor = hypervisor
        return verdict

    def _regions(self, seen: _Seen, anonymous: list[Mapping]) -> tuple[tuple[int, int], ...]:
        """Where anonymous executable memory is accepted: where it was when there first was any."""
        if not self._allow_jit or seen.hypervisor.accel != "tcg":
            return ()
        if not seen.jit:
            seen.jit = _code_buffer(mapping for mapping in anonymous if mapping.name != VDSO)
        return seen.jit


def _base(reading: ProcessReading) -> int:
    """Lowest address of the process's own code; 0 if none is mapped."""
    own = (
        m.start for m in reading.mappings if m.protection & EXEC and m.name == reading.hypervisor.executable
    )
    return min(own, default=0)


def _code_buffer(mappings: Iterable[Mapping]) -> tuple[tuple[int, int], ...]:
    """The one area that can be TCG's code buffer: the largest, if its size can be one."""
    areas: list[tuple[int, int]] = []
    for mapping in sorted(mappings, key=lambda mapping: mapping.start):
        if areas and mapping.start - areas[-1][1] <= JIT_GAP:
            areas[-1] = areas[-1][0], mapping.end
        else:
            areas.append((mapping.start, mapping.end))
    largest = max(areas, key=lambda area: area[1] - area[0], default=(0, 0))
    return (largest,) if MIN_JIT <= largest[1] - largest[0] <= MAX_JIT else ()


class _Judge:
    """Collects the findings of one reading."""

    def __init__(
        self, component: Component, hypervisor: Hypervisor, files: FileBook, reference: Reference
    ) -> None:
        self._component = component
        self._now = hypervisor
        self._subject = f"pid {hypervisor.pid} (vm {hypervisor.name or hypervisor.vm})"
        self._files = files
        self._reference = reference
        self._found: list[Finding] = []
        self._identify: set[int] = set()
        self._named: set[int] = set()
        self._unverified = False

    def identity(self, before: Hypervisor) -> None:
        """A process may give up root, get its CID and become a KVM machine while it starts; else it stays."""
        now = self._now
        for what, was, is_now, starting in (
            ("uid", before.uid, now.uid, before.uid == 0),
            ("CID", before.cid, now.cid, before.cid == 0),
            ("accelerator", before.accel, now.accel, before.accel == "tcg"),
            ("executable", _plain(before.executable), _plain(now.executable), False),
            ("source", before.source, now.source, False),
        ):
            if was != is_now and not starting:
                self._add(Code.IDENTITY_CHANGED, self._subject, f"{what} {was}", f"{what} {is_now}")

    def place(self, was: int, is_now: int) -> None:
        if was and is_now and was != is_now:
            self._add(
                Code.IDENTITY_CHANGED,
                self._subject,
                f"its own code at {was:#x}",
                f"its own code at {is_now:#x}: it has executed a program since",
            )

    def anonymous(self, mappings: list[Mapping], accepted: tuple[tuple[int, int], ...]) -> None:
        for mapping in mappings:
            vdso = mapping.name == VDSO and mapping.protection == READ | EXEC
            jit = any(start <= mapping.start and mapping.end <= end for start, end in accepted)
            if vdso or jit:
                continue
            self._add(
                Code.MAPPING_ANONYMOUS_EXEC,
                self._subject,
                "no executable memory without a file",
                f"{_protection(mapping)} {mapping.name or 'anonymous'}",
                f"{mapping.start:#x}-{mapping.end:#x}",
            )

    def mapping(self, mapping: Mapping, number: int) -> None:
        if mapping.protection & WRITE:
            executable = mapping.protection & EXEC
            self._add(
                Code.MAPPING_WRITABLE_EXEC if executable else Code.MAPPING_WRITABLE_CODE,
                f"{self._subject}: {mapping.name}",
                "not writable",
                _protection(mapping),
                f"{mapping.start:#x}-{mapping.end:#x}, file offset {mapping.offset:#x}",
            )
        known = self._files.known.get(number)
        if known is not None:
            known.called(mapping.name, self._reference)
        if known is None:
            self._unknown(mapping, number)
        elif not known.approved(self._reference):
            self._unapproved(number, known.path, known.sha256)
        elif not self._covered(mapping, number, known.size):
            self._unverified = True
            if not any(key[0] == number and key[1] == mapping.offset for key in known.tags):
                self._identify.add(number)

    def _unknown(self, mapping: Mapping, number: int) -> None:
        reason = self._files.unreadable.get(number)
        if reason is None:
            self._identify.add(number)
        elif number not in self._named:
            self._named.add(number)
            self._add(
                Code.FILE_UNREADABLE, f"{self._subject}: {mapping.name}", "a file that is measured", reason
            )

    def _unapproved(self, number: int, path: str, digest: str) -> None:
        if number in self._named:
            return
        self._named.add(number)
        expected = self._reference.expected(path)
        retired = self._reference.retired(path, digest)
        code = Code.FILE_UNAPPROVED if expected else Code.FILE_UNKNOWN
        self._add(
            code if retired is None else Code.FILE_RETIRED,
            f"{self._subject}: {path}",
            "SHA-256 " + " or ".join(expected) if expected else "no approved digest",
            f"SHA-256 {digest}{'' if retired is None else f', retired on {date_of(retired)}'}",
        )

    def _covered(self, mapping: Mapping, number: int, size: int) -> bool:
        """Whether the last files reading found this range good. A segment ends at the file's last page."""
        pages = -(-size // 4096) * 4096
        length = min(mapping.end - mapping.start, pages - mapping.offset)
        found = self._files.good if self._component == SELF else self._files.fresh
        return (number, mapping.offset, length) in found

    def pages(self, reading: ProcessReading) -> None:
        for page in reading.altered:
            self._page(page)
        if reading.altered_total > len(reading.altered):
            self._add(
                Code.CODE_ALTERED, self._subject, "no altered page", f"{reading.altered_total} altered pages"
            )

    def _page(self, page: AlteredPage) -> None:
        how = _REASONS.get(page.reason, page.reason)
        same = page.expected == page.seen
        self._add(
            Code.CODE_ALTERED,
            f"{self._subject}: {page.name}",
            f"bytes {page.expected.hex(' ')}, the file's own page",
            f"bytes {page.seen.hex(' ') or 'unreadable'}{' (the same)' if same else ''}, {how}",
            f"{page.symbol}, address {page.address:#x}, file offset {page.file_offset:#x}".removeprefix(", "),
        )

    def verdict(self, reading: ProcessReading) -> Verdict:
        own = any(
            mapping.protection & EXEC and mapping.name == reading.hypervisor.executable
            for mapping in reading.mappings
        )
        findings = tuple(self._found)
        identify = frozenset(sorted(self._identify)[:MAX_FINDINGS])
        claims = self._claims(reading)
        if findings:
            return Verdict(self._component, Status.DRIFTED, findings, identify, claims)
        if identify or self._unverified or not own:
            return Verdict(self._component, Status.PENDING, (), identify, claims)
        return Verdict(self._component, Status.VERIFIED, (), frozenset(), claims)

    def _claims(self, reading: ProcessReading) -> tuple[tuple[str, str], ...]:
        now = self._now
        jit = sum(
            item.end - item.start for item in reading.mappings if item.file is None and item.name != VDSO
        )
        return (
            ("pid", str(now.pid)),
            ("start time", str(now.start_time)),
            ("uid", str(now.uid)),
            ("vm", f"{now.name} {now.vm}".strip()),
            ("cid", str(now.cid) if now.cid else "none"),
            ("vouched by", now.source),
            ("accelerator", now.accel),
            ("executable", now.executable),
            ("files", str(len({item.file for item in reading.mappings if item.file is not None}))),
            ("mappings", str(len(reading.mappings))),
            ("anonymous executable", f"{jit} bytes" if jit else "none"),
            ("altered pages", str(reading.altered_total)),
        )

    def _add(self, code: Code, subject: str, expected: str, seen: str, where: str = "") -> None:
        if len(self._found) < MAX_FINDINGS:
            self._found.append(
                Finding(str(self._component), code.value, Severity.CRITICAL, subject, expected, seen, where)
            )


def _plain(path: str) -> str:
    return path.removesuffix(DELETED)


def _protection(mapping: Mapping) -> str:
    bits = mapping.protection
    return ("r" if bits & READ else "-") + ("w" if bits & WRITE else "-") + ("x" if bits & EXEC else "-")
