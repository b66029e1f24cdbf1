"""Judges the posture of the kernel against that of the reviewed host (pure).

Kernel, command line, entry points and parameters must be equal, everything else at least as strict. What
the reviewed host told and this one does not is a finding; what it did not tell is not judged. Tracepoints
are data collection and are not judged: what they switch in the kernel's text, component `kernel` sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.core.codes import Code
from hostd.core.findings import POSTURE, Finding, Severity, Status, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.core.reading_posture import PostureReading
    from hostd.core.rule_posture import PostureRule

MAX_FINDINGS: Final = 64
TUNED: Final = frozenset(
    {
        *("kvm.halt_poll_ns", "kvm.halt_poll_ns_grow", "kvm.halt_poll_ns_grow_start"),
        *("kvm.halt_poll_ns_shrink", "kvm.nx_huge_pages_recovery_period_ms"),
        *("kvm.nx_huge_pages_recovery_ratio", "kvm.min_timer_period_us"),
    }
)
"""Parameters of speed only, which tuning daemons set while the host runs: not judged."""
_LOCKDOWN: Final = {"": 0, "none": 0, "integrity": 1, "confidentiality": 2}
_TAINTS: Final = "PFSRMBUDAWCIOELKXTN"
"""Letters of the taint bits from bit 0 on (Documentation/admin-guide/tainted-kernels.rst)."""
_PROGRAM_TYPES: Final = {
    1: "socket filter", 2: "kprobe", 3: "sched_cls", 4: "sched_act", 5: "tracepoint", 6: "xdp",
    7: "perf_event", 8: "cgroup_skb", 9: "cgroup_sock", 13: "sock_ops", 15: "cgroup_device",
    17: "raw_tracepoint", 18: "cgroup_sock_addr", 23: "cgroup_sysctl", 24: "raw_tracepoint_writable",
    25: "cgroup_sockopt", 26: "tracing", 27: "struct_ops", 28: "ext", 29: "lsm", 31: "syscall",
}  # fmt: skip
"""enum bpf_prog_type (include/uapi/linux/bpf.h)."""


def appraise_posture(reading: PostureReading, rule: PostureRule) -> Verdict:
    """Verified, or drifted with a finding for each thing that is weaker."""
    found = [
        *_settings(reading, rule),
        *_modules(reading, rule),
        *_hooks(reading, rule),
        *_programs(reading, rule),
        *_entries(reading, rule),
        *_parameters(reading, rule),
    ]
    if len(found) > MAX_FINDINGS:
        more = len(found) - MAX_FINDINGS
        found[MAX_FINDINGS:] = [
            _finding(Code.POSTURE_KERNEL, "kernel", "no finding", f"{more} more findings")
        ]
    return Verdict(
        POSTURE, Status.DRIFTED if found else Status.VERIFIED, tuple(found), claims=_claims(reading)
    )


def _finding(code: Code, subject: str, expected: object, seen: object, where: str = "") -> Finding:
    return Finding(str(POSTURE), code.value, Severity.CRITICAL, subject, str(expected), str(seen), where)


def _settings(reading: PostureReading, rule: PostureRule) -> Iterator[Finding]:
    if reading.kernel != rule.kernel:
        yield _finding(Code.POSTURE_KERNEL, "kernel", rule.kernel, reading.kernel)
    if reading.command_line != rule.command_line:
        expected, seen, where = _words(rule.command_line, reading.command_line)
        yield _finding(Code.POSTURE_COMMAND_LINE, "kernel command line", expected, seen, where)
    if reading.taint & ~rule.taint:
        yield _finding(Code.POSTURE_TAINT, "kernel taint", _taint(rule.taint), _taint(reading.taint))
    if _LOCKDOWN.get(reading.lockdown, -1) < _LOCKDOWN[rule.lockdown]:
        yield _finding(Code.POSTURE_LOCKDOWN, "kernel lockdown", rule.lockdown, reading.lockdown or "none")
    for code, subject, least, value in (
        (
            *(Code.POSTURE_MODULES_DISABLED, "kernel.modules_disabled"),
            *(rule.modules_disabled, reading.modules_disabled),
        ),
        (Code.POSTURE_SIGNATURE, "module.sig_enforce", rule.signature_enforced, reading.signature_enforced),
        (
            *(Code.POSTURE_KEXEC, "kernel.kexec_load_disabled"),
            *(rule.kexec_load_disabled, reading.kexec_load_disabled),
        ),
        (Code.POSTURE_PTRACE, "kernel.yama.ptrace_scope", rule.ptrace_scope, reading.ptrace_scope),
    ):
        if least is not None and (value is None or value < least):
            yield _finding(
                code, subject, f"at least {int(least)}", "nothing" if value is None else int(value)
            )
    if rule.kexec_loaded is not None and reading.kexec_loaded != rule.kexec_loaded:
        if reading.kexec_loaded is None:
            yield _unreadable("kexec_loaded")
        elif reading.kexec_loaded > rule.kexec_loaded:
            yield _finding(Code.POSTURE_KEXEC_LOADED, "kexec", "no kernel loaded", "a kernel is loaded")


def _words(expected: str, seen: str) -> tuple[str, str, str]:
    """The words that differ, if that says it; else both lines."""
    before, after = expected.split(), seen.split()
    gone = [word for word in before if word not in after]
    new = [word for word in after if word not in before]
    if not gone and not new:
        return expected, seen, ""
    return " ".join(gone) or "nothing more", " ".join(new) or "nothing", "words that differ"


def _modules(reading: PostureReading, rule: PostureRule) -> Iterator[Finding]:
    taints = dict(reading.module_taints)
    for module in sorted(set(reading.modules) - set(rule.modules)):
        letters = taints.get(module, "")
        seen = f"loaded, and taints the kernel ({letters})" if letters else "loaded"
        yield _finding(Code.POSTURE_MODULE, f"kernel module {module}", "not loaded", seen)
    for module, letters in reading.module_taints:
        accepted = rule.module_taints.get(module, "")
        if module in rule.modules and set(letters) - set(accepted):
            subject = f"kernel module {module}"
            yield _finding(Code.POSTURE_MODULE_TAINT, subject, f"taints {accepted or 'nothing'}", letters)


def _hooks(reading: PostureReading, rule: PostureRule) -> Iterator[Finding]:
    if rule.kprobes is not None:
        if reading.kprobes is None:
            yield _unreadable("kernel probes")
        for probe in sorted(set(reading.kprobes or ()) - set(rule.kprobes)):
            yield _finding(Code.POSTURE_KPROBES, probe, "no probe there", "a probe")
    if rule.traced is not None:
        if reading.traced is None:
            yield _unreadable("traced functions")
        for function in sorted(set(reading.traced or ()) - set(rule.traced)):
            yield _finding(Code.POSTURE_FTRACE, function, "no call into ftrace", "calls into ftrace")
    if rule.tracer is not None and reading.tracer != rule.tracer:
        if reading.tracer is None:
            yield _unreadable("current_tracer")
        else:
            yield _finding(Code.POSTURE_TRACER, "current_tracer", rule.tracer, reading.tracer)


def _programs(reading: PostureReading, rule: PostureRule) -> Iterator[Finding]:
    if rule.programs is None:
        return
    if reading.programs is None:
        yield _unreadable("BPF programs")
    accepted = {(item.type, item.tag) for item in rule.programs}
    for program in reading.programs or ():
        tag = program.tag.hex()
        if program.type in rule.program_types or (program.type, tag) in accepted:
            continue
        kind = _PROGRAM_TYPES.get(program.type, f"type {program.type}")
        yield _finding(
            Code.POSTURE_BPF,
            f"BPF program {program.name or '(unnamed)'}",
            "no such program",
            f"{kind} with tag {tag}",
            f"id {program.id}",
        )


def _entries(reading: PostureReading, rule: PostureRule) -> Iterator[Finding]:
    if rule.entries is None:
        return
    if reading.entries is None:
        yield _unreadable("/dev/cpu/*/msr")
    for item in reading.entries or ():
        expected = rule.entries.get(item.register, "no such register")
        if item.target != expected:
            yield _finding(Code.POSTURE_ENTRY, f"{item.register} of CPU {item.cpu}", expected, item.target)


def _parameters(reading: PostureReading, rule: PostureRule) -> Iterator[Finding]:
    seen = dict(reading.parameters)
    # A module that is not loaded (no VM was started yet) has no parameters, and that is no weakness.
    loaded = {_module(name) for name in seen}
    for name in sorted(({*seen, *rule.parameters}) - TUNED):
        if _module(name) not in loaded:
            continue
        expected, value = rule.parameters.get(name), seen.get(name)
        if value != expected:
            yield _finding(
                Code.POSTURE_PARAMETER,
                name,
                "no such parameter" if expected is None else expected,
                "no such parameter" if value is None else value,
            )


def _module(parameter: str) -> str:
    return parameter.partition(".")[0]


def _unreadable(what: str) -> Finding:
    return _finding(Code.POSTURE_UNREADABLE, what, "readable, as on the reviewed host", "cannot be read")


def _claims(reading: PostureReading) -> tuple[tuple[str, str], ...]:
    def number(row: tuple[object, ...] | None) -> str:
        return "cannot be listed" if row is None else str(len(row))

    entries = "not read"
    if reading.entries is not None:
        cpus = sorted({item.cpu for item in reading.entries})
        entries = f"read on CPU {', '.join(map(str, cpus))}"
    return (
        ("kernel", reading.kernel),
        ("command line", reading.command_line),
        ("taint", _taint(reading.taint)),
        ("lockdown", reading.lockdown or "not there"),
        ("modules", str(len(reading.modules))),
        ("kprobes", number(reading.kprobes)),
        ("traced functions", number(reading.traced)),
        ("tracer", reading.tracer or "cannot be read"),
        ("BPF programs", number(reading.programs)),
        ("entry points", entries),
        ("kvm parameters", str(len(reading.parameters))),
    )


def _taint(bits: int) -> str:
    letters = [
        _TAINTS[bit] if bit < len(_TAINTS) else f"bit {bit}"
        for bit in range(bits.bit_length())
        if bits >> bit & 1
    ]
    return f"{bits} ({' '.join(letters) or 'none'})"
