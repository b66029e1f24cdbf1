"""What the TPM says of each batch: signed, or read.

`gate.tpm = "quote"`: every batch has a quote of its own, over the PCRs and the ledger's head with its
entries. `gate.tpm = "read"`, for chips whose signature takes long: every batch has the PCRs read, in a
session that only the pinned TPM can answer (`Tpm.check_pcrs`), and a quote over the head of the latest batch
follows every `gate.quote_every_s`. The tree is append-only, so that one quote covers every batch before it. A
batch is released under the same checks of the same PCRs either way; what waits for the next quote is the
proof of it to others: receipts and the signed head.

A TPM that reads and no longer signs must not go on so: when the quote is overdue by as much again, batches
are answered only with a quote of their own, until one was made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.attest.binding import pass_qualifying
from guestlib.errors import HostdError
from hostd.core.codes import Code
from hostd.core.findings import BOOT, Finding, Severity
from hostd.platform.tpm_errors import TpmError
from hostd.platform.tpm_worker import Priority
from hostd.vault.tpmlink import PcrsRead, Quoted, TpmLink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hostd.config import Gate
    from hostd.core.findings import Component
    from hostd.ipc.loop import Loop
    from hostd.vault.heads import Heads
    from hostd.vault.ledger import Ledger

OVERDUE: Final = 2.0
"""Times `quote_every_s`: from then on no batch is answered without a quote of its own."""


@dataclass(frozen=True, slots=True)
class Signing:
    """What a quote of a batch signs: its pass and evidence digest, and the ledger's head with its entries."""

    passed: int
    digest: bytes
    size: int
    root: bytes

    @property
    def qualifying(self) -> bytes:
        return pass_qualifying(self.passed, self.digest, self.size, self.root)


class Attesting:
    """Asks the TPM for batches."""

    def __init__(
        self,
        tpm: TpmLink,
        loop: Loop,
        heads: Heads,
        ledger: Ledger,
        settings: Gate,
        *,
        found: Callable[[Component, tuple[Finding, ...]], None],
        shut: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tpm = tpm
        self._loop = loop
        self._heads = heads
        self._ledger = ledger
        self._mode = settings.tpm
        self._every_s = settings.follows_s
        self._found = found
        self._shut = shut
        self._now = now
        self._uncovered: Signing | None = None
        """The latest batch of which no quote tells."""
        self._since = 0.0
        """When the first such batch was asked for, seconds."""
        self._signed = 0
        """Size of the largest head that a quote told of."""
        self._waiting = False
        """Whether the quote that follows is due at some time, or being made."""

    def differing(self, pcrs: dict[int, bytes]) -> list[tuple[int, bytes, bytes]]:
        return self._tpm.differing(pcrs)

    def attest(self, signing: Signing, told: Callable[[Quoted | PcrsRead | TpmError], None]) -> None:
        """The PCRs for a batch: `Quoted` over `signing`, or `PcrsRead`."""
        if self._mode == "quote":
            self._tpm.quote(signing.qualifying, told)
            return
        if self._uncovered is None:
            self._since = self._now()
        self._uncovered = signing
        if self._now() - self._since >= OVERDUE * self._every_s:

            def quoted(result: Quoted | TpmError) -> None:
                if isinstance(result, Quoted) and self._ledger.durable >= signing.size:
                    # Noted here: the batch may have been abandoned meanwhile, and others wait for this quote.
                    self._covered(signing)
                    self._note(signing, result)
                told(result)

            self._tpm.quote(signing.qualifying, quoted)
            return
        self._tpm.check(told)
        if not self._waiting:
            self._waiting = True
            self._loop.call_after(self._every_s, self._follow)

    def finish(self) -> None:
        """At an orderly end: the quote that would have followed is made now, if the TPM still makes it."""
        signing = self._uncovered
        if signing is None or self._ledger.durable < signing.size:
            return
        ended: list[object] = []

        def told(result: Quoted | TpmError) -> None:
            ended.append(result)
            self._on_quote(signing, result)

        self._tpm.quote(signing.qualifying, told)
        self._tpm.settle(lambda: bool(ended))

    def _follow(self) -> None:
        """The quote that follows."""
        signing = self._uncovered
        if signing is None or self._ledger.durable < signing.size:
            # What could not be written is cut off again; the next vault would miss what a head has of it.
            self._uncovered, self._waiting = None, False
            return
        self._tpm.quote(
            signing.qualifying, lambda result: self._on_quote(signing, result), priority=Priority.OTHER
        )

    def _on_quote(self, signing: Signing, result: Quoted | TpmError) -> None:
        self._waiting = False
        if isinstance(result, Quoted):
            # A batch that was signed itself may have overtaken this one: the head never goes back.
            if signing.size > self._signed:
                self._covered(signing)
                self._note(signing, result)
            if differing := self.differing(result.pcrs):
                self._found(BOOT, pcr_findings(differing))
        if self._uncovered is not None:
            self._waiting = True
            self._loop.call_after(self._every_s, self._follow)

    def _note(self, signing: Signing, quoted: Quoted) -> None:
        try:
            self._heads.note(
                size=signing.size,
                root=signing.root,
                passed=signing.passed,
                evidence_digest=signing.digest,
                quoted=quoted,
            )
        except HostdError as error:
            self._shut(error.message)

    def _covered(self, signing: Signing) -> None:
        self._signed = signing.size
        if self._uncovered is signing:
            self._uncovered = None
        else:
            self._since = self._now()


def pcr_findings(differing: Iterable[tuple[int, bytes, bytes]]) -> tuple[Finding, ...]:
    """Sealed PCRs that hold something else, as findings of `boot`."""
    return tuple(
        Finding(
            component=str(BOOT),
            code=Code.PCR_CHANGED.value,
            severity=Severity.CRITICAL,
            subject=f"PCR {pcr}",
            expected=expected.hex(),
            seen=seen.hex(),
        )
        for pcr, expected, seen in differing
    )
