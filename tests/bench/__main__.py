"""`python -m tests.bench`: measures the readings (`tests.bench.measuring`), then a whole hostd with one QEMU.

Every figure says how it was taken. T, the time of one complete request-scoped pass of readings, is
taken in the same run, because a gated request cannot be answered faster. `--only measuring` and
`--only ledger` leave out the rest, and so does `--only gate`.
"""

from __future__ import annotations

import argparse
import os
import ssl
import statistics
import subprocess
import sys
import time
from pathlib import Path

from guestlib.attest.bundle import parse_bundle
from tests.bench import flood, gate, lab, ledger, measuring, receipts
from tests.bench.report import Report, median
from tests.e2e.harness import Host, Settings, adopted, directory, machine, until
from tests.support.qemu import copy_of_qemu


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
    parser.add_argument("--only", choices=["measuring", "ledger", "gate"], help="leave out everything else")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("error: needs root: it reads the memory of a QEMU")
    report = Report()
    if arguments.only in (None, "measuring"):
        measuring.readings(report)
        measuring.log(report)
    if arguments.only in (None, "ledger"):
        ledger.ledger(report)
    if arguments.only in (None, "gate"):
        serving(report, arguments.seconds, alone=arguments.only is not None)
    if arguments.only is None:
        imports(report)
        lab.kernel(report)
    report.write()


def serving(report: Report, seconds: float, *, alone: bool) -> None:
    """A whole hostd with one QEMU; `alone`: the gate and nothing besides."""
    receipts.measure(report)
    with directory() as place:
        binary = copy_of_qemu(place)
        with machine(binary), adopted(binary, Settings()) as host:
            bundle = parse_bundle((host.directory / "trust.json").read_bytes())
            assert bundle.channel_ca is not None
            (host.directory / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(bundle.channel_ca))
            client = host.client()
            until(lambda: client.health().gate == "open", "the gate is open")
            if not alone:
                measuring.idle(report, host)
            key = client.create_key().key.id
            gate.measure(report, host, key, seconds, place)
            if not alone:
                memory(report, host)
                start(report, host, 3)
        flood.fairness(report, binary)


if __name__ == "__main__":
    main()
