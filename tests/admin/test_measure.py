"""`hostctl measure`: what is shown of each component, safe for a terminal."""

from __future__ import annotations

from hostd.admin.measure import COLUMNS, explanation, rows
from hostd.ipc import operating as adm

NASTY = "/tmp/\x1b[2J\r\nverified"
FINDING = adm.FindingLine("code-altered", "critical", NASTY, NASTY, "bytes 90", "bytes cc")


def line(status: str, *, required: bool = True, latched: bool = False, findings: int = 0) -> adm.MeasuredLine:
    return adm.MeasuredLine(
        "files",
        status,
        required,
        latched,
        12.3,
        2.5,
        (("segments", "52"), (NASTY, NASTY)),
        (FINDING,) * findings,
    )


def test_a_row_for_each_component() -> None:
    found = adm.Measured(
        "ab" * 32,
        3,
        (
            line("verified"),
            line("absent"),
            line("absent", required=False),
            line("verified", latched=True, findings=2),
        ),
    )
    table = list(rows(found))
    assert [len(row) for row in table] == [len(COLUMNS)] * 4
    assert [row[1] for row in table] == ["verified", "absent", "absent, not required", "verified, latched"]
    assert table[3][-1] == 2


def test_claims_and_findings_are_plain_lines() -> None:
    lines = list(explanation(adm.Measured("", 0, (line("drifted", latched=True, findings=1),))))
    assert all(one.isprintable() for one in lines)
    assert lines[0] == "files: drifted, latched, 2.50 ms"
    assert lines[1].split() == ["segments", "52"]
    assert [one.split()[0] for one in lines[3:8]] == ["!", "what", "where", "expected", "seen"]
    assert lines[6].split(maxsplit=1)[1] == "bytes 90"
    assert lines[7].split(maxsplit=1)[1] == "bytes cc"
