"""Judges component `relro` (pure): the relocated data of one hypervisor process.

VERIFIED: the reading is of this VM's process, every ELF file that it maps as code was recomputed from bytes
whose SHA-256 is a reference value of its path, and no word differs. Whether the files may be there at all is
judged by `process`; a file that is not approved leaves this component PENDING, and so does a process that the
dynamic linker is still working on. So does one whose digest has retired, with a warning that says since when:
`process` finds it, and an officer should not have to clear one cause twice. A file that cannot be recomputed
is PENDING with a warning that names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.core.codes import Code
from hostd.core.findings import Finding, Severity, Status, Verdict
from hostd.core.reference import date_of

if TYPE_CHECKING:
    from hostd.core.findings import Component
    from hostd.core.reading_relro import AlteredSlot, RelroReading, Value
    from hostd.core.reference import Reference

MAX_FINDINGS: Final = 64
_GOT: Final = frozenset({"R_X86_64_GLOB_DAT", "R_X86_64_JUMP_SLOT", "R_X86_64_IRELATIVE"})


class RelroJudge:
    """Judges readings of `relro`."""

    def appraise(self, component: Component, reading: RelroReading, reference: Reference) -> Verdict:
        """The verdict on one reading."""
        hypervisor = reading.hypervisor
        if hypervisor.vm != component.vm:
            return Verdict(component, Status.PENDING)
        subject = f"pid {hypervisor.pid} (vm {hypervisor.name or hypervisor.vm})"
        findings = [_altered(component, subject, slot) for slot in reading.altered[:MAX_FINDINGS]]
        if reading.altered_total > len(findings):
            more = f"{reading.altered_total} altered words"
            findings.append(_finding(component, Code.RELRO_ALTERED, subject, "no altered word", more))
        unapproved = 0
        warnings: list[Finding] = []
        for file in reading.files:
            digest, expected = file.sha256.hex(), reference.expected(file.path)
            if digest in expected:
                continue
            unapproved += 1
            retired = reference.retired(file.path, digest)
            about = f"{subject}: {file.path}"
            wanted = "SHA-256 " + " or ".join(expected) if expected else "no approved digest"
            if retired is not None:
                seen = f"SHA-256 {digest}, retired on {date_of(retired)}"
                warnings.append(_warning(component, Code.RELRO_SOURCE, about, wanted, seen))
            elif expected:
                findings.append(_finding(component, Code.RELRO_SOURCE, about, wanted, f"SHA-256 {digest}"))
        drifted = bool(findings)
        findings += warnings
        findings += [
            _warning(component, Code.RELRO_UNCOVERED, subject, "every file recomputed", name)
            for name in reading.uncovered
        ]
        claims = (
            ("files", str(len(reading.files))),
            ("words", str(sum(file.words for file in reading.files))),
            ("pinned", str(sum(file.pinned for file in reading.files))),
            ("interposed", str(reading.interposed)),
            ("unapproved", str(unapproved)),
            ("uncovered", str(len(reading.uncovered))),
        )
        if drifted:
            status = Status.DRIFTED
        elif reading.files and not reading.uncovered and not unapproved:
            status = Status.VERIFIED
        else:
            status = Status.PENDING
        return Verdict(component, status, tuple(findings[:MAX_FINDINGS]), claims=claims)


def _altered(component: Component, subject: str, slot: AlteredSlot) -> Finding:
    code = Code.GOT_ALTERED if slot.relocation in _GOT else Code.RELRO_ALTERED
    seen = _shown(slot.seen)
    if slot.reason == "pinned":
        code = Code.RELRO_PINNED_CHANGED
    elif slot.reason == "writable":
        code, seen = Code.RELRO_WRITABLE, "writable"
    expected = " or ".join(_shown(value) for value in slot.expected)
    parts = (
        f"{slot.symbol} ({slot.relocation})" if slot.symbol else slot.relocation,
        slot.place,
        f"address {slot.address:#x}",
        f"file offset {slot.file_offset:#x}",
    )
    where = ", ".join(part for part in parts if part)
    if slot.reason == "writable":
        expected = "read-only"
    return _finding(component, code, f"{subject}: {slot.name}", expected, seen, where)


def _warning(component: Component, code: Code, subject: str, expected: str, seen: str) -> Finding:
    return Finding(str(component), code.value, Severity.WARNING, subject, expected, seen)


def _shown(value: Value) -> str:
    return f"{value.value:#x} ({value.leads})"


def _finding(
    component: Component, code: Code, subject: str, expected: str, seen: str, where: str = ""
) -> Finding:
    return Finding(str(component), code.value, Severity.CRITICAL, subject, expected, seen, where)
