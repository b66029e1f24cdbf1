"""Hooks, programs, entry points and parameters: what the posture judge lets through, and what it names."""

from __future__ import annotations

import msgspec
import pytest

from hostd.core.appraise_posture import MAX_FINDINGS, appraise_posture
from hostd.core.codes import Code
from hostd.core.findings import Finding, Status
from hostd.core.reading_posture import BpfProgram, EntryPoint, PostureReading
from hostd.core.rule_posture import BpfRule, PostureRule, propose_posture
from tests.support.readings import posture

UNIT = BpfProgram(7, 15, b"\1" * 8, "sd_devices")
LSM = BpfProgram(9, 29, b"\2" * 8, "restrict_filesy")
ENTRIES = tuple(
    EntryPoint(cpu, name, target)
    for cpu in (0, 1)
    for name, target in (
        ("LSTAR", "entry_SYSCALL_64"), ("CSTAR", "entry_SYSCALL_compat"), ("SYSENTER_EIP", "0x0"),
    )
)  # fmt: skip


def full(**changes: object) -> PostureReading:
    values: dict[str, object] = {
        "kexec_loaded": 0,
        "module_taints": (("ahci", "E"),),
        "kprobes": ("kprobe at known+0x0",),
        "traced": ("known",),
        "tracer": "nop",
        "programs": (UNIT, LSM),
        "entries": ENTRIES,
        "parameters": (("kvm.halt_poll_ns", "200000"), ("kvm_amd.nested", "0"), ("kvm_amd.npt", "Y")),
    }
    return posture(**{**values, **changes})


RULE = propose_posture(full())


def found(reading: PostureReading, rule: PostureRule = RULE) -> Finding:
    verdict = appraise_posture(reading, rule)
    assert verdict.status is Status.DRIFTED
    (finding,) = verdict.findings
    return finding


def test_proposed_rule_accepts_and_survives_json() -> None:
    verdict = appraise_posture(full(), RULE)
    assert verdict.good
    assert msgspec.json.decode(msgspec.json.encode(RULE), type=PostureRule) == RULE
    claims = dict(verdict.claims)
    assert claims["BPF programs"] == "2"
    assert claims["entry points"] == "read on CPU 0, 1"
    assert claims["lockdown"] == "integrity"


@pytest.mark.parametrize(
    "changes",
    [
        {"kprobes": ()},
        {"traced": ()},
        {"module_taints": ()},
        {"programs": ()},
        # systemd loads a unit's programs again, and makes others for a unit that was never there.
        {"programs": (msgspec.structs.replace(UNIT, id=99), msgspec.structs.replace(LSM, id=100), LSM)},
        {"programs": (BpfProgram(12, 15, b"\7" * 8, "sd_devices"), BpfProgram(13, 8, b"\7" * 8, "sd_fw"))},
        {"entries": ENTRIES[:3]},
        {"parameters": ()},
        {"parameters": (("kvm.halt_poll_ns", "0"), ("kvm_amd.nested", "0"), ("kvm_amd.npt", "Y"))},
        {"parameters": (("kvm.halt_poll_ns", "200000"),)},
    ],
)  # fmt: skip
def test_innocent(changes: dict[str, object]) -> None:
    verdict = appraise_posture(full(**changes), RULE)
    assert verdict.good, verdict.findings


