"""What the vault asks of the TPM: unseal the root key, quote, and whether the sealed PCRs still stand.

Commands run in the TPM's own thread (`hostd.platform.tpm_worker`); answers come back in the loop's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guestlib.attest.imalog import PCR as IMA_PCR
from guestlib.attest.quote import attestation_key, verify_quote
from guestlib.attest.tpm2 import parse_public
from guestlib.errors import MalformedError, VerificationError
from hostd.platform.secretmem import SecretBuffer
from hostd.platform.tpm import open_tpm
from hostd.platform.tpm_errors import TpmError, TpmIdentityError
from hostd.platform.tpm_files import parse_blob, parse_record, read_file
from hostd.platform.tpm_tcti import open_link
from hostd.platform.tpm_worker import Priority, TpmWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.config import Config
    from hostd.ipc.loop import Loop
    from hostd.platform.tpm import Quote, Tpm
    from hostd.platform.tpm_worker import Job
    from hostd.vault.counters import Counters


@dataclass(frozen=True, slots=True)
class Quoted:
    """A quote and the PCR values that it signs."""

    quote: Quote
    pcrs: dict[int, bytes]


class TpmLink:
    """The vault's TPM, with this host's identity record and sealed root key."""

    def __init__(self, config: Config, loop: Loop, counters: Counters) -> None:
        """Raises: TpmError, the record or the sealed key cannot be read."""
        self._deadline_s = config.tpm.deadline_s
        self._counters = counters
        self.record = parse_record(read_file(config.state / "tpm.json"))
        self._blob = parse_blob(read_file(config.state / "root.json"))
        self._ak = attestation_key(parse_public(self.record.ak_public))
        self._sealed_to = self._blob.values()
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
                result = error
            told(result)

        try:
            self._worker.submit(priority, work, done, within_s=self._deadline_s)
        except TpmError as error:
            told(error)

    def unseal(self, told: Callable[[SecretBuffer | TpmError], None]) -> None:
        """The root key, moved into protected memory inside the TPM's thread.

        A PCR that differs from the sealed value is a `TpmPolicyError` that names it.
        """
        blob = self._blob
        self._submit(
            Priority.UNSEAL,
            lambda tpm: SecretBuffer.taking(tpm.unseal(blob)),
            told,  # type: ignore[arg-type]
        )

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

    def differing(self, pcrs: dict[int, bytes]) -> list[tuple[int, bytes, bytes]]:
        """Sealed PCRs whose quoted value is another: (index, sealed value, quoted value)."""
        return [(i, v, pcrs[i]) for i, v in sorted(self._sealed_to.items()) if pcrs[i] != v]

    @property
    def sealed_to(self) -> dict[int, bytes]:
        return dict(self._sealed_to)

    def close(self) -> None:
        self._loop.forget(self._worker)
        self._worker.stop(1.0)
