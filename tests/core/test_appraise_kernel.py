"""The judge of the kernel, and the rule it judges by."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from hostd.core.appraise_kernel import KernelJudge
from hostd.core.codes import Code
from hostd.core.findings import KERNEL, Status, Verdict
from hostd.core.patchsites import NOPS
from hostd.core.reading_kernel import (
    MAX_SITES,
    KernelAltered,
    KernelImage,
    KernelRange,
    KernelReading,
    KernelSite,
)
from hostd.core.reference import Reference
from hostd.core.rule_kernel import KernelRule, propose_kernel

PATH = "/boot/vmlinuz-6.1"
MODULE = "/usr/lib/modules/6.1/kernel/kvm.ko"
TEXT = 0xFFFFFFFF81000000


def image(number: int = 0, **changes: object) -> KernelImage:
    name, path = (("vmlinux", PATH), ("kvm", MODULE))[number]
    values: dict[str, object] = {
        "number": number,
        "name": name,
        "path": path,
        "sha256": bytes([number + 1]) * 32,
        "note": "",
        "patched": bytes([number + 101]) * 32,
        "compared": 4000,
        "pinned": 96,
    }
    return KernelImage(**{**values, **changes})  # type: ignore[arg-type]


def span(number: int = 0, tag: bytes = b"t" * 16, area: str = ".text", offset: int = 0) -> KernelRange:
    return KernelRange(number, area, offset, 4096, tag)


def part(number: int = 0, **changes: object) -> KernelReading:
    values: dict[str, object] = {
        "part": number,
        "parts": 2,
        "plan": 1,
        "images": (image(0), image(1)) if number == 0 else (),
        "ranges": (span(number),),
        "sites": (),
        "sites_total": 0,
        "altered": (),
        "altered_total": 0,
    }
    return KernelReading(**{**values, **changes})  # type: ignore[arg-type]


RULE = propose_kernel([part(0), part(1)])


def reference(rule: KernelRule | None = RULE, **files: tuple[str, ...]) -> Reference:
    return Reference(format="hostd-reference/2", version=1, created=0, host="h", kernel=rule, **files)  # type: ignore[arg-type]


def judge(*parts: KernelReading, by: Reference | None = None, judge: KernelJudge | None = None) -> Verdict:
    judge = judge or KernelJudge()
    verdicts = [judge.appraise(KERNEL, item, by or reference()) for item in parts]
    return next((verdict for verdict in verdicts if verdict.findings), verdicts[-1])


def codes(verdict: Verdict) -> set[str]:
    return {finding.code for finding in verdict.findings}


def test_a_complete_reading_is_good_and_no_part_of_it_is() -> None:
    keeper = KernelJudge()
    assert judge(part(0), judge=keeper).status is Status.PENDING
    verdict = judge(part(1), judge=keeper)
    assert verdict.status is Status.VERIFIED
    claims = dict(verdict.claims)
    assert claims["kernel"] == PATH
    assert claims["first use"] == "none"


@pytest.mark.parametrize(
    "parts",
    [
        (part(1),),
        (part(0), part(0)),
        (part(0), part(1, plan=2)),
        (part(0), part(1, parts=3)),
        (part(0), part(1, images=(image(0),))),
        (part(0), part(1, parts=3), part(1)),
        (part(0, images=(image(1),)), part(1)),
        (part(0), part(1, ranges=())),
        (part(0, ranges=()), part(1)),
        (part(0), part(1, ranges=(replace(span(1), length=4095),))),
        (part(0), part(1, ranges=(span(1), span(2)))),
        (part(0), part(1, ranges=(span(1), span(1)))),
        (part(0), part(1, ranges=(span(1), span(1, offset=4096)))),
    ],
)
def test_what_is_not_complete_is_never_good(parts: tuple[KernelReading, ...]) -> None:
    assert judge(*parts).status in (Status.PENDING, Status.DRIFTED)


def test_a_later_reading_of_the_plan_has_the_same_ranges() -> None:
    keeper = KernelJudge()
    ranges = (span(1), span(1, area="table ops"))
    more = part(1, ranges=ranges)
    assert judge(part(0), more, judge=keeper).status is Status.VERIFIED
    assert judge(part(0), part(1), judge=keeper).status is Status.PENDING
    assert judge(part(0), more, judge=keeper).status is Status.VERIFIED


def test_a_tag_that_moves_is_a_finding_though_the_measurer_says_nothing() -> None:
    keeper = KernelJudge()
    assert judge(part(0), part(1), judge=keeper).good
    other = part(0, ranges=(span(0, b"u" * 16),))
    verdict = judge(other, judge=keeper)
    assert codes(verdict) == {Code.KERNEL_TEXT_ALTERED}
    (finding,) = verdict.findings
    assert finding.subject == "vmlinux"
    assert finding.where == ".text 0x0-0x1000"
    # Also under another plan: the image is the same.
    assert judge(replace(other, plan=2), judge=keeper).status is Status.DRIFTED
    assert judge(part(0), part(1), judge=keeper).good


@pytest.mark.parametrize(
    ("area", "code"),
    [
        (".text", Code.KERNEL_TEXT_ALTERED),
        (".noinstr.text", Code.KERNEL_TEXT_ALTERED),
        (".rodata", Code.KERNEL_RODATA_ALTERED),
        ("ro_after_init", Code.KERNEL_RODATA_ALTERED),
        ("table kvm_x86_ops", Code.KERNEL_TABLE_ALTERED),
        ("idt_table", Code.KERNEL_TABLE_ALTERED),
    ],
)
def test_altered_bytes_are_named(area: str, code: Code) -> None:
    item = KernelAltered(1, area, "f+0x3 [kvm]", 0xFFFFFFFFC0001003, b"\x55", b"\xcc")
    verdict = judge(part(0, altered=(item,), altered_total=1))
    assert codes(verdict) == {code}
    (finding,) = verdict.findings
    assert (finding.subject, finding.expected, finding.seen) == ("f+0x3 [kvm]", "bytes 55", "bytes cc")
    assert "0xffffffffc0001003" in finding.where


def test_what_is_altered_at_first_sight_is_not_the_measure_of_later_readings() -> None:
    keeper = KernelJudge()
    item = KernelAltered(0, ".text", "f+0x3", TEXT, b"\x55", b"\xcc")
    assert judge(part(0, altered=(item,), altered_total=1), judge=keeper).findings
    assert judge(part(0, ranges=(span(0, b"g" * 16),)), part(1), judge=keeper).good


def test_a_slot_says_where_it_leads() -> None:
    item = KernelAltered(
        1, "table kvm_x86_ops", "kvm_x86_ops+0x50", 5, b"\1" * 8, b"\2" * 8, "", "svm_run [kvm_amd]", "evil"
    )
    (finding,) = judge(part(0, altered=(item,), altered_total=1)).findings
    assert (finding.expected, finding.seen) == ("svm_run [kvm_amd]", "evil")


def test_altered_bytes_without_a_name_are_findings_too() -> None:
    assert judge(part(0, altered_total=3)).status is Status.DRIFTED


def call(target: int, opcode: int = 0xE8) -> bytes:
    return bytes((opcode,)) + (target - TEXT - 5).to_bytes(4, "little", signed=True)


def site(
    kind: str, seen: bytes, *, callee: str = "", target: int = 0, compiled: bytes = NOPS[4]
) -> KernelSite:
    return KernelSite(0, kind, "f+0x3", TEXT, compiled, seen, target, callee)


@pytest.mark.parametrize(
    "changed",
    [
        site("jump-label", call(TEXT + 64, 0xE9), target=TEXT + 64),
        site("static-call", call(TEXT + 64), callee="schedule", compiled=call(TEXT + 9)),
        site("static-call", call(TEXT + 64), callee="svm_run [kvm]", compiled=call(TEXT + 9)),
        site("ftrace", call(TEXT + 64), callee="ftrace_caller"),
        site("ftrace", call(TEXT + 64), callee="ftrace_trampoline [__builtin__ftrace]"),
        site("ftrace-call", call(TEXT + 64), callee="function_trace_call", compiled=call(TEXT + 9)),
        site(
            "static-call",
            b"\x0f\x84" + (64).to_bytes(4, "little"),
            callee="schedule",
            compiled=b"\x0f\x84\0\0\0\0",
        ),
    ],
)
def test_legal_changes_are_good(changed: KernelSite) -> None:
    verdict = judge(part(0, sites=(changed,), sites_total=1), part(1))
    assert verdict.status is Status.VERIFIED
    assert dict(verdict.claims)["sites changed"] == "1"


@pytest.mark.parametrize(
    "changed",
    [
        site("jump-label", call(TEXT + 64, 0xE9), target=TEXT + 65),
        site("static-call", call(TEXT + 64), callee="", compiled=call(TEXT + 9)),
        site("static-call", call(TEXT + 64), callee="run [rootkit]", compiled=call(TEXT + 9)),
        site("ftrace", call(TEXT + 64), callee="schedule"),
        site("ftrace", call(TEXT + 64), callee="ftrace_caller [rootkit]"),
        site("ftrace", call(TEXT + 64), callee=""),
        site("ftrace-call", call(TEXT + 64), callee="hook [rootkit]", compiled=call(TEXT + 9)),
        # Kinds that only boot patches, or that do not exist: nothing that changes later is legal.
        site("smp-lock", b"\x3e", compiled=b"\xf0"),
        site("alternative", NOPS[4], compiled=b"\x90" * 5),
        site("return", b"\xc3\xcc\xcc\xcc\xcc"),
        site("anything", NOPS[4]),
    ],
)
def test_the_judge_does_not_take_the_measurers_word_for_a_site(changed: KernelSite) -> None:
    verdict = judge(part(0, sites=(changed,), sites_total=1))
    assert codes(verdict) == {Code.KERNEL_TEXT_ALTERED}


def test_sites_left_out_are_counted() -> None:
    one = site("jump-label", call(TEXT + 64, 0xE9), target=TEXT + 64)
    assert judge(part(0, sites=(one,) * MAX_SITES, sites_total=MAX_SITES + 9), part(1)).good
    assert judge(part(0, sites=(one,), sites_total=MAX_SITES + 9)).status is Status.DRIFTED


def test_boot_time_patches_may_not_change_while_the_kernel_runs() -> None:
    keeper = KernelJudge()
    free = reference(replace(RULE, patched={}))
    assert judge(part(0), part(1), judge=keeper, by=free).good
    other = part(0, images=(image(0, patched=b"x" * 32), image(1)))
    assert codes(judge(other, judge=keeper, by=free)) == {Code.KERNEL_PATCHED}


# ── Reference values ──────────────────────────────────────────────────────────────────────────────────


def test_without_reference_values_it_is_absent() -> None:
    verdict = judge(part(0), part(1), by=reference(None))
    assert verdict.status is Status.ABSENT
    assert ("reference", "none") in verdict.claims


def test_altered_is_altered_without_reference_values() -> None:
    item = KernelAltered(0, ".text", "f+0x3", TEXT, b"\x55", b"\xcc")
    assert judge(part(0, altered=(item,), altered_total=1), by=reference(None)).status is Status.DRIFTED


def test_files_of_the_packages_are_reference_values() -> None:
    files = {PATH: ("01" * 32,), MODULE.removeprefix("/usr"): ("02" * 32,)}
    assert judge(part(0), part(1), by=reference(None, files=files)).good  # type: ignore[arg-type]
    del files[MODULE.removeprefix("/usr")]
    verdict = judge(part(0), by=reference(None, files=files))  # type: ignore[arg-type]
    assert codes(verdict) == {Code.KERNEL_UNAPPROVED}


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"sha256": b"z" * 32}, Code.KERNEL_UNAPPROVED),
        ({"path": "/tmp/kvm.ko"}, Code.KERNEL_UNAPPROVED),
        ({"sha256": b"", "path": "", "note": "no file of it"}, Code.KERNEL_UNAPPROVED),
        ({"patched": b"z" * 32}, Code.KERNEL_PATCHED),
    ],
)
def test_images_must_be_among_the_reference_values(changed: dict[str, object], code: Code) -> None:
    verdict = judge(part(0, images=(image(0), image(1, **changed))))
    assert codes(verdict) == {code}
    assert "kvm" in verdict.findings[0].subject


def test_first_use_must_be_allowed_by_name() -> None:
    bare = {"sha256": b"", "path": "", "note": "no file of it", "compared": 0, "pinned": 4096}
    parts = (part(0, images=(image(0), image(1, **bare))), part(1))
    rule = propose_kernel(parts)
    assert rule.first_use == ("kvm",)
    verdict = judge(*parts, by=reference(rule))
    assert verdict.good
    assert dict(verdict.claims)["first use"] == "kvm"
    # Another module without a file is not covered by it.
    other = part(0, images=(image(0), image(1, **bare, name="rootkit")))
    assert codes(judge(other, by=reference(rule))) == {Code.KERNEL_UNAPPROVED}


def test_a_proposal_needs_a_complete_reading_of_a_good_kernel() -> None:
    item = KernelAltered(0, ".text", "f+0x3", TEXT, b"\x55", b"\xcc")
    for parts in (
        [],
        [part(0)],
        [part(1), part(0)],
        [part(0), part(1, plan=2)],
        [part(0, altered=(item,), altered_total=1), part(1)],
    ):
        with pytest.raises(ValueError, match="kernel"):
            propose_kernel(parts)


def test_rules_are_canonical() -> None:
    for broken in (
        {"builds": {PATH: ()}, "patched": {}, "first_use": ()},
        {"builds": {PATH: ("b" * 64, "a" * 64)}, "patched": {}, "first_use": ()},
        {"builds": {}, "patched": {}, "first_use": ("b", "a")},
        {"builds": {}, "patched": {}, "first_use": (), "extra": 1},
        {"builds": {PATH: ("zz",)}, "patched": {}, "first_use": ()},
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(broken, KernelRule)
