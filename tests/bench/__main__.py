"""`python -m tests.bench`: measures the readings (`tests.bench.measuring`), then a whole hostd with one QEMU.

Every figure says how it was taken. T, the time of one complete request-scoped pass of readings, is
taken in the same run, because a gated request cannot be answered faster. `--only` with `measuring`,
`ledger`, `gate` or `tpm` leaves out the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from guestlib.attest.bundle import parse_bundle
from tests.bench import chips, flood, gate, lab, ledger, measuring, receipts, starting, tpm
from tests.bench.report import Report, median
from tests.e2e.harness import Host, Settings, adopted, directory, machine, until
from tests.support.qemu import copy_of_qemu

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="length of each load (default: %(default)s)"
    )
    parser.add_argument(
        "--only", choices=["measuring", "ledger", "gate", "tpm"], help="leave out everything else"
    )
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
    if arguments.only in (None, "tpm"):
        trusting(report, arguments.seconds)
    if arguments.only is None:
        imports(report)
        lab.kernel(report)
    report.write()


@contextlib.contextmanager
def hosted(binary: Path) -> Iterator[Host]:
    """A whole hostd with one QEMU and an open gate, ready for `gate.run`."""
    with machine(binary), adopted(binary, Settings()) as host:
        bundle = parse_bundle((host.directory / "trust.json").read_bytes())
        (host.directory / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(bundle.channel_cas[0]))
        client = host.client()
        until(lambda: client.health().gate == "open", "the gate is open")
        yield host


def serving(report: Report, seconds: float, *, alone: bool) -> None:
    """A whole hostd with one QEMU; `alone`: the gate and nothing besides."""
    receipts.measure(report)
    with directory() as place:
        binary = copy_of_qemu(place)
        with hosted(binary) as host:
            if not alone:
                measuring.idle(report, host)
            key = host.client().create_key().key.id
            gate.measure(report, host, key, seconds, place)
            if not alone:
                memory(report, host)
        flood.fairness(report, binary)


def trusting(report: Report, seconds: float) -> None:
    """The TPM alone, and a whole hostd as it starts and with slower TPMs."""
    tpm.measure(report)
    with directory() as place, hosted(copy_of_qemu(place)) as host:
        key = host.client().create_key().key.id
        starting.measure(report, host)
        chips.measure(report, host, key, min(seconds, 3.0))


if __name__ == "__main__":
    main()
