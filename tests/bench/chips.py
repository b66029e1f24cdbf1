"""The gate with the TPMs that machines have: a whole hostd whose TPM answers as late as a published chip.

swtpm does the work, and answers are held back until the chip would have given them. The roles are the same
programs under the same supervisor; only the vault's process differs, whose link to the TPM waits. For the
benchmark alone, in a process of its own: `python -m tests.bench.chips run CONFIG` in place of `hostd run`;
the file `chip` beside CONFIG names the chip.

What is published is a P-256 signature, a key agreement and a short command (wolfTPM, docs/benchmarks.md:
averages of one board each); of the firmware TPM only the signature. A salted session is counted as one key
agreement, all else as short commands. The kernel's resource manager is counted too: around every command it
loads and saves each session and object that is open (drivers/char/tpm/tpm2-space.c).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostd.config import load_config
from hostd.vault import main as entry
from hostd.vault import tpmlink
from tests.bench import gate
from tests.bench.report import percentile
from tests.support import altered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.platform.tpm_tcti import Link
    from tests.bench.report import Report
    from tests.e2e.harness import Host

FILE: Final = "chip"
ALONE: Final = gate.Load("alone", 1, 1)
_SUCCESS: Final = bytes(4)
_SIGN: Final = frozenset({0x158, 0x15D})
"""TPM2_Quote, TPM2_Sign."""
_AGREE: Final = frozenset({0x176})
"""TPM2_StartAuthSession: hostd's are all salted."""
_OPEN: Final = frozenset({0x131, 0x157, 0x176})
"""TPM2_CreatePrimary, TPM2_Load, TPM2_StartAuthSession: one more session or object."""
_FLUSH: Final = 0x165


@dataclass(frozen=True, slots=True)
class Chip:
    """Milliseconds."""

    words: str
    sign: float
    agree: float
    short: float

    def takes(self, code: int, held: int) -> float:
        """Seconds for one command, with so many sessions and objects open."""
        own = self.sign if code in _SIGN else self.agree if code in _AGREE else self.short
        return (own + 2 * held * self.short) / 1e3


CHIPS: Final = {
    "swtpm": Chip("swtpm as it is", 0.0, 0.0, 0.0),
    # GetRandom: 24 KB in 1.07 s, 32 bytes a command.
    "slb9672": Chip("Infineon SLB9672, a discrete TPM (SPI, 43 MHz)", 35.6, 65.9, 1.4),
    # A key agreement is taken as its signature, a short command as the discrete chip's.
    "orin": Chip("NVIDIA Jetson Orin, a firmware TPM (OP-TEE)", 45.1, 45.1, 1.4),
}


class _Late:
    """A link that gives each answer when the chip would."""

    def __init__(self, link: Link, chip: Chip) -> None:
        self._link = link
        self._chip = chip
        self._held = 0
        self.managed = link.managed

    def exchange(self, command: bytes, deadline: float) -> bytes:
        began = time.monotonic()
        code = int.from_bytes(command[6:10], "big")
        answer = self._link.exchange(command, deadline)
        due = began + self._chip.takes(code, self._held)
        if answer[6:10] == _SUCCESS:
            self._held += (code in _OPEN) - (code == _FLUSH)
        time.sleep(max(0.0, due - time.monotonic()))
        return answer

    def close(self) -> None:
        self._link.close()


def measure(report: Report, host: Host, key: str, seconds: float) -> None:
    """Each chip in both modes of `gate.tpm`. Leaves the host stopped."""
    plain = host.settings
    for name, chip in CHIPS.items():
        for mode in ("quote", "read"):
            host.stop()
            host.settings = replace(plain, more=f'{plain.more}[gate]\ntpm = "{mode}"\n')
            with _serving(host, name):
                _rows(report, host, key, f"gate.chip.{name}.{mode}", chip, seconds)
    host.settings = plain
    host.write_config()


@contextlib.contextmanager
def _serving(host: Host, chip: str) -> Iterator[None]:
    host.write_config()
    host.config_path.with_name(FILE).write_text(chip)
    altered.start(host, "tests.bench.chips")
    host.wait_open()
    host.serves(host.client())
    yield
    host.stop()


def _rows(report: Report, host: Host, key: str, name: str, chip: Chip, seconds: float) -> None:
    gate.run(host, key, ALONE, 0.3)  # a worker, and a verdict on all that the client maps
    found = gate.run(host, key, ALONE, seconds)["latencies"]
    note = (
        f"one request at a time, {seconds:g} s; {chip.words}: signature {chip.sign:g} ms, key agreement "
        f"{chip.agree:g}, short command {chip.short:g} (published averages, not this machine's TPM)"
    )
    for point, share in (("p50", 0.5), ("p99", 0.99)):
        report.add(
            f"{name}.latency_ms.{point}", percentile(found, share), "ms", samples=len(found), note=note
        )
    full = gate.run(host, key, gate.SATURATED, seconds / 2)
    report.add(
        f"{name}.rps", len(full["latencies"]) / full["seconds"], "requests/s",
        samples=len(full["latencies"]), note=f"{gate.SATURATED.words}; {chip.words}",
    )  # fmt: skip


def _vault(config_path: Path) -> None:
    chip = CHIPS[config_path.with_name(FILE).read_text()]
    plain = tpmlink.open_link
    tpmlink.open_link = lambda device, socket=None: _Late(plain(device, socket), chip)
    entry.run(load_config(config_path))


if __name__ == "__main__":
    altered.main("tests.bench.chips", _vault)
