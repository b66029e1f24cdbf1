"""Every rule of appraisal: what it lets through, and what it names."""

from __future__ import annotations

import pytest

from guestlib.attest.imalog import PCR_START, parse_entries, replay
from hostd.core.appraisal import Appraiser, Rules
from hostd.core.appraise_ima import Accepted
from hostd.core.codes import Code
from hostd.core.findings import FILES, GUESTS, IMA, POSTURE, Finding, Status, Verdict, process_of
from hostd.core.manifest import from_host
from hostd.core.readings import (
    EXEC,
    READ,
    WRITE,
    AlteredPage,
    FileIdentity,
    GuestsReading,
    ImaReading,
    Mapping,
    Missing,
    ProcessReading,
    Reading,
)
from hostd.core.reference import Reference
from tests.support.imalog import entry, framed
from tests.support.readings import VDSO, VM, files, hypervisor, identity, mapping, posture, process, segment

APPROVED, OTHER, LIBRARY = b"\xaa" * 32, b"\xbb" * 32, b"\xcc" * 32
PROCESS = process_of(VM)
BOOT_ID = "b" * 36


def reference(**changes: object) -> Reference:
    values: dict[str, object] = {
        "created": 1,
        "host": "h",
        "posture": posture(),
        "files": [identity(1, "/usr/bin/q", APPROVED), identity(2, "/usr/lib/l.so", LIBRARY)],
        "survey": {},
        "log": parse_entries(entry("/usr/bin/ok", b"ok")),
    }
    return from_host(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def appraiser() -> Appraiser:
    """With file 1 known, approved and found good, and one hypervisor running."""
    appraiser = Appraiser(reference(), Rules(allow_jit=False, protected=("/usr/",)))
    appraiser.appraise(GUESTS, GuestsReading((hypervisor(),), ()))
    appraiser.learn(1, identity(1, "/usr/bin/q", APPROVED))
    assert appraiser.appraise(FILES, files(segment(1))).good
    return appraiser


def judge(appraiser: Appraiser, reading: Reading) -> Verdict:
    return appraiser.appraise(PROCESS, reading)


def only(verdict: Verdict, code: Code) -> Finding:
    assert verdict.status is Status.DRIFTED
    (finding,) = verdict.findings
    assert finding.code == code
    assert finding.component == str(verdict.component)
    assert finding.expected != finding.seen
    return finding


# ── Missing and mistaken ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("component", [GUESTS, POSTURE, IMA, FILES, PROCESS])
def test_missing_is_never_good(appraiser: Appraiser, component: object) -> None:
    verdict = appraiser.appraise(component, Missing("x", absent=True))  # type: ignore[arg-type]
    assert verdict.status is Status.ABSENT
    verdict = appraiser.appraise(component, Missing("x", absent=False))  # type: ignore[arg-type]
    assert verdict.status is Status.PENDING
    wrong: Reading = posture() if component is not POSTURE else process()
    verdict = appraiser.appraise(component, wrong)  # type: ignore[arg-type]
    assert verdict.status is Status.PENDING
    assert not verdict.good


# ── Guests ──────────────────────────────────────────────────────────────────────────────────────────


def test_guests(appraiser: Appraiser) -> None:
    assert appraiser.appraise(GUESTS, GuestsReading((), ())).good
    finding = only(appraiser.appraise(GUESTS, GuestsReading((), ("pid 9 (/bin/evil)",))), Code.HOLDER_UNKNOWN)
    assert finding.subject == "pid 9 (/bin/evil)"


# ── Posture ─────────────────────────────────────────────────────────────────────────────────────────


def test_posture_equal_or_stricter(appraiser: Appraiser) -> None:
    for better in (
        {},
        {"taint": 0},
        {"lockdown": "confidentiality"},
        {"modules": ("kvm",)},
        {"modules_disabled": 1},
        {"ptrace_scope": 3},
    ):
        assert appraiser.appraise(POSTURE, posture(**better)).good, better


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"kernel": "6.1 #2"}, Code.POSTURE_KERNEL),
        ({"command_line": "root=/dev/vda init=/x"}, Code.POSTURE_COMMAND_LINE),
        ({"taint": 4096 | 1}, Code.POSTURE_TAINT),
        ({"lockdown": "none"}, Code.POSTURE_LOCKDOWN),
        ({"lockdown": ""}, Code.POSTURE_LOCKDOWN),
        ({"lockdown": "other"}, Code.POSTURE_LOCKDOWN),
        ({"modules": ("ahci", "evil", "kvm")}, Code.POSTURE_MODULE),
        ({"modules_disabled": None}, Code.POSTURE_MODULES_DISABLED),
        ({"signature_enforced": False}, Code.POSTURE_SIGNATURE),
        ({"signature_enforced": None}, Code.POSTURE_SIGNATURE),
        ({"kexec_load_disabled": 0}, Code.POSTURE_KEXEC),
        ({"ptrace_scope": 0}, Code.POSTURE_PTRACE),
        ({"ptrace_scope": None}, Code.POSTURE_PTRACE),
        ({"kprobes": ("kprobe at f+0x0",)}, Code.POSTURE_KPROBES),
        ({"kprobes": None}, Code.POSTURE_UNREADABLE),
    ],
)
def test_posture_weaker(appraiser: Appraiser, changes: dict[str, object], code: Code) -> None:
    only(appraiser.appraise(POSTURE, posture(**changes)), code)


