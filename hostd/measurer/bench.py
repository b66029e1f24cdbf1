"""What the readings cost, in process, for `make bench`.

`bench_readings` gives milliseconds, the median of many, for the hypervisor processes that run now;
`bench_started` starts some idle ones of its own first (`python -m hostd.measurer.bench 1`).
`pass.request_scoped_ms` is what one request of one VM waits for: the host's readings, the shared
files and its own process (docs/architecture.md). `naive_ms` is the plain way to the same knowledge:
SHA-256 over each process's mapped code and constants, read through /proc/PID/mem.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from typing import TYPE_CHECKING, Final

from hostd.config import Config, Hypervisor
from hostd.core.findings import Kind
from hostd.core.readings import FilesReading, ProcessReading
from hostd.ipc.measuring import Ask, AskFile
from hostd.measurer.probes import Measurer

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.readings import Hypervisor as HypervisorReading

QEMU: Final = "/usr/bin/qemu-system-x86_64"
MODULES: Final = "/usr/lib/x86_64-linux-gnu/qemu"
"""Where QEMU's modules are; a copied binary would look beside itself."""
SETTLE_S: Final = 2.0


class BenchError(Exception):
    """There is nothing to measure."""


def bench_readings(config: Config, *, rounds: int = 100) -> dict[str, float]:
    """Milliseconds of each reading, of a whole request-scoped pass, of a sweep over all VMs and of the
    naive way; and `vms`, `files`, `megabytes`.

    Raises:
        BenchError: no hypervisor process runs, or one cannot be read.
    """
    measurer = Measurer(config)
    try:
        return _bench(measurer, rounds)
    finally:
        measurer.close()


def _bench(measurer: Measurer, rounds: int) -> dict[str, float]:
    measurer.answer(Ask(0, Kind.GUESTS))
    vms = [guest.hypervisor for guest in measurer.guests.guests]
    if not vms:
        raise BenchError("no hypervisor process runs")
    first = vms[0].vm
    for vm in vms:
        reading = _process(measurer, vm)
        if not isinstance(reading, ProcessReading) or reading.altered_total:
            raise BenchError(f"pid {vm.pid} cannot be read, or is not as it should be")
    files = measurer.answer(Ask(0, Kind.FILES))
    if not isinstance(files, FilesReading):
        raise BenchError("the files cannot be read")
    numbers = {segment.file for segment in files.segments}
    started = time.perf_counter()
    for number in numbers:
        measurer.answer(AskFile(0, number))
    figures = {
        "vms": float(len(vms)),
        "files": float(len(numbers)),
        "megabytes": sum(segment.length for segment in files.segments) / 1e6,
        "identify_all_ms": (time.perf_counter() - started) * 1e3,
    }
    for kind in (Kind.GUESTS, Kind.POSTURE, Kind.IMA, Kind.FILES):
        figures[f"{kind}_ms"] = _median(lambda kind=kind: measurer.answer(Ask(0, kind)), rounds)  # type: ignore[misc]
    figures["process_ms"] = _median(lambda: measurer.answer(Ask(0, Kind.PROCESS, first)), rounds)

    def request_scoped() -> None:
        for kind in (Kind.GUESTS, Kind.POSTURE, Kind.IMA, Kind.FILES, Kind.PROCESS):
            measurer.answer(Ask(0, kind, first))

    figures["pass.request_scoped_ms"] = _median(request_scoped, rounds)

    def sweep() -> None:
        for kind in (Kind.GUESTS, Kind.POSTURE, Kind.IMA, Kind.FILES):
            measurer.answer(Ask(0, kind))
        for vm in vms:
            _process(measurer, vm)

    few = max(3, rounds // 10)
    figures["pass.sweep_ms"] = _median(sweep, few)
    figures["naive_ms"] = _median(lambda: _naive(measurer), 3)
    return figures


def bench_started(count: int, *, binary: str = QEMU, rounds: int = 100) -> dict[str, float]:
    """`bench_readings` with `count` idle machines started from a copy of `binary`, so that other hypervisor
    processes of this host are not in the figures."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copy(binary, directory)
        config = Config(hypervisor=Hypervisor(binaries=(copy,), provider="proc", allow_jit=True))
        arguments = [copy, "-accel", "tcg", "-machine", "none", "-S", "-display", "none", "-nodefaults"]
        started = [
            subprocess.Popen(
                [*arguments, "-uuid", str(uuid.uuid4())], env={**os.environ, "QEMU_MODULE_DIR": MODULES}
            )
            for _ in range(count)
        ]
        try:
            time.sleep(SETTLE_S)
            return bench_readings(config, rounds=rounds)
        finally:
            for process in started:
                process.kill()
                process.wait()


def _process(measurer: Measurer, hypervisor: HypervisorReading) -> object:
    return measurer.answer(Ask(0, Kind.PROCESS, hypervisor.vm))


def _median(work: Callable[[], object], rounds: int) -> float:
    took: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        took.append((time.perf_counter() - started) * 1e3)
    return statistics.median(took)


def _naive(measurer: Measurer) -> bytes:
    digest = hashlib.sha256()
    for guest in measurer.guests.guests:
        reading = measurer.processes.read(guest.hypervisor, guest.found.handle)
        memory = guest.found.handle.open("mem")
        try:
            for mapping in reading.mappings:
                if mapping.file is not None:
                    digest.update(os.pread(memory, mapping.end - mapping.start, mapping.start))
        finally:
            os.close(memory)
    return digest.digest()


if __name__ == "__main__":
    for name, value in bench_started(int(sys.argv[1]) if len(sys.argv) > 1 else 1).items():
        print(f"{name:28} {value:10.3f}")
