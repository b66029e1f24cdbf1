"""What the last readings showed, component by component, for people: `hostctl measure --explain`.

Judges nothing: status, claims and findings are those of the verdicts that moved the gate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.core.findings import Component, Status
from hostd.ipc import operating as adm

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hostd.core.findings import Finding
    from hostd.vault.gate import Gate
    from hostd.vault.waiting import Judged


def explain(
    components: Iterable[Component],
    *,
    gate: Gate,
    last: Mapping[Component, Judged],
    now: int,
    reference: str,
    version: int,
) -> adm.Measured:
    """The report of `components` at `now` (the vault's monotonic nanoseconds).

    A component that has not been read has status `unread`. One that drifted shows the findings it was
    latched with, whatever a later reading said. `reference` and `version` are those of the reference values
    in force (hexadecimal digest); empty and 0 if there are none.
    """
    latched = gate.latched
    lines = []
    for component in sorted(components, key=_order):
        judged = last.get(component)
        findings = latched.get(component) or (() if judged is None else judged.verdict.findings)
        status = None if judged is None else judged.verdict.status
        lines.append(
            adm.MeasuredLine(
                component=str(component),
                status="unread" if status is None else str(status),
                required=not gate.acceptable(component, Status.ABSENT),
                latched=component in latched,
                age_ms=0.0 if judged is None else (now - judged.started) / 1e6,
                cost_ms=0.0 if judged is None else judged.cost_ns / 1e6,
                claims=() if judged is None else judged.verdict.claims,
                findings=finding_lines(findings),
            )
        )
    return adm.Measured(reference=reference, version=version, components=tuple(lines))


def finding_lines(findings: Iterable[Finding]) -> tuple[adm.FindingLine, ...]:
    """Findings as operators get them; the component is named by whatever holds them."""
    return tuple(
        adm.FindingLine(
            code=finding.code,
            severity=str(finding.severity),
            subject=finding.subject,
            where=finding.where,
            expected=finding.expected,
            seen=finding.seen,
        )
        for finding in findings
    )


_TABLE = ("guests", "boot", "ima", "kernel", "posture", "files", "self", "process", "relro", "domain")


def _order(component: Component) -> tuple[str, int]:
    """The host's components first, in the order of docs/measurement.md; then each VM's own."""
    kind = str(component.kind)
    return component.vm, _TABLE.index(kind) if kind in _TABLE else len(_TABLE)