def test_posture_that_the_baseline_did_not_have() -> None:
    nothing = posture(
        lockdown="", modules_disabled=None, signature_enforced=None, kexec_load_disabled=None,
        ptrace_scope=None, kprobes=None,
    )  # fmt: skip
    appraiser = Appraiser(reference(posture=nothing), Rules(allow_jit=False, protected=()))
    assert appraiser.appraise(POSTURE, nothing).good
    assert appraiser.appraise(POSTURE, posture(modules=())).good


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────


def test_no_segments_are_good_only_without_hypervisors() -> None:
    appraiser = Appraiser(reference(), Rules(allow_jit=False, protected=()))
    assert appraiser.appraise(FILES, files()).status is Status.PENDING
    appraiser.appraise(GUESTS, GuestsReading((hypervisor(),), ()))
    assert appraiser.appraise(FILES, files()).status is Status.PENDING
    appraiser.appraise(GUESTS, GuestsReading((), ()))
    assert appraiser.appraise(FILES, files()).good


def test_unknown_file_is_asked_for() -> None:
    appraiser = Appraiser(reference(), Rules(allow_jit=False, protected=()))
    verdict = appraiser.appraise(FILES, files(segment(1), segment(2)))
    assert (verdict.status, verdict.identify) == (Status.PENDING, {1, 2})
    assert not appraiser.files.good


def test_unknown_file_does_not_hold_up_the_others(appraiser: Appraiser) -> None:
    verdict = appraiser.appraise(FILES, files(segment(1), segment(9)))
    assert verdict.good
    assert verdict.identify == {9}
    assert all(key[0] != 9 for key in appraiser.files.good)


def test_altered_file(appraiser: Appraiser) -> None:
    finding = only(appraiser.appraise(FILES, files(segment(1, b"x" * 16))), Code.FILE_ALTERED)
    assert finding.subject == "/usr/bin/q"
    assert finding.where == "file offsets 0x0-0x1000"
    assert APPROVED.hex() in finding.expected
    assert not appraiser.files.good
    # What maps it is not good either.
    assert judge(appraiser, process()).status is Status.PENDING


def test_altered_file_with_the_byte(appraiser: Appraiser) -> None:
    page = AlteredPage(0, 1, "/usr/bin/q", 0x123, b"\x01\x02", b"\x09\x02", "content")
    elsewhere = AlteredPage(0, 2, "/usr/lib/l.so", 0x123, b"\x01", b"\x02", "content")
    verdict = appraiser.appraise(FILES, files(segment(1, b"x" * 16), altered=(page, elsewhere)))
    finding = only(verdict, Code.FILE_ALTERED)
    assert finding.where == "file offset 0x123"
    assert "01 02" in finding.expected
    assert "09 02" in finding.seen


def test_altered_pages_without_another_tag_say_nothing(appraiser: Appraiser) -> None:
    page = AlteredPage(0, 1, "/usr/bin/q", 0x123, b"\x01", b"\x02", "content")
    assert appraiser.appraise(FILES, files(segment(1), altered=(page,))).good


