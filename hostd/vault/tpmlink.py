"""What the vault asks of the TPM: unseal the root key, quote, whether the sealed PCRs still stand, and that
it unseal no more.

Commands run in the TPM's own thread (`hostd.platform.tpm_worker`); answers come back in the loop's.
"""

from __future__ import annotations

import hashlib
import select
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.attest.hostcert import read_host_certificate
from guestlib.attest.imalog import PCR as IMA_PCR
from guestlib.attest.quote import attestation_key, verify_quote
from guestlib.attest.tpm2 import parse_public
from guestlib.errors import MalformedError, VerificationError
from hostd.core.reacting import RuleError, check_poison_pcr
from hostd.platform.secretmem import SecretBuffer
from hostd.platform.tpm import open_tpm
from hostd.platform.tpm_errors import TpmBlobError, TpmError, TpmIdentityError, TpmPoisonError
from hostd.platform.tpm_files import parse_blob, parse_record, read_file, write_file
from hostd.platform.tpm_tcti import open_link
from hostd.platform.tpm_worker import Priority, TpmWorker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guestlib.attest.credential import Credential
    from hostd.config import Config
    from hostd.ipc.loop import Loop
    from hostd.platform.tpm import Quote, Tpm
    from hostd.platform.tpm_files import TpmRecord
    from hostd.platform.tpm_worker import Job
    from hostd.vault.counters import Counters

POISON: Final = hashlib.sha256(b"hostd poison v1").digest()
"""What the poison PCR is extended by, so that whoever sees its value can tell what it means."""


@dataclass(frozen=True, slots=True)
class Quoted:
    """A quote and the PCR values that it signs."""

    quote: Quote
    pcrs: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class PcrsRead:
    """PCR values that the pinned TPM authenticated to us (`Tpm.check_pcrs`); nobody else can verify them."""

    pcrs: dict[int, bytes]


