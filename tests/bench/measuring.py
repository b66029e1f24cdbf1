"""What measuring costs: passes and sweeps with 1, 10 and 100 QEMU processes, the log, memory, idle time.

The machines are idle ones without devices (`-machine none -S`, TCG), of a binary of their own. For each
number of them the readings run in a fresh process (`hostd.measurer.bench`), so that its memory is that of
the measurer.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from hostd.core.appraise_ima import ImaLog
from hostd.core.readings import ImaReading
from hostd.core.reference import FORMAT, Reference
from hostd.measurer.ima import ImaProbe
from tests.bench.report import Report, median
from tests.support import qemu
from tests.support.imalog import entry

if TYPE_CHECKING:
    from tests.e2e.harness import Host

COUNTS = (1, 10, 100)
ENTRIES = 100_000
IDLE_S = 20.0
BATCH = 3
"""Machines started at once: a start takes 0.2 s of a core."""
PAGEMAP_ENTRY = 8 / 4096
"""Bytes of page table read for each byte that is mapped."""


def readings(report: Report) -> None:
    """Rows of passes and sweeps."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        binary = qemu.copy_of_qemu(Path(directory))
        started = 0
        for count in COUNTS:
            with ThreadPoolExecutor(BATCH) as pool:
                for vm in pool.map(lambda _: qemu.start(binary, "-m", "64"), range(count - started)):
                    stack.callback(vm.kill)
            started = count
            time.sleep(2.0)
            _rows(report, count, _measured(binary, count, rounds=100 if count < 100 else 60))


def _measured(binary: Path, count: int, *, rounds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "hostd.measurer.bench", str(binary), str(rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=150)
    found: dict[str, float] = json.loads(done.stdout)
    if found["vms"] != count:
        raise SystemExit(f"{found['vms']:g} of {count} machines run")
    return found


def _rows(report: Report, count: int, found: dict[str, float]) -> None:
    where = f"measurer's readings called in process, {count} idle QEMU (-machine none, TCG)"
    note = f"{where}, median"
    rounds = 100 if count < 100 else 60
    for name in sorted(name for name in found if name.startswith("reading.")):
        report.add(name if count == 1 else f"{name}.{count}", found[name], "ms", samples=rounds, note=note)
    kinds = " ".join(
        name.removeprefix("reading.").removesuffix("_ms") for name in found if name.startswith("reading.")
    )
    bandwidth = found["bandwidth_gbps"]
    scoped, sweep = found["request_scoped_ms"], found["sweep_ms"]
    content = found["megabytes"]
    bound = content * (1 + PAGEMAP_ENTRY) / bandwidth
    report.add(
        f"pass.request_scoped_ms.{count}", scoped, "ms", samples=rounds, note=f"{note}; {kinds}",
        megabytes=round(content, 1), bound_ms=round(bound, 2), times_bound=round(scoped / bound, 2),
        load=round(os.getloadavg()[0], 2),
    )  # fmt: skip
    bound = content * (1 + PAGEMAP_ENTRY * count) / bandwidth
    report.add(
        f"sweep.ms.{count}", sweep, "ms", samples=max(5, rounds // count), note=f"{note}; {kinds}",
        cpu_ms=round(found["sweep_cpu_ms"], 1), each_ms=round(sweep / count, 3),
        bound_ms=round(bound, 2), times_bound=round(sweep / bound, 2),
    )  # fmt: skip
    report.add(
        "sweep.naive_ratio" if count == 100 else f"sweep.naive_ratio.{count}",
        found["naive_ms"] / sweep, "times", samples=1 if count == 100 else 3,
        note=f"{where}: SHA-256 of every process's mapped code and constants through /proc/PID/mem, "
        "over the sweep (which reads more than that)",
        naive_ms=round(found["naive_ms"], 1),
    )  # fmt: skip
    if count == 1:
        report.add("pass.request_scoped_ms", scoped, "ms", samples=rounds, note=f"{note}; {kinds}")
        report.add(
            "pass.naive_ms", found["naive_ms"], "ms", samples=3, note=f"{where}; see sweep.naive_ratio"
        )
    if count == max(COUNTS):
        report.add(
            "memory.bandwidth_gbps", bandwidth, "GB/s", samples=7,
            note="memchr over 256 MiB, the better of one and two threads; bound_ms is content plus page "
            "tables at this rate (43 MB partly stay in the cache, so a pass can be nearer than DRAM allows)",
        )  # fmt: skip
        report.add(
            f"measure.rss_mb.{count}", found["private_mb"], "MB", samples=1, rss_mb=round(found["rss_mb"], 1),
            private_clean_mb=round(found["private_clean_mb"], 1),
            note=f"{where}; Private_Dirty of smaps_rollup, 10 s after the last VM was new: pages of files "
            "are shared by nature and not counted; private_clean_mb of them nobody else maps just now",
        )  # fmt: skip
        report.add("measure.rss_mb", found["private_mb"], "MB", samples=1, note=f"as measure.rss_mb.{count}")


def _known() -> Reference:
    """Reference values with a digest for every entry."""
    files = {
        f"/usr/lib/x/file-{number}": (sha256(str(number).encode()).hexdigest(),) for number in range(ENTRIES)
    }
    return Reference(format=FORMAT, version=1, created=0, host="bench", files=files)


def log(report: Report) -> None:
    """Rows of the IMA log, on a log of our own making: this machine's kernel may keep none."""
    data = b"".join(entry(f"/usr/lib/x/file-{number}", str(number).encode()) for number in range(ENTRIES))
    known = _known()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "log"
        path.write_bytes(data)
        took = []
        for _ in range(3):
            judge, probe = ImaLog(("/usr/",)), ImaProbe(path)
            began = time.perf_counter()
            while True:
                reading = probe.read(judge.position)
                assert isinstance(reading, ImaReading)
                judge.appraise(reading, known)
                if not reading.more:
                    break
            took.append(time.perf_counter() - began)
            assert judge.entries == ENTRIES
        idle = []
        for _ in range(200):
            began = time.perf_counter()
            reading = probe.read(judge.position)
            assert isinstance(reading, ImaReading)
            judge.appraise(reading, known)
            idle.append((time.perf_counter() - began) * 1e6)
        probe.close()
    note = f"read and judged, {ENTRIES} entries of a log file"
    report.add("ima.replay_us_per_entry", median(took) / ENTRIES * 1e6, "us", samples=3, note=note)
    report.add("ima.replay_s", median(took), "s", samples=3, note=note)
    report.add("ima.idle_us", median(idle), "us", samples=200, note=f"a later pass, nothing came; {note}")


def idle(report: Report, host: Host) -> None:
    """What the measurer of an idle hostd takes of one core, sweeping."""
    pid = host.pids()["measurer"]
    before, began = _cpu_s(pid), time.monotonic()
    time.sleep(IDLE_S)
    used = (_cpu_s(pid) - before) / (time.monotonic() - began)
    report.add(
        "measure.idle_cpu_percent", used * 100, "%", samples=1,
        note=f"of one core, {IDLE_S:g} s without a request, one QEMU, default measure.sweep_s",
    )  # fmt: skip


def _cpu_s(pid: int) -> float:
    """User and system time so far, of all threads, from the scheduler's clock (nanoseconds)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9
