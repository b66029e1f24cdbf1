"""`hostctl measure`: every component read anew, and what each reading showed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.admin.render import safe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.ipc import operating as adm

COLUMNS = ("COMPONENT", "STATUS", "COST ms", "AGE ms", "FINDINGS")


def rows(measured: adm.Measured) -> Iterator[tuple[object, ...]]:
    """The table's rows: one component each."""
    for line in measured.components:
        yield line.component, _status(line), f"{line.cost_ms:.2f}", f"{line.age_ms:.0f}", len(line.findings)


def _status(line: adm.MeasuredLine) -> str:
    needed = "" if line.required or line.status != "absent" else ", not required"
    return f"{line.status}{needed}{', latched' if line.latched else ''}"


def explanation(measured: adm.Measured) -> Iterator[str]:
    """Claims and findings of every component, line by line, safe for a terminal."""
    for line in measured.components:
        yield f"{safe(line.component)}: {_status(line)}, {line.cost_ms:.2f} ms"
        width = max((len(name) for name, _ in line.claims), default=0)
        for name, value in line.claims:
            yield f"    {safe(name):<{width}}  {safe(value)}"
        for finding in line.findings:
            yield f"  ! {safe(finding.code)} ({finding.severity})"
            yield f"      what      {safe(finding.subject)}"
            if finding.where:
                yield f"      where     {safe(finding.where)}"
            yield f"      expected  {safe(finding.expected)}"
            yield f"      seen      {safe(finding.seen)}"
        yield ""
