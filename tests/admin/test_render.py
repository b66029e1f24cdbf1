"""What an attacker can name (a path, a VM) does not reach the officer's terminal as control characters."""

from __future__ import annotations

from hostd.admin.link import plain
from hostd.admin.render import drift_lines, ledger_lines, safe
from hostd.ipc import operating as adm

NASTY = "/tmp/\x1b[2J\x07\rno drift\n\u202elib.so"
FINDING = adm.FindingLine("code-altered", "critical", NASTY, NASTY, NASTY, NASTY)


def test_control_characters_are_shown_not_sent() -> None:
    assert safe("a\x1b[0m\n") == "a\\x1b[0m\\n"
    assert safe("grün — ok") == "grün — ok"


def test_drift_is_plain_lines() -> None:
    lines = list(drift_lines(adm.Drift((adm.DriftLine(NASTY, 0, 7, (FINDING,)),))))
    assert len(lines) == 6
    assert all(line.isprintable() for line in lines)
    assert list(drift_lines(adm.Drift(()))) == ["no drift"]


def test_drift_says_how_each_step_ended() -> None:
    steps = (
        adm.ReactionLine("refuse", "done", NASTY),
        adm.ReactionLine("poison", "failed", "no TPM"),
        adm.ReactionLine("shred", "waiting", ""),
    )
    lines = list(drift_lines(adm.Drift((adm.DriftLine("files", 0, 7, (), steps),))))
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert lines[2:] == ["  poison      FAILED: no TPM", "  shred       waiting"]


def test_findings_have_named_fields_for_programs() -> None:
    (line,) = plain(adm.Drift((adm.DriftLine("files", 0, 7, (FINDING,)),)))["drift"]
    assert set(line["findings"][0]) == {"code", "severity", "subject", "where", "expected", "seen"}


def test_ledger_is_plain_lines() -> None:
    entry = {
        "seq": 3, "time": 0, "event": "drift", "outcome": "refused", "op": NASTY,
        "principal": NASTY, "detail": f"{NASTY} | {NASTY}",
    }  # fmt: skip
    lines = list(ledger_lines([entry, {**entry, "event": "operation", "op": "Encrypt", "code": "denied"}]))
    assert len(lines) == 6
    assert all(line.isprintable() for line in lines)
    assert "Encrypt" in lines[3]
