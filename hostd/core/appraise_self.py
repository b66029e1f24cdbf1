"""Judges component `self` (pure): hostd's own processes and files.

| what                                       | good is                                                   |
|--------------------------------------------|-----------------------------------------------------------|
| a file of the installation, a unit, a      | its SHA-256 is a reference value of its path              |
| drop-in, the configuration, the IMA policy |                                                           |
| reference values of hostd's own files      | the file is there, unless an approved update removes it   |
| any of these files                         | only root may write it and its folder (under systemd)     |
| a process                                  | as a hypervisor under KVM (`hostd.core.appraise_process`) |
| processes in the units' control groups     | run hostd's interpreter and nothing else                  |

A reading has some of the files and one of the processes. So it is verified only once a whole round of files
and some process were good; from then on whatever a reading has must be. Processes come and go as they
want: a role that does not run closes the gate by itself.

Reference values without a single file of the installation folder say nothing of hostd, and the component is
absent: so it is for a checkout that nobody surveyed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from hostd.core.appraise_process import Processes
from hostd.core.codes import Code
from hostd.core.findings import SELF, Finding, Severity, Status, Verdict
from hostd.core.ownfiles import is_own
from hostd.core.reading_self import MAX_OWN_FILES
from hostd.core.reference import date_of

if TYPE_CHECKING:
    from hostd.core.appraise_files import FileBook
    from hostd.core.findings import Component
    from hostd.core.reading_process import ProcessReading
    from hostd.core.reading_self import OwnFile, SelfReading
    from hostd.core.reference import Reference

MAX_FINDINGS: Final = 64
MAX_PROCESSES: Final = 2048
"""Processes remembered; workers come and go."""

Key = tuple[int, int]


class SelfJudge:
    """Judges readings of `self` and keeps what later ones must agree with."""

    def __init__(self) -> None:
        self._processes = Processes(allow_jit=False)
        self._seen: dict[Key, None] = {}
        self._some_process = False
        self._round = 0
        self._paths: set[str] = set()
        self._count = 0
        self._complete = 0
        """Number of files of the last whole round; 0: there was none yet."""
        self._expected: tuple[Reference | None, tuple[str, ...], frozenset[str]] = (None, (), frozenset())
        """Reference values, installation folders, and the paths of the one that are hostd's own by the
        other."""

    def appraise(
        self, component: Component, reading: SelfReading, reference: Reference, files: FileBook
    ) -> Verdict:
        """The verdict on one reading."""
        expected = self._own(reference, reading.roots)
        if not any(path.startswith(reading.roots) for path in expected):
            return Verdict(component, Status.ABSENT, claims=(("reference", "none"), *self._claims(reading)))
        found = [
            finding for file in reading.files for finding in _judge_file(file, reference, reading.manager)
        ]
        found += self._missing(reading, expected - reference.leaving)
        found += [
            _finding(Code.SELF_PROCESS_UNKNOWN, name, "hostd's own interpreter", "another program")
            for name in reading.strangers
        ]
        process = self._process(reading.process, reference, files)
        if process is not None:
            found += process.findings
            self._some_process |= process.good
        identify = frozenset() if process is None else process.identify
        findings = tuple(found[:MAX_FINDINGS])
        if findings:
            status = Status.DRIFTED
        elif self._complete and self._some_process and (process is None or process.good):
            status = Status.VERIFIED
        else:
            status = Status.PENDING
        return Verdict(component, status, findings, identify, self._claims(reading))

    def _own(self, reference: Reference, roots: tuple[str, ...]) -> frozenset[str]:
        """Paths of the reference values that are hostd's own."""
        if self._expected[0] is not reference or self._expected[1] != roots:
            own = frozenset(path for path in reference.files if is_own(path, roots))
            self._expected = reference, roots, own
            self._complete = 0
        return self._expected[2]

    def _missing(self, reading: SelfReading, expected: frozenset[str]) -> list[Finding]:
        """Takes the files in; at the end of a round that was read whole, what it lacked."""
        if reading.position == 0:
            self._round, self._paths, self._count = reading.number, set(), 0
        elif (reading.number, reading.position) != (self._round, self._count):
            # Begun before this judge was there: the next round counts.
            self._round = 0
        if not self._round or self._count > MAX_OWN_FILES:
            return []
        self._count += len(reading.files)
        self._paths.update(file.path for file in reading.files)
        if not reading.complete:
            return []
        self._complete, self._round = len(self._paths), 0
        return [
            _finding(Code.SELF_FILE_MISSING, path, "a file with a reference value", "no such file")
            for path in sorted(expected - self._paths)[:MAX_FINDINGS]
        ]

    def _process(
        self, reading: ProcessReading | None, reference: Reference, files: FileBook
    ) -> Verdict | None:
        if reading is None:
            return None
        key = (reading.hypervisor.pid, reading.hypervisor.start_time)
        self._seen.pop(key, None)
        self._seen[key] = None
        if len(self._seen) > MAX_PROCESSES:
            del self._seen[next(iter(self._seen))]
            self._processes.keep_only(self._seen)
        verdict = self._processes.appraise(SELF, reading, files, reference)
        role = reading.hypervisor.name
        findings = tuple(
            msgspec.structs.replace(
                finding, subject=finding.subject.replace(f"(vm {role})", f"(hostd {role})", 1)
            )
            for finding in verdict.findings
        )
        return Verdict(SELF, verdict.status, findings, verdict.identify)

    def _claims(self, reading: SelfReading) -> tuple[tuple[str, str], ...]:
        return (
            ("managed by", reading.manager),
            ("installed in", ", ".join(reading.roots)),
            ("files", str(self._complete) if self._complete else "not all read yet"),
            ("processes", ", ".join(f"{role} {count}" for role, count in reading.roles)),
        )


def _judge_file(file: OwnFile, reference: Reference, manager: str) -> list[Finding]:
    digest = file.sha256.hex()
    accepted = reference.expected(file.path)
    found: list[Finding] = []
    if digest not in accepted:
        retired = reference.retired(file.path, digest) if digest else None
        code = Code.SELF_FILE_ALTERED if accepted else Code.SELF_FILE_UNKNOWN
        seen = f"SHA-256 {digest}" if digest else "no file that can be read"
        found.append(
            _finding(
                code,
                file.path,
                "SHA-256 " + " or ".join(accepted[:4]) if accepted else "no such file",
                seen if retired is None else f"{seen}, retired on {date_of(retired)}",
            )
        )
    if not file.guarded and manager == "systemd":
        found.append(
            _finding(
                Code.SELF_FILE_WRITABLE, file.path, "only root may write it and its folder", "others may"
            )
        )
    return found


def _finding(code: Code, subject: str, expected: str, seen: str) -> Finding:
    return Finding(str(SELF), code.value, Severity.CRITICAL, subject, expected, seen)
