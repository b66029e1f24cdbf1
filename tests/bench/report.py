"""One figure after another: a JSON line on standard output each, and all in `build/bench.json`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TARGETS: dict[str, dict[str, float]] = {
    "gate.throughput_rps": {"at_least": 1000},
    "gate.latency_ms.p50": {"at_most": 30},
    "gate.flood.p99_ratio": {"at_most": 3},
    "pass.request_scoped_ms.1": {"at_most": 5},
    "pass.request_scoped_ms.10": {"at_most": 5},
    "pass.request_scoped_ms.100": {"at_most": 5},
    "sweep.ms.100": {"at_most": 100},
    "sweep.naive_ratio": {"at_least": 15},
    "ima.replay_s": {"at_most": 1},
    "ima.idle_us": {"at_most": 1000},
    "measure.idle_cpu_percent": {"at_most": 1},
    "measure.rss_mb": {"at_most": 60},
    "ledger.verify_entries_per_s": {"at_least": 100_000},
    "ledger.open_s": {"at_most": 2},
    "evidence.verify_ms": {"at_most": 5},
    "start.to_ready_ms": {"at_most": 1500},
}
PATH = Path("build/bench.json")
NOISE = "shared machine: compare runs, not single figures"


class Report:
    def __init__(self) -> None:
        self._lines: list[dict[str, object]] = []

    def add(
        self, name: str, value: float, unit: str, *, samples: int, note: str, **more: float | str | bool
    ) -> None:
        line: dict[str, object] = {
            "name": name, "value": round(value, 3), "unit": unit, "samples": samples,
            **TARGETS.get(name, {}), **more,
            "note": f"{note}; {NOISE}",
        }  # fmt: skip
        self._lines.append(line)
        print(json.dumps(line), flush=True)

    def write(self) -> None:
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(json.dumps(self._lines, indent=1) + "\n")


def percentile(sorted_values: Sequence[float], fraction: float) -> float:
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * fraction))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