def test_altered_file_stays_altered_when_identified_again(appraiser: Appraiser) -> None:
    appraiser.learn(1, identity(1, "/usr/bin/q", OTHER, segment(1, b"x" * 16)))
    only(appraiser.appraise(FILES, files(segment(1, b"x" * 16))), Code.FILE_ALTERED)
    # Even if the new digest were approved for its path.
    appraiser.reference = reference(survey={"/usr/bin/q": OTHER})
    only(appraiser.appraise(FILES, files(segment(1, b"x" * 16))), Code.FILE_ALTERED)


def test_new_segment_of_a_known_file(appraiser: Appraiser) -> None:
    new = segment(1, b"n" * 16, offset=4096)
    verdict = appraiser.appraise(FILES, files(segment(1), new))
    assert verdict.identify == {1}
    assert (1, 4096, 4096) not in appraiser.files.good
    appraiser.learn(1, identity(1, "/usr/bin/q", APPROVED, segment(1, b"?" * 16), new))
    assert appraiser.appraise(FILES, files(segment(1), new)).good
    assert (1, 4096, 4096) in appraiser.files.good
    # The first tag of a segment stands.
    only(appraiser.appraise(FILES, files(segment(1, b"?" * 16), new)), Code.FILE_ALTERED)


def test_file_that_is_not_approved_is_no_part_of_it(appraiser: Appraiser) -> None:
    """Neither good nor, changed, a finding for all: whoever maps it is refused."""
    appraiser.learn(2, identity(2, "/usr/lib/l.so", OTHER))
    assert appraiser.appraise(FILES, files(segment(1), segment(2))).good
    assert appraiser.files.good == {(1, 0, 4096)}
    assert appraiser.appraise(FILES, files(segment(1), segment(2, b"x" * 16))).good


def test_segments_of_an_altered_file_are_not_learned(appraiser: Appraiser) -> None:
    new = segment(1, b"n" * 16, offset=4096)
    appraiser.learn(1, identity(1, "/usr/bin/q", OTHER, segment(1), new))
    appraiser.appraise(FILES, files(segment(1), new))
    assert appraiser.files.good == {(1, 0, 4096)}


def test_answer_about_another_file_is_not_taken(appraiser: Appraiser) -> None:
    appraiser.learn(5, identity(6, "/usr/bin/q", APPROVED))
    assert 5 not in appraiser.files.known
    assert 6 not in appraiser.files.known


# ── Process ─────────────────────────────────────────────────────────────────────────────────────────


def test_good_process(appraiser: Appraiser) -> None:
    assert judge(appraiser, process()).good
    assert judge(appraiser, process()).good


def test_empty_process_is_not_good(appraiser: Appraiser) -> None:
    reading = ProcessReading(hypervisor(), (), (), 0)
    assert judge(appraiser, reading).status is Status.PENDING
    assert judge(appraiser, process(VDSO)).status is Status.PENDING
    not_itself = process(mapping(name="/usr/lib/l.so"), VDSO)
    assert judge(appraiser, not_itself).status is Status.PENDING


def test_answer_for_another_vm_is_not_good(appraiser: Appraiser) -> None:
    other = hypervisor(vm="22222222-2222-3333-4444-555555555555")
    assert judge(appraiser, process(hypervisor=other)).status is Status.PENDING


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"uid": 0}),
        ({}, {"cid": 8}),
        ({}, {"cid": 0}),
        ({}, {"accel": "tcg"}),
        ({}, {"executable": "/usr/bin/other"}),
        ({}, {"source": "proc"}),
    ],
)
def test_identity_changed(appraiser: Appraiser, before: dict[str, object], after: dict[str, object]) -> None:
    judge(appraiser, process(hypervisor=hypervisor(**before)))
    for _ in range(2):
        verdict = judge(appraiser, process(hypervisor=hypervisor(**after)))
        assert Code.IDENTITY_CHANGED in {finding.code for finding in verdict.findings}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"uid": 0}, {}),
        ({"cid": 0}, {}),
        ({"accel": "tcg"}, {}),
        ({}, {"executable": "/usr/bin/q (deleted)"}),
        ({}, {"pid": 813, "cid": 8}),
        ({}, {"start_time": 4712, "uid": 0}),
    ],
)
def test_identity_that_may_change(
    appraiser: Appraiser, before: dict[str, object], after: dict[str, object]
) -> None:
    judge(appraiser, process(hypervisor=hypervisor(**before)))
    verdict = judge(appraiser, process(hypervisor=hypervisor(**after)))
    assert not verdict.findings


