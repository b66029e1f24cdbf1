"""What the readings cost, in process, for `make bench`.

`python -m hostd.measurer.bench BINARY ROUNDS` measures the hypervisor processes of `BINARY` that run now and
prints one JSON object: milliseconds, each the median of many rounds. It is a process of its own, with
what the measurer role has in it, so that its memory is the measurer's.

- `request_scoped_ms`: what one request of one VM waits for: every reading of the host but the kernel's, and
  every reading of that VM (docs/architecture.md);
- `sweep_ms`: every reading of the host but the kernel's, and of every VM;
- `naive_ms`: the plain way to a part of the same knowledge, SHA-256 over each process's mapped code and
  constants, read through /proc/PID/mem;
- `bandwidth_gbps`: how fast this machine reads memory (memchr over 256 MiB, the better of one and
  two threads): the bound that no way of reading content can pass.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import statistics
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from hostd.config import Config, Hypervisor
from hostd.core.findings import VM_KINDS, Kind
from hostd.core.readings import FilesReading, Missing, ProcessReading
from hostd.ipc.measuring import Ask, AskFile
from hostd.measurer.probes import Measurer
from hostd.measurer.relro_modules import KEEP_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.readings import Reading

BANDWIDTH_BYTES: Final = 256 << 20
NAIVE_BYTES: Final = 1 << 20
READY_S: Final = 30.0
"""For a probe that works something out first (relocations, identities)."""
HOST_KINDS: Final = tuple(kind for kind in Kind if kind not in VM_KINDS and kind is not Kind.KERNEL)


class BenchError(Exception):
    """There is nothing to measure."""


def bench_readings(config: Config, *, rounds: int = 100) -> dict[str, float]:
    """The figures above, `reading.<kind>_ms` for every kind that this host has, `vms`, `files`,
    `megabytes`, `identify_all_ms`, and of this process `private_mb`, `private_clean_mb`, `rss_mb`.

    Raises:
        BenchError: no hypervisor process runs, or one cannot be read.
    """
    measurer = Measurer(config)
    try:
        return _Bench(measurer, rounds).figures()
    finally:
        measurer.close()


class _Bench:
    def __init__(self, measurer: Measurer, rounds: int) -> None:
        self._measurer = measurer
        self._rounds = rounds
        measurer.answer(Ask(0, Kind.GUESTS))
        self._vms = [guest.hypervisor.vm for guest in measurer.guests.guests]
        if not self._vms:
            raise BenchError("no hypervisor process runs")
        self._kinds: list[Kind] = []

    def figures(self) -> dict[str, float]:
        figures = self._identify()
        self._kinds = [kind for kind in Kind if self._ready(kind)]
        first = self._vms[0]
        for kind in self._kinds:
            figures[f"reading.{kind}_ms"] = _median(lambda kind=kind: self._ask(kind, first), self._rounds)  # type: ignore[misc]
        if Kind.KERNEL in self._kinds:
            figures["kernel_ms"] = figures.pop("reading.kernel_ms")
            self._kinds.remove(Kind.KERNEL)
        figures["request_scoped_ms"] = _median(self._request_scoped, self._rounds)
        few = max(5, self._rounds // len(self._vms))
        began = time.process_time()
        figures["sweep_ms"] = _median(self._sweep, few)
        figures["sweep_cpu_ms"] = (time.process_time() - began) / few * 1e3
        # What is kept for processes that start is given back by then.
        time.sleep(KEEP_S)
        self._ask(Kind.GUESTS, "")
        figures |= _memory()
        figures["naive_ms"] = _median(self._naive, 3 if len(self._vms) < 50 else 1)
        figures["bandwidth_gbps"] = _bandwidth()
        return figures

    def _ask(self, kind: Kind, vm: str) -> Reading:
        return self._measurer.answer(Ask(0, kind, vm if kind in VM_KINDS else ""))

    def _identify(self) -> dict[str, float]:
        for vm in self._vms:
            reading = self._ask(Kind.PROCESS, vm)
            if not isinstance(reading, ProcessReading) or reading.altered_total:
                raise BenchError(f"{vm} cannot be read, or is not as it should be: {reading}")
        files = self._ask(Kind.FILES, "")
        if not isinstance(files, FilesReading):
            raise BenchError("the files cannot be read")
        numbers = {segment.file for segment in files.segments}
        began = time.perf_counter()
        for number in numbers:
            self._measurer.answer(AskFile(0, number))
        return {
            "vms": float(len(self._vms)),
            "files": float(len(numbers)),
            "megabytes": sum(segment.length for segment in files.segments) / 1e6,
            "identify_all_ms": (time.perf_counter() - began) * 1e3,
        }

    def _ready(self, kind: Kind) -> bool:
        """Whether this host has such readings; waits until they are there, of every VM."""
        until = time.monotonic() + READY_S
        for vm in self._vms if kind in VM_KINDS else [""]:
            while isinstance(reading := self._ask(kind, vm), Missing):
                if reading.absent or time.monotonic() > until:
                    return False
                time.sleep(0.01)
        return True

    def _request_scoped(self) -> None:
        for kind in self._kinds:
            if kind not in VM_KINDS:
                self._ask(kind, "")
        self._pair(self._vms[0])

    def _sweep(self) -> None:
        """In the vault's order: the components of one VM together, of which two are asked for at once."""
        for kind in self._kinds:
            if kind not in VM_KINDS:
                self._ask(kind, "")
        for vm in self._vms:
            self._pair(vm)

    def _pair(self, vm: str) -> None:
        taken = time.monotonic_ns()
        for kind in self._kinds:
            if kind in VM_KINDS:
                self._measurer.answer(Ask(0, kind, vm), taken)

    def _naive(self) -> None:
        digest = hashlib.sha256()
        # One buffer for all: allocating would cost more than reading.
        buffer = memoryview(mmap.mmap(-1, NAIVE_BYTES))
        for guest in self._measurer.guests.guests:
            reading = self._measurer.processes.read(guest.hypervisor, guest.found.handle)
            memory = guest.found.handle.open("mem")
            try:
                for mapping in reading.mappings:
                    if mapping.file is None:
                        continue
                    for start in range(mapping.start, mapping.end, NAIVE_BYTES):
                        size = min(NAIVE_BYTES, mapping.end - start)
                        digest.update(buffer[: os.preadv(memory, [buffer[:size]], start)])
            finally:
                os.close(memory)


