"""Numbers for the metrics role: counters, gauges and histograms, as plain data.

The vault counts; `hostd.metrics` asks for a snapshot and speaks to Prometheus. Label values come
from bounded sets (operations, codes, kinds of component), never from a caller's text.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from hostd.ipc.counting import Histogram, Sample, Snapshot

BUCKETS: Final[dict[str, tuple[float, ...]]] = {
    "hostd_batch_requests": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "hostd_batch_seconds": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
    "hostd_reading_seconds": (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1),
    "hostd_tpm_quote_seconds": (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 5),
    "hostd_tpm_read_seconds": (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 5),
}

Labels = tuple[tuple[str, str], ...]


class Counters:
    """Counts, in the vault's one thread."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, Labels], float] = {}
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], tuple[list[int], list[float]]] = {}

    def count(self, name: str, *, by: float = 1, **labels: str) -> None:
        place = (name, tuple(labels.items()))
        self._counts[place] = self._counts.get(place, 0) + by

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name, tuple(labels.items())] = value

    def forget_gauges(self, name: str) -> None:
        for place in [p for p in self._gauges if p[0] == name]:
            del self._gauges[place]

    def observe(self, name: str, value: float, **labels: str) -> None:
        bounds = BUCKETS[name]
        place = (name, tuple(labels.items()))
        counts, total = self._histograms.setdefault(place, ([0] * (len(bounds) + 1), [0.0]))
        counts[bisect_left(bounds, value)] += 1
        total[0] += value

    def snapshot(self) -> Snapshot:
        return Snapshot(
            counters=tuple(Sample(n, labels, float(v)) for (n, labels), v in self._counts.items()),
            gauges=tuple(Sample(n, labels, float(v)) for (n, labels), v in self._gauges.items()),
            histograms=tuple(
                Histogram(n, labels, tuple(map(float, BUCKETS[n])), tuple(counts), total[0])
                for (n, labels), (counts, total) in self._histograms.items()
            ),
        )