def test_the_same_program_executed_again_is_another_life(appraiser: Appraiser) -> None:
    """Same pid, start time, executable and name: only where its code lies tells."""
    assert judge(appraiser, process()).good
    moved = process(mapping(start=0x50000, end=0x51000), VDSO)
    for _ in range(2):
        (finding,) = judge(appraiser, moved).findings
        assert finding.code == Code.IDENTITY_CHANGED
        assert "0x10000" in finding.expected
        assert "0x50000" in finding.seen
    # Its first page made writable is another finding, and not this one.
    parted = process(
        mapping(end=0x10800, protection=READ | WRITE | EXEC), mapping(start=0x10800, offset=0x800), VDSO
    )
    assert Code.IDENTITY_CHANGED not in {finding.code for finding in judge(appraiser, parted).findings}


def test_ended_processes_are_forgotten(appraiser: Appraiser) -> None:
    judge(appraiser, process())
    appraiser.appraise(GUESTS, GuestsReading((), ()))
    assert judge(appraiser, process(hypervisor=hypervisor(cid=9))).good


def test_file_states(appraiser: Appraiser) -> None:
    library = mapping(2, "/usr/lib/l.so", start=0x20000, end=0x21000)
    verdict = judge(appraiser, process(mapping(), library))
    assert (verdict.status, verdict.identify) == (Status.PENDING, {2})
    appraiser.learn(2, identity(2, "/usr/lib/l.so", LIBRARY))
    # Known and approved, and no files reading has seen it yet.
    assert judge(appraiser, process(mapping(), library)).status is Status.PENDING
    appraiser.appraise(FILES, files(segment(1), segment(2)))
    assert judge(appraiser, process(mapping(), library)).good


def test_unapproved_file(appraiser: Appraiser) -> None:
    library = mapping(2, "/usr/lib/l.so", start=0x20000, end=0x21000)
    appraiser.learn(2, identity(2, "/usr/lib/l.so", OTHER))
    finding = only(judge(appraiser, process(mapping(), library, library)), Code.FILE_UNAPPROVED)
    assert "/usr/lib/l.so" in finding.subject
    assert LIBRARY.hex() in finding.expected
    assert OTHER.hex() in finding.seen
    # It is this VM's, and the files of the others are as good as they were.
    assert appraiser.appraise(FILES, files(segment(1), segment(2))).good


def test_unknown_file(appraiser: Appraiser) -> None:
    evil = mapping(3, "/tmp/evil.so", start=0x20000, end=0x21000)
    appraiser.learn(3, identity(3, "/tmp/evil.so", APPROVED))
    assert "/tmp/evil.so" in only(judge(appraiser, process(mapping(), evil)), Code.FILE_UNKNOWN).subject


def test_unreadable_file(appraiser: Appraiser) -> None:
    device = mapping(3, "/dev/mem", start=0x20000, end=0x21000)
    appraiser.learn(3, Missing("not a regular file", absent=False))
    finding = only(judge(appraiser, process(mapping(), device, device)), Code.FILE_UNREADABLE)
    assert finding.seen == "not a regular file"


def test_upgraded_in_place(appraiser: Appraiser) -> None:
    """The old file runs on, nameless; legal while its digest is approved."""
    appraiser.learn(4, identity(4, "/usr/bin/q (deleted)", APPROVED))
    appraiser.appraise(FILES, files(segment(4)))
    reading = process(
        mapping(4, "/usr/bin/q (deleted)"), VDSO, hypervisor=hypervisor(executable="/usr/bin/q (deleted)")
    )
    assert judge(appraiser, reading).good
    appraiser.reference = reference(files=[identity(1, "/usr/bin/q", OTHER)])
    only(judge(appraiser, reading), Code.FILE_UNAPPROVED)


