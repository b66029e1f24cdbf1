"""Legitimate events, counted by kind, and what hostd said meanwhile."""

from __future__ import annotations

import threading
from collections import Counter


class Tally:
    """Counts events; threads may use it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, number: int = 1) -> None:
        with self._lock:
            self._counts[kind] += number

    @property
    def total(self) -> int:
        return sum(self._counts.values())

    def __getitem__(self, kind: str) -> int:
        return self._counts[kind]

    def report(self, findings: int, answers: int) -> str:
        """The list by kind with its total."""
        lines = [f"{number:6} {kind}" for kind, number in self._counts.items()]
        totals = f"innocent events: {self.total}, findings {findings} ({answers} requests answered meanwhile)"
        return "\n".join([*lines, totals])
