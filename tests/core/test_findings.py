"""Verdicts that contradict themselves cannot be made."""

from __future__ import annotations

from itertools import product

import pytest

from hostd.core.findings import FILES, Finding, Severity, Status, Verdict, process_of


def finding(severity: Severity, where: str = "") -> Finding:
    return Finding("files", "altered", severity, "/usr/bin/qemu", "aa", "bb", where)


@pytest.mark.parametrize(("status", "severity"), list(product(Status, [None, *Severity])), ids=str)
def test_drifted_if_and_only_if_something_is_critical(status: Status, severity: Severity | None) -> None:
    findings = () if severity is None else (finding(Severity.WARNING), finding(severity))
    if (status is Status.DRIFTED) == (severity is Severity.CRITICAL):
        verdict = Verdict(FILES, status, findings)
        assert verdict.good is (status is Status.VERIFIED)
    else:
        with pytest.raises(ValueError, match="does not fit"):
            Verdict(FILES, status, findings)


def test_components_and_findings_say_what_they_are_about() -> None:
    assert str(FILES) == "files"
    assert str(process_of("u-1")) == "process:u-1"
    assert process_of("a") != process_of("b")
    assert str(finding(Severity.CRITICAL)) == "files: altered: /usr/bin/qemu: expected aa, seen bb"
    assert " at 0x40: " in str(finding(Severity.CRITICAL, "0x40"))