@pytest.mark.parametrize(
    ("changes", "code", "subject", "expected", "seen"),
    [
        (
            {"kprobes": ("kprobe at known+0x0", "kprobe at svm_vcpu_run+0x0 [kvm_amd]")},
            *(Code.POSTURE_KPROBES, "kprobe at svm_vcpu_run+0x0 [kvm_amd]", "no probe there", "a probe"),
        ),
        (
            {"traced": ("known", "svm_vcpu_run [kvm_amd]")},
            *(Code.POSTURE_FTRACE, "svm_vcpu_run [kvm_amd]", "no call into ftrace", "calls into ftrace"),
        ),
        ({"tracer": "function"}, Code.POSTURE_TRACER, "current_tracer", "nop", "function"),
        (
            {"programs": (UNIT, LSM, BpfProgram(31, 2, b"\3" * 8, "spy"))},
            *(Code.POSTURE_BPF, "BPF program spy", "no such program", "kprobe with tag 0303030303030303"),
        ),
        (
            {"programs": (BpfProgram(31, 99, LSM.tag, ""),)},
            *(Code.POSTURE_BPF, "BPF program (unnamed)", "no such program"),
            "type 99 with tag 0202020202020202",
        ),
        (
            {"entries": (*ENTRIES[:5], EntryPoint(1, "SYSENTER_EIP", "0xffffffffc0001000"))},
            *(Code.POSTURE_ENTRY, "SYSENTER_EIP of CPU 1", "0x0", "0xffffffffc0001000"),
        ),
        (
            {"entries": (EntryPoint(1, "OTHER", "x"),)},
            *(Code.POSTURE_ENTRY, "OTHER of CPU 1", "no such register", "x"),
        ),
        (
            {"parameters": (("kvm_amd.nested", "1"), ("kvm_amd.npt", "Y"))},
            *(Code.POSTURE_PARAMETER, "kvm_amd.nested", "0", "1"),
        ),
        (
            {"parameters": (("kvm_amd.nested", "0"),)},
            *(Code.POSTURE_PARAMETER, "kvm_amd.npt", "Y", "no such parameter"),
        ),
        (
            {"parameters": (("kvm_intel.nested", "0"),)},
            *(Code.POSTURE_PARAMETER, "kvm_intel.nested", "no such parameter", "0"),
        ),
        (
            {"module_taints": (("ahci", "OE"),)},
            *(Code.POSTURE_MODULE_TAINT, "kernel module ahci", "taints E", "OE"),
        ),
        (
            {"modules": ("ahci", "evil", "kvm"), "module_taints": (("evil", "OE"),)},
            *(Code.POSTURE_MODULE, "kernel module evil", "not loaded", "loaded, and taints the kernel (OE)"),
        ),
        ({"kexec_loaded": 1}, Code.POSTURE_KEXEC_LOADED, "kexec", "no kernel loaded", "a kernel is loaded"),
        (
            {"command_line": "root=/dev/vda init=/x"},
            *(Code.POSTURE_COMMAND_LINE, "kernel command line", "nothing more", "init=/x"),
        ),
        (
            {"command_line": "root=/dev/vda root=/dev/vda"},
            *(Code.POSTURE_COMMAND_LINE, "kernel command line"),
            *("root=/dev/vda", "root=/dev/vda root=/dev/vda"),
        ),
    ],
)  # fmt: skip
def test_named(changes: dict[str, object], code: Code, subject: str, expected: str, seen: str) -> None:
    finding = found(full(**changes))
    assert (finding.code, finding.subject) == (code, subject)
    assert (finding.expected, finding.seen) == (expected, seen)


@pytest.mark.parametrize("field", ["kexec_loaded", "kprobes", "traced", "tracer", "programs", "entries"])
def test_what_cannot_be_read_any_more(field: str) -> None:
    assert found(full(**{field: None})).code == Code.POSTURE_UNREADABLE
    # What the reviewed host did not say is not judged.
    assert appraise_posture(full(), msgspec.structs.replace(RULE, **{field: None})).good


def test_findings_are_bounded() -> None:
    probes = tuple(f"kprobe at f{n}+0x0" for n in range(300))
    verdict = appraise_posture(full(kprobes=probes), RULE)
    assert len(verdict.findings) == MAX_FINDINGS + 1
    assert verdict.findings[-1].seen == "236 more findings"


def test_cpus_that_differ_are_not_proposed() -> None:
    with pytest.raises(ValueError, match="different addresses"):
        propose_posture(full(entries=(*ENTRIES, EntryPoint(2, "LSTAR", "0xffff"))))


@pytest.mark.parametrize(
    "changes",
    [
        {"kprobes": ("b", "a")},
        {"traced": ("a", "a")},
        {"program_types": (9, 8)},
        {"programs": (BpfRule(2, "22" * 8), BpfRule(2, "11" * 8))},
    ],
)
def test_rule_has_one_form(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sorted"):
        msgspec.structs.replace(RULE, **changes)