def test_segment_must_be_the_very_range() -> None:
    appraiser = Appraiser(reference(), Rules(allow_jit=False, protected=()))
    first = segment(1)
    long = FileIdentity(1, "/usr/bin/q", 1, 1, 8192, APPROVED, (first, segment(1, offset=4096)))
    appraiser.learn(1, long)
    appraiser.appraise(FILES, files(first))
    assert judge(appraiser, process(mapping(), VDSO)).good
    for changes in ({"end": 0x12000}, {"offset": 4096}, {"offset": 8192}):
        assert judge(appraiser, process(mapping(**changes), VDSO)).status is Status.PENDING, changes
    appraiser.appraise(FILES, files(first, segment(1, offset=4096)))
    assert judge(appraiser, process(mapping(offset=4096), VDSO)).good
    # A mapping may go on after the end of the file; there is nothing there.
    assert judge(appraiser, process(mapping(offset=4096, end=0x18000), VDSO)).good


def test_anonymous_code(appraiser: Appraiser) -> None:
    bare = mapping(None, "", start=0x30000, end=0x31000)
    assert (
        only(judge(appraiser, process(mapping(), bare)), Code.MAPPING_ANONYMOUS_EXEC).where
        == "0x30000-0x31000"
    )
    named = mapping(None, "[uprobes]", start=0x30000, end=0x31000)
    assert "[uprobes]" in only(judge(appraiser, process(mapping(), named)), Code.MAPPING_ANONYMOUS_EXEC).seen
    vdso = mapping(None, "[vdso]", start=0x30000, end=0x31000, protection=READ | WRITE | EXEC)
    only(judge(appraiser, process(mapping(), vdso)), Code.MAPPING_ANONYMOUS_EXEC)


def test_jit() -> None:
    appraiser = Appraiser(reference(), Rules(allow_jit=True, protected=()))
    appraiser.learn(1, identity(1, "/usr/bin/q", APPROVED))
    appraiser.appraise(FILES, files(segment(1)))
    tcg = hypervisor(accel="tcg")
    everything = READ | WRITE | EXEC
    whole = mapping(None, "", start=0x100000, end=0x200000, protection=everything)
    part = mapping(None, "", start=0x100000, end=0x180000, protection=everything)
    beside = mapping(None, "", start=0x200000, end=0x201000, protection=everything)
    assert judge(appraiser, process(mapping(), VDSO, hypervisor=tcg)).good
    assert judge(appraiser, process(mapping(), whole, hypervisor=tcg)).good
    assert judge(appraiser, process(mapping(), part, hypervisor=tcg)).good
    only(judge(appraiser, process(mapping(), part, beside, hypervisor=tcg)), Code.MAPPING_ANONYMOUS_EXEC)
    # Under KVM there is no JIT, whatever the configuration says.
    kvm = hypervisor(pid=5)
    only(judge(appraiser, process(mapping(), whole, hypervisor=kvm)), Code.MAPPING_ANONYMOUS_EXEC)


def _jit(start: int, end: int, protection: int = READ | WRITE | EXEC) -> Mapping:
    return mapping(None, "", start=start, end=end, protection=protection)


@pytest.mark.parametrize(
    ("first", "later", "good"),
    [
        # What is too small or too large to be TCG's buffer never is one.
        ([(0x100000, 0x101000)], None, False),
        ([(0x100000, 0x1FF000)], None, False),
        ([(1 << 32, (1 << 32) + (2 << 30) + 4096)], None, False),
        ([(1 << 32, (1 << 32) + (2 << 30))], None, True),
        # One buffer, in regions with guard pages between them, and nothing beside.
        ([(0x100000, 0x180000), (0x181000, 0x201000)], None, True),
        ([(0x100000, 0x200000), (0x300000, 0x400000)], None, False),
        ([(0x100000, 0x200000), (0x300000, 0x301000)], None, False),
        # It may shrink and be split; it may not grow or move.
        ([(0x100000, 0x200000)], [(0x100000, 0x110000), (0x120000, 0x200000)], True),
        ([(0x100000, 0x200000)], [], True),
        ([(0x100000, 0x200000)], [(0x100000, 0x201000)], False),
        ([(0x100000, 0x200000)], [(0xFF000, 0x200000)], False),
        ([(0x100000, 0x200000)], [(0x300000, 0x400000)], False),
    ],
)
def test_code_buffer(first: list[tuple[int, int]], later: list[tuple[int, int]] | None, good: bool) -> None:
    appraiser = Appraiser(reference(), Rules(allow_jit=True, protected=()))
    appraiser.learn(1, identity(1, "/usr/bin/q", APPROVED))
    appraiser.appraise(FILES, files(segment(1)))
    tcg = hypervisor(accel="tcg")
    for areas in [first] if later is None else [first, later]:
        verdict = judge(appraiser, process(mapping(), *(_jit(*area) for area in areas), hypervisor=tcg))
    assert verdict.good is good
    if not good:
        only(verdict, Code.MAPPING_ANONYMOUS_EXEC)
    # Shrunk and grown again is where it was.
    if later is not None and good:
        assert judge(appraiser, process(mapping(), *(_jit(*area) for area in first), hypervisor=tcg)).good


