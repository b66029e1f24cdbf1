"""How hostctl shows what the vault says: plain lines, safe for a terminal.

Paths, VM names and command lines in findings were chosen by whoever is measured; control characters in
them are shown as escapes, never sent to the terminal.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostd.ipc import operating as adm


def safe(text: object) -> str:
    """Text without control characters: `\\x1b` becomes four visible characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def utc(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def drift_lines(found: adm.Drift) -> Iterator[str]:
    """Every finding: what, where, expected, seen."""
    if not found.drift:
        yield "no drift"
    for line in found.drift:
        yield f"{safe(line.component)}  since {utc(line.since)}  ledger entry {line.ledger}"
        for finding in line.findings:
            yield f"  {safe(finding.code)} ({safe(finding.severity)})"
            yield f"    what      {safe(finding.subject)}"
            if finding.where:
                yield f"    where     {safe(finding.where)}"
            yield f"    expected  {safe(finding.expected)}"
            yield f"    seen      {safe(finding.seen)}"
        for step in line.reactions:
            outcome = "FAILED" if step.outcome == "failed" else step.outcome
            yield f"  {safe(step.step):<10}  {safe(outcome)}" + (
                f": {safe(step.detail)}" if step.detail else ""
            )


def ledger_lines(entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One line an entry, and its details below it."""
    for e in entries:
        outcome = e["outcome"] + (f" ({e['code']})" if e.get("code") else "")
        what = e.get("op") if e["event"] == "operation" else e["event"]
        line = f"{e['seq']:>6}  {utc(e['time'])}  {what:<16} {outcome:<31} "
        about = [e.get("principal", ""), e.get("key", ""), f"pass {e['passed']}" if e.get("passed") else ""]
        yield line + "  ".join(safe(a) for a in about if a)
        for part in filter(None, e.get("detail", "").split(" | ")):
            yield f"{'':>8}{safe(part)}"
