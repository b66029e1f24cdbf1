"""Appraisal of relocated data, from readings made by hand."""

from __future__ import annotations

import msgspec
import pytest

from hostd.core.appraise_relro import RelroJudge
from hostd.core.codes import Code
from hostd.core.findings import Severity, Status, Verdict, relro_of
from hostd.core.manifest import from_host
from hostd.core.reading_relro import AlteredSlot, RelroFile, RelroReading, Value
from tests.support.readings import VM, hypervisor, identity, posture

QEMU = "/usr/bin/q"
DIGEST = bytes(range(32))
REFERENCE = from_host(
    created=1, host="h", posture=posture(), files=[identity(1, QEMU, DIGEST)], survey={}, log=[]
)
FILE = RelroFile(1, QEMU, DIGEST, 1000, 3)
SLOT = AlteredSlot(
    address=0x5000,
    name=QEMU,
    file_offset=0x1000,
    place=".got+0x48",
    symbol="writev@GLIBC_2.2.5",
    relocation="R_X86_64_JUMP_SLOT",
    expected=(Value(0x7000, "writev+0x0 in libc.so.6"), Value(0x4036, ".plt+0x16 in q")),
    seen=Value(0x9000, "executable memory of no loaded file"),
    reason="value",
)


def reading(**changes: object) -> RelroReading:
    values: dict[str, object] = {
        "hypervisor": hypervisor(),
        "files": (FILE,),
        "uncovered": (),
        "tag": bytes(16),
        "altered": (),
        "altered_total": 0,
        "interposed": 0,
    }
    return RelroReading(**{**values, **changes})  # type: ignore[arg-type]


def verdict(vm: str = VM, **changes: object) -> Verdict:
    return RelroJudge().appraise(relro_of(vm), reading(**changes), REFERENCE)


def test_good() -> None:
    found = verdict()
    assert found.status is Status.VERIFIED
    assert dict(found.claims) == {
        "files": "1", "words": "1000", "pinned": "3", "interposed": "0", "unapproved": "0", "uncovered": "0",
    }  # fmt: skip


def test_of_another_vm_is_pending() -> None:
    assert verdict("22222222-2222-3333-4444-555555555555").status is Status.PENDING


def test_without_files_is_pending() -> None:
    assert verdict(files=()).status is Status.PENDING


def test_altered_slot_is_told_in_full() -> None:
    (finding,) = verdict(altered=(SLOT,), altered_total=1).findings
    assert str(finding) == (
        f"relro:{VM}: got-altered: pid 812 (vm web1): /usr/bin/q at writev@GLIBC_2.2.5 (R_X86_64_JUMP_SLOT), "
        ".got+0x48, address 0x5000, file offset 0x1000: expected 0x7000 (writev+0x0 in libc.so.6) or 0x4036 "
        "(.plt+0x16 in q), seen 0x9000 (executable memory of no loaded file)"
    )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, Code.GOT_ALTERED),
        ({"relocation": "R_X86_64_GLOB_DAT"}, Code.GOT_ALTERED),
        ({"relocation": "R_X86_64_RELATIVE", "symbol": ""}, Code.RELRO_ALTERED),
        ({"reason": "pinned"}, Code.RELRO_PINNED_CHANGED),
        ({"reason": "writable"}, Code.RELRO_WRITABLE),
    ],
)
def test_codes(changes: dict[str, str], code: Code) -> None:
    found = verdict(altered=(msgspec.structs.replace(SLOT, **changes),), altered_total=1)
    assert found.status is Status.DRIFTED
    assert [finding.code for finding in found.findings] == [code]


def test_more_than_is_told() -> None:
    found = verdict(altered=(SLOT,), altered_total=900)
    assert found.findings[-1].seen == "900 altered words"
    assert verdict(altered=(), altered_total=1).status is Status.DRIFTED


def test_not_covered_is_pending_and_named() -> None:
    found = verdict(uncovered=("/x/y.so: damaged",))
    assert found.status is Status.PENDING
    (finding,) = found.findings
    assert (finding.code, finding.severity) == (Code.RELRO_UNCOVERED, Severity.WARNING)
    assert finding.seen == "/x/y.so: damaged"


def test_computed_from_other_bytes() -> None:
    other = msgspec.structs.replace(FILE, sha256=bytes(32))
    found = verdict(files=(FILE, other))
    assert found.status is Status.DRIFTED
    assert [finding.code for finding in found.findings] == [Code.RELRO_SOURCE]


@pytest.mark.parametrize("others", [(), ("aa" * 32,)])
def test_a_retired_file_is_for_the_process_to_find_and_never_good(others: tuple[str, ...]) -> None:
    """With and without another digest of the path that is still accepted."""
    retired = msgspec.structs.replace(
        REFERENCE,
        files={QEMU: others} if others else {},
        retire={QEMU: {DIGEST.hex(): 1_700_000_000}},
    )
    for path in (QEMU, f"{QEMU} (deleted)"):
        file = msgspec.structs.replace(FILE, path=path)
        found = RelroJudge().appraise(relro_of(VM), reading(files=(file,)), retired)
        assert found.status is Status.PENDING
        (finding,) = found.findings
        assert (finding.code, finding.severity) == (Code.RELRO_SOURCE, Severity.WARNING)
        assert finding.seen == f"SHA-256 {DIGEST.hex()}, retired on 2023-11-14 22:13 UTC"
        assert dict(found.claims)["unapproved"] == "1"
    # What else is wrong with it is found all the same.
    hooked = RelroJudge().appraise(relro_of(VM), reading(altered=(SLOT,), altered_total=1), retired)
    assert hooked.status is Status.DRIFTED
    assert [finding.code for finding in hooked.findings] == [Code.GOT_ALTERED, Code.RELRO_SOURCE]


def test_unknown_file_is_for_the_process_to_find() -> None:
    strange = msgspec.structs.replace(FILE, path="/tmp/x.so")
    found = verdict(files=(FILE, strange))
    assert (found.status, found.findings) == (Status.PENDING, ())


def test_deleted_file_has_its_reference_value() -> None:
    assert verdict(files=(msgspec.structs.replace(FILE, path=f"{QEMU} (deleted)"),)).status is Status.VERIFIED
