"""Judges the posture of the kernel against that of the reviewed host (pure).

Kernel and command line must be equal, everything else at least as strict. What the reviewed host told
and this one does not is a finding; what it did not tell is not judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.core.codes import Code
from hostd.core.findings import POSTURE, Finding, Severity, Status, Verdict

if TYPE_CHECKING:
    from hostd.core.readings import PostureReading
    from hostd.core.reference import PostureRule

_LOCKDOWN: Final = {"": 0, "none": 0, "integrity": 1, "confidentiality": 2}
_TAINTS: Final = "PFSRMBUDAWCIOELKXTN"
"""Letters of the taint bits from bit 0 on (Documentation/admin-guide/tainted-kernels.rst)."""


def appraise_posture(reading: PostureReading, rule: PostureRule) -> Verdict:
    """Verified, or drifted with a finding for each thing that is weaker."""
    found: list[Finding] = []

    def weaker(code: Code, subject: str, expected: object, seen: object) -> None:
        found.append(Finding(str(POSTURE), code.value, Severity.CRITICAL, subject, str(expected), str(seen)))

    if reading.kernel != rule.kernel:
        weaker(Code.POSTURE_KERNEL, "kernel", rule.kernel, reading.kernel)
    if reading.command_line != rule.command_line:
        weaker(Code.POSTURE_COMMAND_LINE, "kernel command line", rule.command_line, reading.command_line)
    if reading.taint & ~rule.taint:
        weaker(Code.POSTURE_TAINT, "kernel taint", _taint(rule.taint), _taint(reading.taint))
    if _LOCKDOWN.get(reading.lockdown, -1) < _LOCKDOWN[rule.lockdown]:
        weaker(Code.POSTURE_LOCKDOWN, "kernel lockdown", rule.lockdown, reading.lockdown or "none")
    for module in sorted(set(reading.modules) - set(rule.modules)):
        weaker(Code.POSTURE_MODULE, f"kernel module {module}", "not loaded", "loaded")
    for code, subject, expected, seen in (
        (
            Code.POSTURE_MODULES_DISABLED,
            "kernel.modules_disabled",
            rule.modules_disabled,
            reading.modules_disabled,
        ),
        (Code.POSTURE_SIGNATURE, "module.sig_enforce", rule.signature_enforced, reading.signature_enforced),
        (
            Code.POSTURE_KEXEC,
            "kernel.kexec_load_disabled",
            rule.kexec_load_disabled,
            reading.kexec_load_disabled,
        ),
        (Code.POSTURE_PTRACE, "kernel.yama.ptrace_scope", rule.ptrace_scope, reading.ptrace_scope),
    ):
        if expected is not None and (seen is None or seen < expected):
            weaker(code, subject, f"at least {int(expected)}", "nothing" if seen is None else int(seen))
    if rule.kprobes >= 0 and not 0 <= reading.kprobes <= rule.kprobes:
        seen_probes = "cannot be listed" if reading.kprobes < 0 else str(reading.kprobes)
        weaker(Code.POSTURE_KPROBES, "kernel probes", f"at most {rule.kprobes}", seen_probes)
    return Verdict(POSTURE, Status.DRIFTED if found else Status.VERIFIED, tuple(found))


def _taint(bits: int) -> str:
    letters = [
        _TAINTS[bit] if bit < len(_TAINTS) else f"bit {bit}"
        for bit in range(bits.bit_length())
        if bits >> bit & 1
    ]
    return f"{bits} ({' '.join(letters) or 'none'})"