def test_claims(appraiser: Appraiser) -> None:
    claims = dict(judge(appraiser, process(mapping(), VDSO)).claims)
    assert claims["anonymous executable"] == "none"
    assert claims["executable"] == "/usr/bin/q"
    assert claims["altered pages"] == "0"
    claims = dict(appraiser.appraise(FILES, files(segment(1))).claims)
    assert (claims["files"], claims["approved"], claims["not identified"]) == ("1", "1", "0")


def test_writable(appraiser: Appraiser) -> None:
    only(judge(appraiser, process(mapping(protection=7), VDSO)), Code.MAPPING_WRITABLE_EXEC)
    only(
        judge(appraiser, process(mapping(), mapping(protection=READ | WRITE, start=0x20000, end=0x21000))),
        Code.MAPPING_WRITABLE_CODE,
    )


@pytest.mark.parametrize("reason", ["private", "frame", "swapped"])
def test_altered_page(appraiser: Appraiser, reason: str) -> None:
    page = AlteredPage(0x10123, 1, "/usr/bin/q", 0x123, b"\x01\x02", b"\x09\x02", reason)
    finding = only(judge(appraiser, process(altered=(page,), altered_total=1)), Code.CODE_ALTERED)
    assert finding.where == "address 0x10123, file offset 0x123"
    assert "pid 812 (vm web1)" in finding.subject
    assert "01 02" in finding.expected
    assert "09 02" in finding.seen


def test_altered_pages_that_are_only_counted(appraiser: Appraiser) -> None:
    assert "3 altered pages" in only(judge(appraiser, process(altered_total=3)), Code.CODE_ALTERED).seen


def test_findings_are_bounded(appraiser: Appraiser) -> None:
    many = tuple(mapping(None, "", start=i << 12, end=(i + 1) << 12) for i in range(1, 500))
    assert len(judge(appraiser, process(mapping(), *many)).findings) == 64


# ── IMA ─────────────────────────────────────────────────────────────────────────────────────────────


def ima(data: bytes, offset: int = 0, *, more: bool = False, boot_id: str = BOOT_ID) -> ImaReading:
    return ImaReading(boot_id, offset, data, more)


GOOD = entry("boot_aggregate", b"pcrs") + entry("/usr/bin/ok", b"ok") + entry("/home/x", b"anything")


def test_ima_good(appraiser: Appraiser) -> None:
    assert appraiser.appraise(IMA, ima(GOOD)).good
    assert appraiser.ima.position == len(GOOD)
    assert appraiser.ima.pcr10 == replay(parse_entries(GOOD))
    assert appraiser.appraise(IMA, ima(b"", len(GOOD))).good


def test_ima_in_parts(appraiser: Appraiser) -> None:
    first = parse_entries(GOOD)[0].end
    assert appraiser.appraise(IMA, ima(GOOD[:first], more=True)).status is Status.PENDING
    assert appraiser.appraise(IMA, ima(GOOD[first:], first)).good
    # Asked twice from the same position: the second answer adds nothing.
    assert appraiser.appraise(IMA, ima(GOOD[first:], first)).good
    assert appraiser.ima.pcr10 == replay(parse_entries(GOOD))


def test_ima_gap_and_empty_are_not_good(appraiser: Appraiser) -> None:
    assert appraiser.appraise(IMA, ima(b"")).status is Status.PENDING
    assert appraiser.appraise(IMA, ima(GOOD, 5)).status is Status.PENDING
    assert appraiser.ima.position == 0


