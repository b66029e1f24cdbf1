"""What the TPM costs, and what verifying a host's evidence costs whoever asks for it.

A real embedded TPM behind the same code as the vault's: each figure is a call of `hostd.platform.tpm` from
outside, with every command that it sends (a PCR selection over eight is read in two). Evidence is verified in
all the steps of `guestlib.attest.verifier`: endorsement, quote, PCRs and the replay of the measurement log.
"""

from __future__ import annotations

import datetime
import ssl
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from guestlib.attest.evidence import Status
from guestlib.attest.verifier import verify_evidence
from hostd.config import Tpm as Settings
from hostd.core.findings import Kind
from hostd.platform import swtpm
from tests.attest.support_evidence import NONCE, NOW, Host, certificate, ima_entry
from tests.bench.report import percentile
from tests.support.receipts import embedded_tpm

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.platform.tpm import Tpm
    from tests.bench.report import Report

ROUNDS: Final = 300
ENTRIES: Final = 1000
SELECTION: Final = (*Settings().pcrs, 10)
"""What the vault has quoted when nothing else is configured."""


def measure(report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="hostd-bench-") as name, embedded_tpm(Path(name)) as tpm:
        _commands(report, tpm)
        _evidence(report, tpm, Path(name) / "tpm" / swtpm.CA_FILE)


def _timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Milliseconds of each call, ascending, after one that is not counted."""
    work()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append((time.perf_counter() - began) * 1e3)
    return sorted(found)


def _add(report: Report, name: str, found: list[float], note: str, **more: float) -> None:
    report.add(
        name, percentile(found, 0.5), "ms", samples=len(found), note=note,
        p99=round(percentile(found, 0.99), 3), **more,
    )  # fmt: skip


def _commands(report: Report, tpm: Tpm) -> None:
    where = f"swtpm, {len(SELECTION)} PCRs, median and p99"
    quotes = _timed(lambda: tpm.quote(bytes(32), SELECTION), ROUNDS)
    both = _timed(lambda: tpm.quote_with_pcrs(bytes(32), SELECTION), ROUNDS)
    _add(
        report, "tpm.quote_ms", quotes, f"TPM2_Quote, ECDSA P-256; with_pcrs: as a batch asks, "
        f"with the values it signs; {where}", with_pcrs=round(percentile(both, 0.5), 3),
    )  # fmt: skip
    blob = tpm.seal(bytes(32), tpm.read_pcrs(Settings().pcrs))
    # Wiped at once, as the vault does when it has moved the secret into its own memory.
    unsealed = _timed(lambda: tpm.unseal(blob).clear(), ROUNDS)
    _add(report, "tpm.unseal_ms", unsealed, f"load, salted policy session, PolicyPCR, Unseal, flush; {where}")
    _add(
        report, "tpm.pcr_read_ms", _timed(lambda: tpm.read_pcrs(SELECTION), ROUNDS),
        f"TPM2_PCR_Read, plain; {where}",
    )  # fmt: skip
    _add(
        report, "tpm.pcr_read_ms.authenticated", _timed(lambda: tpm.check_pcrs(SELECTION), ROUNDS),
        f'in a standing salted session, as gate.tpm = "read" has each batch; {where}',
    )  # fmt: skip


def _evidence(report: Report, tpm: Tpm, ek_root: Path) -> None:
    log = b""
    for number in range(ENTRIES):
        entry, extends = ima_entry(f"/usr/lib/x86_64-linux-gnu/library-{number}.so")
        log += entry
        tpm.extend(10, extends)
    key = ec.generate_private_key(ec.SECP256R1())
    ca = certificate("channel CA", key, "channel CA", key, ca=True, end=NOW + datetime.timedelta(days=1))
    host = Host(tpm, ssl.PEM_cert_to_DER_cert(ek_root.read_text()), log, ENTRIES, key, ca)
    claims = dict.fromkeys(map(str, Kind), Status.VERIFIED)
    document = host.evidence(claims=claims, selection=SELECTION)
    bundle = host.bundle(require=frozenset(claims))
    note = f"{len(claims)} claims, EK certificate, {len(SELECTION)} PCRs"
    report.add(
        "evidence.bytes", len(document), "bytes", samples=1, log_bytes=len(log),
        note=f"the document, {note}; log_bytes: the measurement log of {ENTRIES} entries beside it",
    )  # fmt: skip

    def verify(with_log: bytes | None) -> None:
        verify_evidence(document, with_log, bundle=bundle, nonce=NONCE, now=NOW)

    found = _timed(lambda: verify(log), ROUNDS)
    bundle = host.bundle(require=frozenset(claims) - {"ima"})
    bare = _timed(lambda: verify(None), ROUNDS)
    _add(
        report, "evidence.verify_ms", found, f"guestlib, every step, {ENTRIES} entries of the log; {note}; "
        "median and p99; without_log: the same without a log", without_log=round(percentile(bare, 0.5), 3),
    )  # fmt: skip
