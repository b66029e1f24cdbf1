"""The row that needs a kernel that shows itself: `kernel.pass_ms`, here or in the lab's host.

A machine without /proc/kcore (or where its kernel was not built from a package) has the figure taken in
the lab, whose processor is emulated in software: some fifteen times slower than a real one. The row says so.
"""

from __future__ import annotations

import json
from pathlib import Path

from hostd.measurer.kernel_bench import KernelBenchError, bench_kernel
from qemu.errors import LabError
from qemu.host import LabHost
from qemu.installed import ensure_installed
from tests.bench.report import Report

KCORE = Path("/proc/kcore")
LAB_S = 300.0


def kernel(report: Report) -> None:
    """Adds the row; says why there is none."""
    if KCORE.exists():
        try:
            _add(report, bench_kernel(), "this machine")
        except KernelBenchError as error:
            print(f"kernel.pass_ms: {error}; taken in the lab instead", flush=True)
        else:
            return
    try:
        disk = ensure_installed()
        with LabHost(disk=disk) as host:
            host.boot()
            found = host.run(["/opt/hostd/bin/python", "-m", "hostd.measurer.kernel_bench"], LAB_S)
    except LabError as error:
        raise SystemExit(f"kernel.pass_ms: the lab does not run: {error}") from error
    _add(report, json.loads(found.text.splitlines()[-1]), "EMULATED: the lab's host, software emulation")


def _add(report: Report, figures: dict[str, float], where: str) -> None:
    report.add(
        "kernel.pass_ms", figures["kernel.pass_ms"], "ms", samples=20,
        note=f"one complete reading of text, constants and tables, in parts; {where}",
        megabytes=round(figures["kernel.megabytes"], 1), parts=figures["kernel.parts"],
        part_ms=round(figures["kernel.part_ms"], 2), first_s=round(figures["kernel.first_s"], 2),
    )  # fmt: skip