class TpmLink:
    """The vault's TPM, with this host's identity record and sealed root key."""

    def __init__(self, config: Config, loop: Loop, counters: Counters) -> None:
        """Raises: TpmError, the record, the sealed key or the host certificate cannot be read or is another
        host's, or the root key is not sealed to the poison PCR."""
        self._deadline_s = config.tpm.deadline_s
        self._counters = counters
        self.record = parse_record(read_file(config.state / "tpm.json"))
        self._blob = parse_blob(read_file(config.state / "root.json"))
        self._certificate_path = config.state / "host.pem"
        self.host_certificate = _load_certificate(self._certificate_path, self.record)
        """What a provider says of the attestation key, DER; None if it said nothing. It may be over."""
        self._ak = attestation_key(parse_public(self.record.ak_public))
        self._sealed_to = self._blob.values()
        self._poison_pcr = config.drift.poison_pcr
        if self._poison_pcr is not None:
            try:
                check_poison_pcr(self._poison_pcr, self._sealed_to)
            except RuleError as error:
                raise TpmPoisonError(str(error)) from error
        self.selection = tuple(sorted({*self._sealed_to, IMA_PCR}))
        device, socket_path = config.tpm.device, config.run / "swtpm.sock"
        self._worker = TpmWorker(
            lambda: open_tpm(lambda: open_link(device, socket_path), self.record, command_s=self._deadline_s)
        )
        self._loop = loop
        loop.watch(self._worker, self._worker.dispatch)

    def _submit(
        self, priority: Priority, work: Callable[[Tpm], object], told: Callable[[object | TpmError], None]
    ) -> None:
        def done(job: Job[object]) -> None:
            result: object | TpmError
            try:
                result = job.result()
            except TpmError as error:
                self._counters.count("hostd_tpm_errors_total", kind=type(error).__name__)
                result = error.with_traceback(None)  # else a cycle, with `told` and what hangs on it
            told(result)

        try:
            self._worker.submit(priority, work, done, within_s=self._deadline_s)
        except TpmError as error:
            told(error)

    def unseal(self, told: Callable[[SecretBuffer | TpmError], None]) -> None:
        """The root key, moved into protected memory inside the TPM's thread.

        A PCR that differs from the sealed value is a `TpmPolicyError` that names it; a poison PCR of no use
        is a `TpmPoisonError`.
        """
        blob, poison_pcr = self._blob, self._poison_pcr

        def work(tpm: Tpm) -> SecretBuffer:
            if poison_pcr is not None:
                tpm.check_poison(poison_pcr)
            return SecretBuffer.taking(tpm.unseal(blob))

        self._submit(Priority.UNSEAL, work, told)  # type: ignore[arg-type]

    def poison(self, told: Callable[[str | TpmError], None]) -> None:
        """Extends the poison PCR, before all else that waits for the TPM: it unseals the root key no more
        until the machine is reset. Tells what was done. Doing it again changes nothing."""
        pcr = self._poison_pcr
        if pcr is None:
            told(TpmPoisonError("no poison PCR is configured"))
            return
        sealed = self._sealed_to[pcr]

        def work(tpm: Tpm) -> str:
            if tpm.read_pcrs((pcr,))[pcr] != sealed:
                return f"PCR {pcr} had been extended before"
            tpm.extend(pcr, POISON)
            if tpm.read_pcrs((pcr,))[pcr] == sealed:
                raise TpmIdentityError(f"PCR {pcr} was extended, and did not change")
            return f"PCR {pcr} extended: the TPM unseals no more before a reset"

        self._submit(Priority.POISON, work, told)  # type: ignore[arg-type]

    def quote(
        self,
        qualifying: bytes,
        told: Callable[[Quoted | TpmError], None],
        *,
        priority: Priority = Priority.QUOTE,
    ) -> None:
        """A quote over the sealed PCRs and PCR 10, verified: signed by this host's AK, over this
        qualifying data and these values. Whatever sits between us and the TPM can delay it, not make it.
        """
        selection = self.selection
        asked = time.monotonic()

        def work(tpm: Tpm) -> Quoted:
            try:
                quoted = Quoted(*tpm.quote_with_pcrs(qualifying, selection))
                verify_quote(self._ak, quoted.quote.attest, quoted.quote.signature, qualifying, quoted.pcrs)
            except (VerificationError, MalformedError) as error:
                raise TpmIdentityError(f"the quote is not this host's: {error}") from error
            return quoted

        def timed(result: object) -> None:
            self._counters.observe("hostd_tpm_quote_seconds", time.monotonic() - asked)
            told(result)  # type: ignore[arg-type]

        self._submit(priority, work, timed)

    def activate(self, credential: Credential, told: Callable[[bytes | TpmError], None]) -> None:
        """The secret of a credential for this host's attestation key."""
        self._submit(Priority.OTHER, lambda tpm: tpm.activate(credential), told)  # type: ignore[arg-type]

    def install_certificate(self, der: bytes) -> None:
        """Stores a host certificate that the caller has checked.

        Raises:
            OSError: it cannot be written; the one before is still there.
        """
        write_file(self._certificate_path, ssl.DER_cert_to_PEM_cert(der).encode())
        self.host_certificate = der

    def check(self, told: Callable[[PcrsRead | TpmError], None]) -> None:
        """The sealed PCRs and PCR 10, read in an authenticated session."""
        selection = self.selection
        asked = time.monotonic()

        def timed(result: object) -> None:
            self._counters.observe("hostd_tpm_read_seconds", time.monotonic() - asked)
            told(result)  # type: ignore[arg-type]

        self._submit(Priority.QUOTE, lambda tpm: PcrsRead(tpm.check_pcrs(selection)), timed)

    def differing(self, pcrs: dict[int, bytes]) -> list[tuple[int, bytes, bytes]]:
        """Sealed PCRs whose quoted value is another: (index, sealed value, quoted value)."""
        return [(i, v, pcrs[i]) for i, v in sorted(self._sealed_to.items()) if pcrs[i] != v]

    @property
    def sealed_to(self) -> dict[int, bytes]:
        return dict(self._sealed_to)

    def settle(self, done: Callable[[], bool]) -> None:
        """At the end, when the loop turns no more: what comes back from the TPM is told until `done`, for as
        long as one job may take."""
        deadline = time.monotonic() + self._deadline_s
        while not done() and (left := deadline - time.monotonic()) > 0:
            select.select([self._worker], [], [], left)
            self._worker.dispatch()

    def close(self) -> None:
        self._loop.forget(self._worker)
        self._worker.stop(1.0)


def _load_certificate(path: Path, record: TpmRecord) -> bytes | None:
    """Raises: TpmBlobError, it is not a host certificate of these keys."""
    if not path.exists():
        return None
    try:
        der = ssl.PEM_cert_to_DER_cert(read_file(path).decode("ascii"))
        read_host_certificate(der).check_keys(record.ak_public, record.ek_public)
    except (ValueError, VerificationError) as error:
        raise TpmBlobError(f"{path}: {error}; remove it, or install one for this host") from error
    return der
