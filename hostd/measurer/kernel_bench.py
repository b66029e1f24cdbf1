"""What a complete reading of the kernel costs: `python -m hostd.measurer.kernel_bench [ROUNDS]`, as root.

Prints JSON: `kernel.pass_ms`, the median of complete passes; `kernel.part_ms`, of the longest part;
`kernel.first_s`, from nothing to the first complete pass, comparison with package files included;
`kernel.megabytes` read in a pass; `kernel.rss_mb`, what the probe added to this process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Final

from hostd.core.readings import Missing
from hostd.measurer.kernel import KernelProbe

FIRST_S: Final = 300.0
"""To wait for the comparison; in an emulated machine it takes 15 s."""


class KernelBenchError(Exception):
    """The kernel cannot be read here."""


def bench_kernel(rounds: int = 20) -> dict[str, float]:
    """The figures.

    Raises:
        KernelBenchError: this host does not show its kernel, or it is not as it should be.
    """
    before = _resident()
    probe = KernelProbe()
    try:
        started = time.monotonic()
        while (first := _pass(probe)) is None:
            if time.monotonic() - started > FIRST_S:
                raise KernelBenchError("the comparison with package files did not end")
            time.sleep(0.1)
        ready = time.monotonic() - started
        passes = [taken for _ in range(rounds) if (taken := _pass(probe)) is not None]
        if not passes:
            raise KernelBenchError("modules come and go: no pass was complete")
        return {
            "kernel.pass_ms": statistics.median(sum(taken) for taken, _ in passes) * 1e3,
            "kernel.part_ms": statistics.median(max(taken) for taken, _ in passes) * 1e3,
            "kernel.parts": len(first[0]),
            "kernel.megabytes": first[1] / 1e6,
            "kernel.first_s": ready,
            "kernel.rss_mb": (_resident() - before) / 1e6,
        }
    finally:
        probe.close()


def _pass(probe: KernelProbe) -> tuple[list[float], int] | None:
    """Seconds of each part, and bytes read; None: not ready, or modules changed."""
    taken: list[float] = []
    size = 0
    while True:
        started = time.perf_counter()
        reading = probe.read(len(taken))
        taken.append(time.perf_counter() - started)
        if isinstance(reading, Missing):
            if reading.absent:
                raise KernelBenchError(reading.reason)
            return None
        if reading.altered_total:
            raise KernelBenchError(f"altered: {reading.altered[:1]}")
        size += sum(item.length for item in reading.ranges)
        if reading.part + 1 == reading.parts:
            return taken, size


def _resident() -> int:
    """Bytes of this process in memory (proc(5), statm)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    print(json.dumps(bench_kernel(int(sys.argv[1]) if len(sys.argv) > 1 else 20)))
