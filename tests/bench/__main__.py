"""`python -m tests.bench`: measures the readings (`tests.bench.measuring`), then a whole hostd with one QEMU.

Every figure says how it was taken. T, the time of one complete request-scoped pass of readings, is
taken in the same run, because a gated request cannot be answered faster. `--only measuring` leaves out
the hostd.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from guestlib.attest.bundle import parse_bundle
from tests.bench import lab, measuring
from tests.bench.report import Report, median, percentile
from tests.e2e.harness import Host, Settings, adopted, directory, machine, until
from tests.support.qemu import copy_of_qemu

PLAINTEXT = 256


def load(
    host: Host, key: str, *, processes: int, connections: int, depth: int, seconds: float
) -> dict[str, Any]:
    """Client processes that start together; their answers as one."""
    ca = host.directory / "ca.pem"
    arguments = [
        str(host.guest_socket),
        str(ca),
        key,
        str(connections // processes),
        str(depth),
        str(seconds),
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load", *arguments, str(PLAINTEXT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("a client did not get ready")
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [json.loads(process.communicate(timeout=seconds + 60)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    failed: dict[str, int] = {}
    for one in found:
        for code, count in one["failed"].items():
            failed[code] = failed.get(code, 0) + count
    latencies = sorted(latency for one in found for latency in one["latencies"])
    return {"seconds": max(one["seconds"] for one in found), "failed": failed, "latencies": latencies}


def counted(host: Host, name: str) -> dict[str, float]:
    """One metric of the vault: labels as text → value."""
    import urllib.request

    port = int((host.run / "metrics.port").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if line.startswith(name))
    return {what: float(value) for what, _, value in pairs}


def cpu_seconds(pids: dict[str, int]) -> dict[str, float]:
    """User and system time of each process so far."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for role, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[role] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def gate(report: Report, host: Host, key: str, seconds: float) -> None:
    loads = (
        ("gate", 1, 1, 1, "one client, one request at a time"),
        ("gate.1x16", 1, 1, 16, "one client, 16 in flight"),
        ("gate.16x1", 2, 16, 1, "16 connections in 2 client processes, one request at a time each"),
        ("gate.16x16", 2, 16, 16, "16 connections in 2 client processes, 16 in flight each"),
    )
    for name, processes, connections, depth, what in loads:
        pids = host.pids()
        before, cpu = pass_times(host), cpu_seconds(pids)
        found = load(host, key, processes=processes, connections=connections, depth=depth, seconds=seconds)
        after = pass_times(host)
        used = {role: round(value - cpu[role], 2) for role, value in cpu_seconds(pids).items()}
        latencies: list[float] = found["latencies"]
        answered = len(latencies)
        turn = (after[0] - before[0]) / max(1, after[1] - before[1]) * 1e3
        note = (
            f"Encrypt {PLAINTEXT} B with receipt over guest.sock (TLS 1.3), {what}, {seconds:g} s closed loop"
        )
        more: dict[str, Any] = {
            "T_ms": round(pass_ms(host), 2), "batch_ms": round(turn, 2), "load": round(os.getloadavg()[0], 2),
            "failed": json.dumps(found["failed"]), "cpu_s": json.dumps(used),
        }  # fmt: skip
        report.add(
            f"{name}.latency_ms.p50", percentile(latencies, 0.5), "ms", samples=answered, note=note, **more
        )
        passed = {"T_ms": more["T_ms"]}
        p99 = percentile(latencies, 0.99)
        report.add(f"{name}.latency_ms.p99", p99, "ms", samples=answered, note=note, **passed)
        if name == "gate":
            seen = (
                "the vault's view, from asking for a reading to judging it, last of each component added up"
            )
            report.add("pass.vault_ms", more["T_ms"], "ms", samples=1, note=f"{seen}; right after {what}")
        rps = answered / found["seconds"]
        throughput = {"gate.16x16": "gate.throughput_rps", "gate.16x1": "gate.throughput_rps.16x1"}
        report.add(throughput.get(name, f"{name}.rps"), rps, "requests/s", samples=answered, note=note)


def pass_times(host: Host) -> tuple[float, float]:
    """(seconds in batches, number of batches) so far."""
    found = counted(host, "hostd_batch_seconds_")
    return found["hostd_batch_seconds_sum"], found["hostd_batch_seconds_count"]


def pass_ms(host: Host) -> float:
    """The vault's own view: from asking to having the latest reading, of all components, added up."""
    status = host.status()
    assert status is not None
    return sum(component.cost_ms for component in status.components)


def memory(report: Report, host: Host) -> None:
    pids = {**host.pids(), "worker": host.workers()[0]}
    assert host.supervisor is not None
    pids["supervisor"] = host.supervisor.pid
    for role, pid in pids.items():
        rollup = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        )
        rss, pss = (int(rollup[name].split()[0]) / 1024 for name in ("Rss", "Pss"))
        note = "smaps_rollup after the loads above"
        report.add(f"role.rss_mb.{role}", rss, "MB", samples=1, note=note)
        report.add(f"role.pss_mb.{role}", pss, "MB", samples=1, note=note)


def imports(report: Report) -> None:
    rounds = 15

    def run(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-c", code], check=True)
        return (time.perf_counter() - started) * 1e3

    root = str(Path(__file__).resolve().parents[2])
    path = f"import sys; sys.path.append({root!r}); "
    bare = median([run("pass") for _ in range(rounds)])
    client = median([run(f"{path}import guestlib.client") for _ in range(rounds)])
    note = "fresh interpreter (-I), whole process, median"
    report.add(
        "guestlib.import_ms",
        client,
        "ms",
        samples=rounds,
        note=note,
        bare_ms=round(bare, 2),
        ratio=round(client / bare, 2),
    )


def start(report: Report, host: Host, rounds: int) -> None:
    """Stops and starts `hostd run` again and again."""
    opened, answered = [], []
    for _ in range(rounds):
        host.stop()
        began = time.perf_counter()
        host.start()
        host.wait_open()
        opened.append((time.perf_counter() - began) * 1e3)
        host.serves(host.client())
        answered.append((time.perf_counter() - began) * 1e3)
    note = "from `hostd run` (state there, root key sealed, swtpm started too), polled every 20 ms, median"
    report.add("start.open_ms", statistics.median(opened), "ms", samples=rounds, note=f"{note}: gate open")
    report.add(
        "start.ms", statistics.median(answered), "ms", samples=rounds, note=f"{note}: first answered request"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="length of each load (default: %(default)s)"
    )
    parser.add_argument("--only", choices=["measuring"], help="leave out everything else")
    arguments = parser.parse_args()
    seconds = arguments.seconds
    if os.geteuid() != 0:
        sys.exit("error: needs root: it reads the memory of a QEMU")
    report = Report()
    measuring.readings(report)
    measuring.log(report)
    if arguments.only:
        report.write()
        return
    with directory() as place:
        binary = copy_of_qemu(place)
        with machine(binary), adopted(binary, Settings()) as host:
            bundle = parse_bundle((host.directory / "trust.json").read_bytes())
            assert bundle.channel_ca is not None
            (host.directory / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(bundle.channel_ca))
            client = host.client()
            until(lambda: client.health().gate == "open", "the gate is open")
            measuring.idle(report, host)
            key = client.create_key().key.id
            gate(report, host, key, seconds)
            memory(report, host)
            start(report, host, 3)
        imports(report)
    lab.kernel(report)
    report.write()


if __name__ == "__main__":
    main()
