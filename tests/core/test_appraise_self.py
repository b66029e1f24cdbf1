"""hostd's own files and processes: each rule has a test that fails without it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping as Dictionary

import msgspec
import pytest

from hostd.core.appraise_files import FileBook
from hostd.core.appraise_self import MAX_FINDINGS, MAX_PROCESSES, SelfJudge
from hostd.core.findings import SELF, Status, Verdict
from hostd.core.manifest import approve_next, retire
from hostd.core.reading_self import OwnFile, SelfReading
from hostd.core.readings import EXEC, READ, Mapping, ProcessReading
from hostd.core.reference import FORMAT, Reference
from tests.support import readings

ROOT = "/opt/hostd/"
PYTHON = "/usr/bin/python3.11"
CONTENT = {f"{ROOT}a.py": b"a", f"{ROOT}b.so": b"b", "/etc/hostd/hostd.toml": b"t"}


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def reference(content: Dictionary[str, bytes] = CONTENT, **more: object) -> Reference:
    files = {path: (digest(data).hex(),) for path, data in content.items()}
    files[PYTHON] = (digest(b"python").hex(),)
    return Reference(format=FORMAT, version=1, created=0, host="h", files=files, **more)  # type: ignore[arg-type]


REFERENCE = reference()


def book(content: bytes = b"python") -> FileBook:
    """What is known of the interpreter, which the last files reading found good."""
    files = FileBook()
    files.learn(1, readings.identity(1, PYTHON, digest(content)))
    files.appraise(readings.files(readings.segment(1)), reference(), processes=0)
    return files


def process(*extra: Mapping, pid: int = 812) -> ProcessReading:
    hypervisor = readings.hypervisor(pid=pid, vm="", name="vault", cid=0, executable=PYTHON, source="hostd")
    code = Mapping(0x1000, 0x2000, READ | EXEC, 1, 0, PYTHON)
    return ProcessReading(hypervisor, (code, *extra), (), 0)


def own(content: Dictionary[str, bytes] = CONTENT) -> tuple[OwnFile, ...]:
    return tuple(OwnFile(path, digest(data), guarded=True) for path, data in content.items())


def reading(**changes: object) -> SelfReading:
    values: dict[str, object] = {
        "manager": "systemd",
        "roots": (ROOT,),
        "roles": (("measurer", 1), ("vault", 1), ("gateway", 3), ("metrics", 0)),
        "strangers": (),
        "process": process(),
        "number": 1,
        "position": 0,
        "files": own(),
        "complete": True,
    }
    return SelfReading(**{**values, **changes})  # type: ignore[arg-type]


def judge(
    now: SelfReading,
    *,
    keeper: SelfJudge | None = None,
    against: Reference | None = None,
    files: FileBook | None = None,
) -> Verdict:
    return (keeper or SelfJudge()).appraise(SELF, now, against or REFERENCE, files or book())


def codes(verdict: Verdict) -> list[tuple[str, str]]:
    return [(finding.code, finding.subject) for finding in verdict.findings]


def test_as_it_should_be() -> None:
    verdict = judge(reading())
    assert verdict.status is Status.VERIFIED
    claims = dict(verdict.claims)
    assert claims["files"] == "3"
    assert claims["processes"] == "measurer 1, vault 1, gateway 3, metrics 0"


def test_reference_values_that_say_nothing_of_hostd() -> None:
    for nothing in ({}, {"/etc/hostd/hostd.toml": b"t"}):
        verdict = judge(reading(), against=reference(nothing))
        assert verdict.status is Status.ABSENT
        assert ("reference", "none") in verdict.claims


def altered(path: str, content: bytes | None, *, guarded: bool = True) -> tuple[OwnFile, ...]:
    changed = OwnFile(path, b"" if content is None else digest(content), guarded)
    return (*(file for file in own() if file.path != path), changed)


@pytest.mark.parametrize(
    ("files", "code", "path", "seen"),
    [
        (altered(f"{ROOT}a.py", b"x"), "self-file-altered", f"{ROOT}a.py", f"SHA-256 {digest(b'x').hex()}"),
        (altered(f"{ROOT}a.py", None), "self-file-altered", f"{ROOT}a.py", "no file that can be read"),
        (
            altered("/etc/hostd/hostd.toml", b"x"),
            *("self-file-altered", "/etc/hostd/hostd.toml", f"SHA-256 {digest(b'x').hex()}"),
        ),
        (
            altered(f"{ROOT}evil.pth", b"x"),
            *("self-file-unknown", f"{ROOT}evil.pth", f"SHA-256 {digest(b'x').hex()}"),
        ),
        (altered(f"{ROOT}link.py", None), "self-file-unknown", f"{ROOT}link.py", "no file that can be read"),
        (altered(f"{ROOT}a.py", b"a", guarded=False), "self-file-writable", f"{ROOT}a.py", "others may"),
        (own()[1:], "self-file-missing", f"{ROOT}a.py", "no such file"),
        (own()[:2], "self-file-missing", "/etc/hostd/hostd.toml", "no such file"),
    ],
)
def test_files(files: tuple[OwnFile, ...], code: str, path: str, seen: str) -> None:
    verdict = judge(reading(files=files))
    assert verdict.status is Status.DRIFTED
    assert codes(verdict) == [(code, path)]
    assert verdict.findings[0].seen == seen


def test_a_checkout_may_be_writable() -> None:
    files = altered(f"{ROOT}a.py", b"a", guarded=False)
    assert judge(reading(files=files, manager="supervisor")).status is Status.VERIFIED


def test_an_update_that_was_approved_before() -> None:
    coming = {f"{ROOT}a.py": (digest(b"new").hex(),), f"{ROOT}c.py": (digest(b"c").hex(),)}
    against = reference(next=coming)
    # Before it, in the middle of it, and after it.
    for files in (
        own(),
        altered(f"{ROOT}a.py", b"new"),
        (*altered(f"{ROOT}a.py", b"new"), OwnFile(f"{ROOT}c.py", digest(b"c"), guarded=True)),
    ):
        assert judge(reading(files=files), against=against).status is Status.VERIFIED
    old = digest(b"old").hex()
    retired = reference(retire={f"{ROOT}a.py": {old: 5}})
    verdict = judge(reading(files=altered(f"{ROOT}a.py", b"old")), against=retired)
    assert verdict.findings[0].seen == f"SHA-256 {old}, retired on 1970-01-01 00:00 UTC"


def without(*paths: str) -> tuple[OwnFile, ...]:
    return tuple(file for file in own() if file.path not in paths)


def test_an_update_that_removes_a_file_and_was_approved() -> None:
    path = f"{ROOT}b.so"
    approved = approve_next(REFERENCE, {}, created=10, removals=[path], retire_after_s=5)
    for files in (own(), without(path)):  # before it and after it
        assert judge(reading(files=files), against=approved).status is Status.VERIFIED
    # As long as it is there it is what it was, and nothing else may be missing.
    changed = judge(reading(files=altered(path, b"x")), against=approved)
    assert codes(changed) == [("self-file-altered", path)]
    more = judge(reading(files=without(path, f"{ROOT}a.py")), against=approved)
    assert codes(more) == [("self-file-missing", f"{ROOT}a.py")]
    # What nobody approved is found.
    assert codes(judge(reading(files=without(path)))) == [("self-file-missing", path)]
    # Its time has come, by itself or by the officers: nobody needs it, and it may not come back.
    for done in (approved.at(15), retire(approved, created=11)):
        assert judge(reading(files=without(path)), against=done).status is Status.VERIFIED
        (finding,) = judge(reading(files=own()), against=done).findings
        assert (finding.code, finding.subject) == ("self-file-unknown", path)
        assert "retired on 1970-01-01" in finding.seen
    # A manifest that removes every file still says something of hostd.
    paths = [path for path in CONTENT if path.startswith(ROOT)]
    everything = approve_next(REFERENCE, {}, created=10, removals=paths)
    assert judge(reading(files=without(*paths)), against=everything).status is not Status.ABSENT


def test_a_round_must_be_whole() -> None:
    keeper = SelfJudge()
    first, rest = own()[:1], own()[1:]
    # Joined in the middle of a round: nothing can be said to be missing, and nothing is good yet.
    assert judge(reading(position=1, files=rest), keeper=keeper).status is Status.PENDING
    one = reading(number=2, files=first, complete=False)
    assert judge(one, keeper=keeper).status is Status.PENDING
    two = reading(number=2, position=1, files=rest)
    assert judge(two, keeper=keeper).status is Status.VERIFIED
    # From then on parts of a round are enough, and a bad one is one at once.
    assert judge(reading(number=3, files=first, complete=False), keeper=keeper).status is Status.VERIFIED
    gap = reading(number=3, position=2, files=rest[1:])
    assert judge(gap, keeper=keeper).status is Status.VERIFIED
    bad = reading(number=4, files=altered(f"{ROOT}a.py", b"x")[-1:], complete=False)
    assert judge(bad, keeper=keeper).status is Status.DRIFTED
    # Other reference values: all is read anew.
    assert (
        judge(
            reading(number=5, files=first, complete=False),
            keeper=keeper,
            against=reference({**CONTENT, f"{ROOT}c.py": b"c"}),
        ).status
        is Status.PENDING
    )


def test_processes() -> None:
    jit = Mapping(0x7000, 0x8000, READ | EXEC, None, 0, "")
    verdict = judge(reading(process=process(jit)))
    assert codes(verdict) == [("mapping-anonymous-exec", "pid 812 (hostd vault)")]
    assert verdict.findings[0].component == "self"
    other = Mapping(0x9000, 0xA000, READ | EXEC, 2, 0, "/tmp/x.so")
    unknown = judge(reading(process=process(other)))
    assert unknown.status is Status.PENDING
    assert unknown.identify == {2}
    files = book()
    files.learn(2, readings.identity(2, "/tmp/x.so", digest(b"x")))
    verdict = judge(reading(process=process(other)), files=files)
    assert codes(verdict) == [("file-unknown", "pid 812 (hostd vault): /tmp/x.so")]
    verdict = judge(reading(), files=book(b"another python"))
    assert verdict.findings[0].code == "file-unapproved"
    assert judge(reading(process=None)).status is Status.PENDING
    keeper = SelfJudge()
    assert judge(reading(), keeper=keeper).status is Status.VERIFIED
    # Those that were to be read had just ended.
    assert judge(reading(process=None), keeper=keeper).status is Status.VERIFIED


def test_strangers() -> None:
    verdict = judge(reading(strangers=("pid 9 (/usr/bin/nc) in hostd's vault",)))
    assert codes(verdict) == [("self-process-unknown", "pid 9 (/usr/bin/nc) in hostd's vault")]


def test_workers_come_and_go_for_ever() -> None:
    keeper, files, against = SelfJudge(), book(), reference()
    for pid in range(1, 2 * MAX_PROCESSES, 16):
        for more in range(16):
            now = reading(process=process(pid=pid + more), roles=(("gateway", pid % 7),))
            assert keeper.appraise(SELF, now, against, files).status is Status.VERIFIED
    assert len(keeper._seen) <= MAX_PROCESSES


def test_findings_are_bounded() -> None:
    many = tuple(OwnFile(f"{ROOT}{number}.py", b"", guarded=False) for number in range(1000))
    verdict = judge(reading(files=many))
    assert len(verdict.findings) == MAX_FINDINGS


def test_the_reading_is_bounded() -> None:
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(SelfReading)
    assert decoder.decode(encoder.encode(reading())) == reading()
    for wrong in (
        {"files": (OwnFile("x", b"", guarded=True),) * 2049},
        {"files": (OwnFile("x", b"x" * 33, guarded=True),)},
        {"strangers": ("x",) * 65},
        {"roots": ("/",) * 9},
    ):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(encoder.encode(reading(**wrong)))
