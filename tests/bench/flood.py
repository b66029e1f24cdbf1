"""A quiet machine beside one that floods the gate: p99 from arrival to answer, by the trace of the vault."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench.report import percentile
from tests.e2e import flood

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bench.report import Report

COUNT = 300
BATCH = 1024
"""As it is configured by default."""


def fairness(report: Report, binary: Path) -> None:
    seen = flood.observe(binary, count=COUNT, batch=BATCH)
    note = (
        f"GenerateRandom, one at a time, arrival to answer in the vault; beside it a machine with "
        f"{flood.CONNECTIONS * flood.DEPTH} in flight ({seen.flood} answers)"
    )
    alone, flooded = percentile(seen.alone_ms, 0.99), percentile(seen.flooded_ms, 0.99)
    report.add(
        "gate.flood.p99_ratio",
        flooded / alone,
        "ratio",
        samples=len(seen.flooded_ms),
        note=note,
        alone_p50_ms=round(percentile(seen.alone_ms, 0.5), 2),
        alone_p99_ms=round(alone, 2),
        flooded_p50_ms=round(percentile(seen.flooded_ms, 0.5), 2),
        flooded_p99_ms=round(flooded, 2),
        others_at_most=max(seen.others),
    )
