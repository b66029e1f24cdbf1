"""The report of the last readings says what the gate holds, not something kinder."""

from __future__ import annotations

import pytest

from hostd.core.findings import (
    BOOT,
    FILES,
    GUESTS,
    KERNEL,
    Component,
    Finding,
    Kind,
    Severity,
    Status,
    Verdict,
    process_of,
    relro_of,
)
from hostd.ipc import operating as adm
from hostd.vault.explain import explain
from hostd.vault.gate import Gate
from hostd.vault.waiting import Judged

VM = "aaaaaaaa-0000-4000-8000-000000000001"
BAD = Finding(str(FILES), "file-altered", Severity.CRITICAL, "/usr/bin/qemu", "90", "cc", "file offset 0x10")


@pytest.fixture
def gate() -> Gate:
    return Gate(require=frozenset({Kind.FILES, Kind.KERNEL}), host_scope=False, waiting_per_caller=4, batch=4)


def judged(component: Component, status: Status, *findings: Finding) -> Judged:
    return Judged(
        Verdict(component, status, findings, claims=(("segments", "52"),)), 1_000_000, 3_000_000, 2_500_000
    )


def report(gate: Gate, *components: Component, last: dict[Component, Judged]) -> dict[str, adm.MeasuredLine]:
    found = explain(components, gate=gate, last=last, now=11_000_000, reference="ab", version=7)
    assert (found.reference, found.version) == ("ab", 7)
    return {line.component: line for line in found.components}


def test_times_status_and_claims_are_those_of_the_reading(gate: Gate) -> None:
    (line,) = report(gate, FILES, last={FILES: judged(FILES, Status.VERIFIED)}).values()
    assert (line.status, line.age_ms, line.cost_ms) == ("verified", 10.0, 2.5)
    assert line.claims == (("segments", "52"),)


def test_what_was_never_read_is_not_called_good(gate: Gate) -> None:
    (line,) = report(gate, KERNEL, last={}).values()
    assert (line.status, line.required, line.findings) == ("unread", True, ())


def test_only_what_is_not_required_says_so(gate: Gate) -> None:
    found = report(gate, BOOT, KERNEL, GUESTS, process_of(VM), relro_of(VM), last={})
    required = {name for name, line in found.items() if line.required}
    assert required >= {str(KERNEL), str(process_of(VM))}
    assert str(BOOT) not in required


def test_a_latched_drift_keeps_its_findings_over_a_good_reading(gate: Gate) -> None:
    gate.latch(FILES, (BAD,))
    (line,) = report(gate, FILES, last={FILES: judged(FILES, Status.VERIFIED)}).values()
    assert line.latched
    assert [f.code for f in line.findings] == ["file-altered"]
    assert line.findings[0].where == "file offset 0x10"


def test_the_hosts_components_come_first_and_in_the_documented_order(gate: Gate) -> None:
    found = report(gate, relro_of(VM), process_of(VM), FILES, KERNEL, GUESTS, BOOT, last={})
    assert list(found) == ["guests", "boot", "kernel", "files", f"process:{VM}", f"relro:{VM}"]