def test_ima_unknown(appraiser: Appraiser) -> None:
    bad = entry("/usr/bin/ok", b"other")
    finding = only(appraiser.appraise(IMA, ima(GOOD + bad)), Code.IMA_UNKNOWN)
    assert finding.subject == "/usr/bin/ok"
    assert finding.expected.startswith("sha256:")
    # It stays until it is approved or accepted.
    only(appraiser.appraise(IMA, ima(b"", len(GOOD + bad))), Code.IMA_UNKNOWN)
    appraiser.reference = reference(log=parse_entries(GOOD + bad))
    assert appraiser.appraise(IMA, ima(b"", len(GOOD + bad))).good


def test_ima_new_file(appraiser: Appraiser) -> None:
    assert (
        only(appraiser.appraise(IMA, ima(entry("/usr/bin/new"))), Code.IMA_UNKNOWN).expected == "no such file"
    )


def test_ima_violation(appraiser: Appraiser) -> None:
    data = GOOD + entry("/home/log", violation=True)
    assert appraiser.appraise(IMA, ima(data)).good
    bad = entry("/usr/bin/ok", violation=True)
    only(appraiser.appraise(IMA, ima(bad, len(data))), Code.IMA_VIOLATION)
    assert appraiser.ima.pcr10 == replay(parse_entries(data + bad))
    # Reference values do not make it good, not even for the digest it shows; an officer does.
    appraiser.reference = reference(log=parse_entries(data + bad), survey={"/usr/bin/ok": bytes(32)})
    only(appraiser.appraise(IMA, ima(b"", len(data + bad))), Code.IMA_VIOLATION)
    accepted = appraiser.ima.so_far
    rules = Rules(allow_jit=False, protected=("/usr/",), accepted=accepted)
    assert Appraiser(reference(), rules).appraise(IMA, ima(data + bad)).good
    # What came after the officer looked is judged; so is another boot's log.
    later = entry("/usr/bin/ok", violation=True)
    only(Appraiser(reference(), rules).appraise(IMA, ima(data + bad + later)), Code.IMA_VIOLATION)
    another = ima(data + bad, boot_id="c" * 36)
    only(Appraiser(reference(), rules).appraise(IMA, another), Code.IMA_VIOLATION)


def test_ima_unknown_template(appraiser: Appraiser) -> None:
    only(appraiser.appraise(IMA, ima(framed(b"d-ng", b"x"))), Code.IMA_MALFORMED)


def test_ima_malformed(appraiser: Appraiser) -> None:
    only(appraiser.appraise(IMA, ima(GOOD[:-1])), Code.IMA_MALFORMED)
    rules = Rules(allow_jit=False, protected=("/usr/",), accepted=Accepted("b" * 36, 1 << 20))
    only(Appraiser(reference(), rules).appraise(IMA, ima(GOOD[:-1])), Code.IMA_MALFORMED)


def test_ima_another_boot_starts_over(appraiser: Appraiser) -> None:
    appraiser.appraise(IMA, ima(GOOD))
    other = ima(b"", len(GOOD), boot_id="c" * 36)
    assert appraiser.appraise(IMA, other).status is Status.PENDING
    assert appraiser.ima.position == 0
    assert appraiser.appraise(IMA, ima(GOOD, boot_id="c" * 36)).good


def test_ima_matches_a_quote(appraiser: Appraiser) -> None:
    log = appraiser.ima
    assert log.matches(PCR_START) == 0
    appraiser.appraise(IMA, ima(GOOD))
    parsed = parse_entries(GOOD)
    for number, item in enumerate(parsed, 1):
        assert log.matches(replay(parsed[:number])) == item.end
    assert log.matches(b"\x01" * 32) is None
    log.settle(parsed[1].end)
    assert log.matches(replay(parsed[:1])) is None
    assert log.matches(replay(parsed[:2])) == parsed[1].end
    assert log.matches(replay(parsed)) == len(GOOD)


def test_ima_findings_are_bounded(appraiser: Appraiser) -> None:
    data = b"".join(entry(f"/usr/{number}") for number in range(300))
    assert len(appraiser.appraise(IMA, ima(data)).findings) == 64


def test_no_protected_prefix_protects_everything() -> None:
    appraiser = Appraiser(reference(), Rules(allow_jit=False, protected=()))
    only(appraiser.appraise(IMA, ima(entry("/home/x"))), Code.IMA_UNKNOWN)
