"""The gate under load, beside a peer that measures nothing.

Each load keeps a number of Encrypt requests in flight on a number of connections, closed loop. T is the time
of the readings that one request needs, as the vault sees them, taken in the same run: no gated request can be
answered faster.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.bench import costless, peer
from tests.bench.clients import together
from tests.bench.report import percentile

if TYPE_CHECKING:
    from tests.bench.report import Report
    from tests.e2e.harness import Host

PLAINTEXT: Final = 256


class Load(NamedTuple):
    name: str
    connections: int
    depth: int
    receipt: str = "reference"

    @property
    def words(self) -> str:
        return f"{self.connections} connections, {self.depth} in flight on each, receipt {self.receipt}"


SATURATED: Final = Load("gate.16x16", 16, 16)
"""256 requests in flight: what the peer is held against."""
LOADS: Final = (
    Load("gate", 1, 1),
    Load("gate.1x16", 1, 16),
    Load("gate.16x1", 16, 1),
    SATURATED,
    Load("gate.64x1", 64, 1),
    Load("gate.64x16", 64, 16),
    Load("gate.16x16.none", 16, 16, "none"),
    Load("gate.16x16.full", 16, 16, "full"),
)
PEERS: Final = (1, 2, 4)
"""Client processes of the peer; the best counts."""


def run(host: Host, key: str, load: Load, seconds: float) -> dict[str, Any]:
    """Client processes that start together; their answers as one."""
    processes = min(2, load.connections)
    arguments = (host.guest_socket, host.directory / "ca.pem", key, load.connections // processes)
    command = [sys.executable, "-m", "tests.bench.load", *map(str, arguments)]
    command += [str(load.depth), str(seconds), str(PLAINTEXT), load.receipt]
    found = together(command, processes, seconds)
    failed: dict[str, int] = {}
    for one in found:
        for code, count in one["failed"].items():
            failed[code] = failed.get(code, 0) + count
    latencies = sorted(latency for one in found for latency in one["latencies"])
    return {"seconds": max(one["seconds"] for one in found), "failed": failed, "latencies": latencies}


def counted(host: Host, name: str) -> dict[str, float]:
    """One metric of the vault: labels as text → value."""
    port = int((host.run / "metrics.port").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if line.startswith(name))
    return {what: float(value) for what, _, value in pairs}


def cpu_seconds(host: Host) -> dict[str, float]:
    """User and system time so far of each role, the workers as one."""
    ticks = os.sysconf("SC_CLK_TCK")
    pids = [*host.pids().items(), *(("workers", pid) for pid in host.workers())]
    found: dict[str, float] = {}
    for role, pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        found[role] = found.get(role, 0.0) + (int(fields[11]) + int(fields[12])) / ticks
    return found


def batches(host: Host) -> tuple[float, float, float]:
    """(seconds in batches, batches, requests in them) so far."""
    found = counted(host, "hostd_batch_")
    return (
        found["hostd_batch_seconds_sum"],
        found["hostd_batch_seconds_count"],
        found["hostd_batch_requests_sum"],
    )


def readings_ms(host: Host) -> float:
    """T: from asking to judging, the latest reading of every component, added up."""
    status = host.status()
    assert status is not None
    return sum(component.cost_ms for component in status.components)


def measure(report: Report, host: Host, key: str, seconds: float, place: Path) -> None:
    """All loads, then the peer, in one run."""
    reached: dict[str, float] = {}
    for load in LOADS:
        reached[load.name] = _measure(report, host, key, load, seconds)
    _overhead(report, host, key, seconds, reached)
    if what := peer.missing():
        print(f"no peer to compare with: {what} (apt-get install softhsm2 p11-kit-modules)", file=sys.stderr)
        return
    rates = {
        clients: peer.saturated(place / f"peer-{clients}", clients=clients, seconds=seconds, size=PLAINTEXT)
        for clients in PEERS
    }
    best = max(rates, key=lambda clients: rates[clients])
    note = (
        "p11-kit server + SoftHSM over a unix socket, AES-256-ECB of the same size (p11-kit 0.24 carries no "
        "parameters of GCM), client processes of Python with ctypes; the best of "
        + ", ".join(f"{clients}: {rate:.0f}" for clients, rate in rates.items())
    )
    report.add("peer.softhsm_rps", rates[best], "requests/s", samples=best, note=note)
    ratio = reached[SATURATED.name] / rates[best]
    report.add("gate.peer_ratio", ratio, "1", samples=1, note=f"{SATURATED.words} / the peer at its best")


def _overhead(report: Report, host: Host, key: str, seconds: float, reached: dict[str, float]) -> None:
    """The same service with readings that cost nothing."""
    quiet = run(host, key, LOADS[0], seconds)["latencies"]
    with costless.serving(host):
        run(host, key, LOADS[0], 1.0)
        bare = run(host, key, LOADS[0], seconds)["latencies"]
        full = run(host, key, SATURATED, seconds)
    what = "readings that cost nothing (tests/bench/costless.py): quote, second look, ledger as ever"
    with_readings, without = percentile(quiet, 0.5), percentile(bare, 0.5)
    note = f"p50 of one client against the same with {what}"
    ratio = {"p50_ms": round(with_readings, 2), "costless_p50_ms": round(without, 2)}
    report.add("gate.overhead_ms", with_readings - without, "ms", samples=len(bare), note=note, **ratio)
    rps = len(full["latencies"]) / full["seconds"]
    share = {"ratio": round(reached[SATURATED.name] / rps, 2)}
    report.add(
        "gate.costless_rps",
        rps,
        "requests/s",
        samples=len(full["latencies"]),
        note=f"{SATURATED.words}; {what}",
        **share,
    )


def _measure(report: Report, host: Host, key: str, load: Load, seconds: float) -> float:
    before, cpu = batches(host), cpu_seconds(host)
    found = run(host, key, load, seconds)
    after, spent = batches(host), cpu_seconds(host)
    latencies: list[float] = found["latencies"]
    answered = len(latencies)
    taken = max(1.0, after[1] - before[1])
    note = f"Encrypt {PLAINTEXT} B over guest.sock (TLS 1.3), {load.words}, {seconds:g} s closed loop"
    ratio = {"T_ms": round(readings_ms(host), 2), "load": round(os.getloadavg()[0], 2)}
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        value = percentile(latencies, share)
        report.add(f"{load.name}.latency_ms.{name}", value, "ms", samples=answered, note=note, **ratio)
    rps = answered / found["seconds"]
    more: dict[str, Any] = {
        "batch_ms": round((after[0] - before[0]) / taken * 1e3, 2),
        "failed": json.dumps(found["failed"]),
        "cpu_us_per_request": json.dumps(
            {role: round((spent[role] - cpu.get(role, 0.0)) / max(1, answered) * 1e6) for role in spent}
        ),
    }
    name = "gate.throughput_rps" if load is SATURATED else f"{load.name}.rps"
    report.add(name, rps, "requests/s", samples=answered, note=note, **ratio, **more)
    if load is SATURATED:
        size = (after[2] - before[2]) / taken
        report.add("gate.requests_per_batch", size, "1", samples=int(taken), note=note)
    return rps
