"""The operations that pass no gate.

Health and evidence must work while it is closed, to say why: they touch no key, wait a little for fresh
readings, good or bad, and then say how it stands. Receipts and the audit log speak of what was measured
when it happened.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from guestlib.attest.binding import evidence_qualifying
from guestlib.attest.evidence import Evidence, QuotedBytes, encode_evidence, encode_statement
from guestlib.errors import HostdError, OverloadedError, RefusedDriftError, UnavailableError
from hostd.ipc import operations as ops
from hostd.ipc.fields import IMA_CHUNK_BYTES
from hostd.platform.tpm_errors import TpmError
from hostd.platform.tpm_worker import Priority
from hostd.vault.channelca import utc_now
from hostd.vault.evidence import claims_for, statement_for
from hostd.vault.gate import Gate
from hostd.vault.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.callers import Caller
    from hostd.vault.channels import WorkerChannel
    from hostd.vault.custody import Custody
    from hostd.vault.ledger import Ledger
    from hostd.vault.measuring import Measuring
    from hostd.vault.receipts import Receipts
    from hostd.vault.tpmlink import Quoted, TpmLink

OBSERVE_SHARE: Final = 0.5
"""Of a request's deadline: how long fresh readings are waited for. (A VM's files are hashed whole when
it is first seen, which takes a second or so.)"""
MAX_QUOTING: Final = 32
"""Evidence documents of one caller that wait for the TPM. It is asked for one of each caller at a time: a
quote may take half a second, and nobody waits for more than one of each other's."""
UNGATED: Final = (ops.Health, ops.GetEvidence, ops.GetEvidenceLog, ops.GetReceipt, ops.GetAuditLog)


class Witness:
    """Answers the operations that pass no gate."""

    def __init__(
        self,
        *,
        gate: Gate,
        measuring: Measuring,
        custody: Custody,
        ledger: Ledger,
        tpm: TpmLink,
        receipts: Receipts,
        wait_s: float,
        kick: Callable[[], None],
    ) -> None:
        self._gate = gate
        self._measuring = measuring
        self._custody = custody
        self._ledger = ledger
        self._tpm = tpm
        self._receipts = receipts
        self._wait_ns = int(wait_s * 1e9)
        self._kick = kick
        self._quoting: dict[Caller, deque[tuple[WorkerChannel, int, Callable[[], None]]]] = {}
        """Callers for whom the TPM is being asked, and who of theirs is next."""

    def on_call(
        self, channel: WorkerChannel, seq: int, operation: ops.UngatedOperation, arrived: int
    ) -> None:
        """Takes one request; the answer may come later."""
        try:
            match operation:
                case ops.GetEvidenceLog():
                    log = self._measuring.ima_log
                    data = bytes(log[operation.offset : operation.offset + IMA_CHUNK_BYTES])
                    channel.answer(seq, ops.EvidenceLogResult(data=data), None)
                case ops.GetReceipt():
                    found = self._receipts.redeem(channel.caller, operation.ledger, arrived)
                    channel.answer(seq, found, None)
                case ops.GetAuditLog():
                    channel.answer(seq, self._receipts.audit(channel.caller, operation, arrived), None)
                case ops.Health():
                    self._observe(channel, arrived, lambda: self._health(channel, seq, arrived))
                case ops.GetEvidence():
                    nonce = operation.nonce
                    self._observe(channel, arrived, lambda: self._evidence(channel, seq, nonce, arrived))
        except HostdError as error:
            channel.refuse(seq, error)

    def _observe(self, channel: WorkerChannel, arrived: int, then: Callable[[], None]) -> None:
        self._gate.observe(Waiting(channel.caller, arrived, arrived + self._wait_ns, then))

    def _health(self, channel: WorkerChannel, seq: int, asked: int) -> None:
        caller = channel.caller
        latched = self._gate.latched_for(caller)
        reason = ""
        if latched is not None:
            reason = RefusedDriftError.code
        elif self._gate.shut is not None:
            reason = UnavailableError.code
        claims = {kind: str(status) for kind, status in claims_for(caller, self._gate, asked).items()}
        result = ops.HealthResult(gate="closed" if reason else "open", reason=reason, components=claims)
        channel.answer(seq, result, None)

    def _evidence(self, channel: WorkerChannel, seq: int, nonce: bytes, asked: int) -> None:
        waiting = self._quoting.get(channel.caller)
        if waiting is None:
            self._quoting[channel.caller] = deque()
            self._quote(channel, seq, nonce, asked)
        elif len(waiting) < MAX_QUOTING - 1:
            waiting.append((channel, seq, lambda: self._quote(channel, seq, nonce, asked)))
        else:
            channel.refuse(seq, OverloadedError("too many requests for evidence are waiting"))

    def _quoted(self, caller: Caller, *, failed: bool) -> None:
        """The next of the caller's; if the TPM failed, none of those that wait."""
        waiting = self._quoting[caller]
        while failed and waiting:
            channel, seq, _ = waiting.popleft()
            channel.refuse(seq, UnavailableError("the TPM did not quote"))
        if waiting:
            waiting.popleft()[2]()
        else:
            del self._quoting[caller]

    def _quote(self, channel: WorkerChannel, seq: int, nonce: bytes, asked: int) -> None:
        custody = self._custody
        ca = custody.channel.ca
        if ca is None:
            channel.refuse(seq, UnavailableError("the keys have not been unsealed"))
            self._quoted(channel.caller, failed=False)
            return
        statement = statement_for(
            channel.caller,
            nonce,
            asked=asked,
            now=utc_now(),
            gate=self._gate,
            measuring=self._measuring,
            ledger=self._ledger,
            tpm=self._tpm.record,
            host_certificate=self._tpm.host_certificate,
            channel_ca=ca.certificate_der,
            reference=None if custody.reference is None else custody.reference_digest,
        )

        def told(result: Quoted | TpmError) -> None:
            if isinstance(result, TpmError):
                channel.refuse(seq, UnavailableError("the TPM did not quote"))
            else:
                quote = QuotedBytes(result.quote.attest, result.quote.signature)
                document = encode_evidence(Evidence(statement, result.pcrs, quote))
                size = len(self._measuring.ima_log)
                channel.answer(seq, ops.EvidenceResult(evidence=document, log_bytes=size), None)
            self._quoted(channel.caller, failed=isinstance(result, TpmError))
            self._kick()

        # After the batches': evidence must not hold up answers.
        qualifying = evidence_qualifying(nonce, encode_statement(statement))
        self._tpm.quote(qualifying, told, priority=Priority.OTHER)
