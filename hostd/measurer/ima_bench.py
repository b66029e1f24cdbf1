"""What the measurement log costs: the whole way from the file to the verdict, with a log of a given length.

The log is made here, in the kernel's format, and read as a file; the judge has reference values for
every entry. `make bench` reports the figures.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostd.core.appraise_ima import ImaLog
from hostd.core.findings import Status
from hostd.core.readings import ImaReading
from hostd.core.reference import Reference
from hostd.measurer.ima import ImaProbe

ENTRIES: Final = 100_000
"""What a host gathers in months; after boot it has some hundreds."""
IDLE_ROUNDS: Final = 200


@dataclass(frozen=True, slots=True)
class ImaCost:
    """Figures of one run."""

    entries: int
    first_s: float
    """Reading, parsing, judging and replaying all of them."""
    idle_us: float
    """A reading and its judgement when nothing came."""

    @property
    def replay_us_per_entry(self) -> float:
        return self.first_s * 1e6 / self.entries


def made_entry(path: str, digest: bytes) -> bytes:
    """An entry of template `ima-sig` without a signature, as the kernel writes it."""
    fields = (b"sha256:\0" + digest, path.encode() + b"\0", b"")
    body = b"".join(struct.pack("<I", len(field)) + field for field in fields)
    head = struct.pack("<I", 10) + hashlib.sha1(body).digest() + struct.pack("<I", 7) + b"ima-sig"  # noqa: S324
    return head + struct.pack("<I", len(body)) + body


def measure(entries: int = ENTRIES) -> ImaCost:
    """Runs it once.

    Raises:
        RuntimeError: the judge does not find the log good.
    """
    files: dict[str, tuple[str, ...]] = {}
    log: list[bytes] = []
    for number in range(entries):
        path, digest = f"/usr/lib/x86_64-linux-gnu/part/file{number}.so", hashlib.sha256(b"%d" % number)
        files[path] = (digest.hexdigest(),)
        log.append(made_entry(path, digest.digest()))
    reference = Reference(format="hostd-reference/2", version=1, created=0, host="bench", files=files)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "log"
        file.write_bytes(b"".join(log))
        probe, judge = ImaProbe(file), ImaLog(("/usr/",))
        try:
            return _measure(probe, judge, reference, entries)
        finally:
            probe.close()


def _measure(probe: ImaProbe, judge: ImaLog, reference: Reference, entries: int) -> ImaCost:
    began = time.perf_counter()
    status = _follow(probe, judge, reference)
    first = time.perf_counter() - began
    if status is not Status.VERIFIED or judge.entries != entries or judge.matches(judge.pcr10) is None:
        raise RuntimeError("the log was not found good")
    began = time.perf_counter()
    for _ in range(IDLE_ROUNDS):
        _follow(probe, judge, reference)
    return ImaCost(entries, first, (time.perf_counter() - began) * 1e6 / IDLE_ROUNDS)


def _follow(probe: ImaProbe, judge: ImaLog, reference: Reference) -> Status:
    while True:
        reading = probe.read(judge.position)
        if not isinstance(reading, ImaReading):
            raise RuntimeError(reading.reason)
        verdict = judge.appraise(reading, reference)
        if not reading.more:
            return verdict.status
