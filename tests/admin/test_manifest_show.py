"""`hostctl manifest show`: all that a manifest says, with dates, safe for a terminal."""

from __future__ import annotations

from hostd.admin.manifest_show import document_lines
from hostd.core.manifest import approve_next, new_document
from hostd.core.reference import ANY_HOST, Reference, Source, reference_digest
from hostd.core.rule_posture import propose_posture
from tests.support.readings import posture

NASTY = "/tmp/\x1b[2J\x07\r\u202elib.so"
A, B, C = "aa" * 32, "bb" * 32, "cc" * 32
NOW = 1_700_000_000


def document(host: str = "kvm1") -> Reference:
    base = new_document(
        created=1,
        host=host,
        base=None,
        files={"/q": (A, B), NASTY: (C,), "/gone": (C,)},
        ima={NASTY: ("sha1:" + "ab" * 20,)},
        sources=[Source(NASTY, "deb", "1.0")],
        posture=propose_posture(posture()),
    )
    return approve_next(base, {"/q": [C]}, created=NOW, removals=["/gone"], retire_after_s=60)


def shown(reference: Reference) -> list[str]:
    return list(document_lines(reference, reference_digest(reference).hex(), NOW))


def test_everything_is_there() -> None:
    reference = document()
    lines = shown(reference)
    assert lines[0] == "version 2 for host kvm1, made 2023-11-14 22:13 UTC"
    assert lines[1] == f"digest   {reference_digest(reference).hex()}"
    assert lines[3] == "3 files; digests: 1 next, 3 to retire; 1 files to remove"
    for digest in (A, B):
        assert f"  /q  {digest}" in lines
        assert f"  /q  {digest}  2023-11-14 22:14 UTC" in lines
    assert f"  /q  {C}" in lines[lines.index("next") :]
    assert "  /gone  may be missing" in lines
    assert "posture {" in lines
    assert any('"lockdown"' in line for line in lines)
    assert "kernel: no reference values" in lines


def test_nothing_reaches_the_terminal() -> None:
    assert all(line.isprintable() for line in shown(document()))


def test_a_manifest_of_every_host_says_so() -> None:
    assert shown(document(ANY_HOST))[0].startswith("version 2 for every host, ")