def _median(work: Callable[[], object], rounds: int) -> float:
    took: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        took.append((time.perf_counter() - started) * 1e3)
    return statistics.median(took)


def _memory() -> dict[str, float]:
    """Megabytes of memory that belongs to this process (Private_Dirty of smaps_rollup: all that it has
    written, its buffers among them), of files' pages that no other process maps at this moment
    (Private_Clean: the page cache's, which has them anyway), and Rss."""
    with open("/proc/self/smaps_rollup") as lines:
        sizes = {
            name: int(rest.split()[0]) / 1024
            for name, _, rest in (line.partition(":") for line in lines)
            if rest
        }
    return {
        "private_mb": sizes["Private_Dirty"],
        "private_clean_mb": sizes["Private_Clean"],
        "rss_mb": sizes["Rss"],
    }


def _bandwidth() -> float:
    """GB/s of reading memory that no cache holds."""
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    with mmap.mmap(-1, BANDWIDTH_BYTES) as memory:
        whole = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(whole)
        ctypes.memset(address, 1, BANDWIDTH_BYTES)
        half = BANDWIDTH_BYTES // 2

        def two() -> None:
            other = threading.Thread(target=libc.memchr, args=(address, 0, half))
            other.start()
            libc.memchr(address + half, 0, half)
            other.join()

        took = min(
            _median(lambda: libc.memchr(address, 0, BANDWIDTH_BYTES), 7),
            _median(two, 7),
        )
        del whole
    return BANDWIDTH_BYTES / took / 1e6


if __name__ == "__main__":
    # What the role has loaded beside the readings, and how it uses memory.
    from hostd.measurer.hints import process_events
    from hostd.measurer.main import give_memory_back

    give_memory_back()
    process_events()
    configured = Config(hypervisor=Hypervisor(binaries=(sys.argv[1],), provider="proc", allow_jit=True))
    print(json.dumps(bench_readings(configured, rounds=int(sys.argv[2]))))
