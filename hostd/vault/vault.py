"""The vault: the one process that holds keys, decides, and speaks to the TPM.

It wires together the gate, the measurer's readings, the TPM, the store and the ledger, and serves
the gateway, the operators and the metrics role on unix sockets of its own. It opens no network
socket and reads no guest's bytes.

Everything starts closed. The gate opens when the root key is unsealed, reference values are in force
and the measurer is connected, and even then only for requests whose own readings are good.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.attest.binding import evidence_qualifying
from guestlib.attest.evidence import Evidence, QuotedBytes, encode_evidence, encode_statement
from guestlib.errors import HostdError, RefusedDriftError, UnavailableError
from hostd.core.appraisal import Appraiser, Rules
from hostd.core.appraise_ima import Accepted
from hostd.core.findings import GUESTS, IMA, Component, Finding, Kind, Severity, Status, Verdict
from hostd.core.readings import GuestsReading, Reading
from hostd.core.reference import MalformedReferenceError, Reference, parse_reference, reference_digest
from hostd.ipc import operating
from hostd.ipc import operations as ops
from hostd.platform.secretmem import SecretBuffer
from hostd.platform.tpm_errors import TpmError, TpmPolicyError
from hostd.vault.batches import Batches, Job
from hostd.vault.channelca import ChannelCa, utc_now
from hostd.vault.channels import BrokerLink, WorkerChannel
from hostd.vault.counters import Counters
from hostd.vault.evidence import claims_for, pass_digest, spki_digest, statement_for
from hostd.vault.gate import Gate, Pass, Refused, Waiting
from hostd.vault.heads import Heads
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry, Ledger
from hostd.vault.measuring import Measuring
from hostd.vault.mint import Mint
from hostd.vault.primitives import IntegrityError
from hostd.vault.refusals import WINDOW_S, Refusals
from hostd.vault.service import Service
from hostd.vault.store import Store
from hostd.vault.tpmlink import Quoted, TpmLink

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.config import Config
    from hostd.core.callers import Caller
    from hostd.ipc import serving
    from hostd.ipc.loop import Loop

OBSERVE_SHARE: Final = 0.5
"""Of a request's deadline: how long evidence and health wait for fresh readings before they say how it
stands. (A VM's files are hashed whole when it is first seen, which takes a second or so.)"""
TICK_S: Final = 0.05
UNSEAL_RETRY_S: Final = 2.0
MUTATING: Final = (ops.CreateKey, ops.Rotate, ops.Shred)
UNGATED: Final = (ops.Health, ops.GetEvidence, ops.GetEvidenceLog)


class Vault:
    """The role. `shut_reasons` say why the gate is closed for all; empty is open (drift apart)."""

    def __init__(self, config: Config, loop: Loop) -> None:
        """Raises: StoreError, LedgerError, TpmError, ConfigError; nothing is served then."""
        self.config = config
        self.loop = loop
        self.counters = Counters()
        self.store = Store(config.state / "store.sqlite")
        self.ledger = Ledger(config.state / "ledger.jsonl")
        self.tpm = TpmLink(config, loop, self.counters)
        self.heads = Heads(config.state / "head.json")
        self.heads.check(self.ledger, self.tpm.record.ak_public)
        self.keyring = Keyring(self.store)
        self.mint = Mint(loop)
        self.service = Service(self.store, self.keyring, self.mint)
        self.reference: Reference | None = None
        self.reference_digest: bytes | None = None
        self._accepted: Accepted | None = None
        self._newly_accepted = False
        self._found_in_log: Accepted | None = None
        """The log as far as it was read when its drift was recorded: what an officer has seen of it."""
        self.channel_ca: ChannelCa | None = None
        self._channel_ca_digest = bytes(32)
        self._unsealing = False
        self.shut_reasons: dict[str, str] = {
            "keys": "the root key is not unsealed",
            "reference": "no reference values are in force",
            "measurer": "the measurer is not connected",
        }
        self.gate = Gate(
            require=frozenset(Component(Kind(k)) for k in config.measure.require),
            host_scope=config.drift.scope == "host",
            waiting_per_caller=config.gate.waiting_per_caller,
            batch=config.gate.batch,
        )
        self._apply_shut()
        self._restore_drift()
        self.refusals = Refusals(self.ledger, self.counters, self._ledger_failed)
        self.measuring = Measuring(
            loop,
            config.run / "measurer.sock",
            uid=config.uid_of("measurer"),
            deadline_s=config.measure.deadline_s,
            new_appraiser=self._new_appraiser,
            listener=self,
        )
        self.batches = Batches(
            gate=self.gate,
            measuring=self.measuring,
            tpm=self.tpm,
            ledger=self.ledger,
            heads=self.heads,
            store=self.store,
            counters=self.counters,
            evidence_digest=self._evidence_digest,
            found=self.found,
            shut=self._ledger_failed,
        )
        self.broker = BrokerLink(self, loop, config.run / "broker.sock", gateway_uid=config.uid_of("gateway"))
        self.record("start", detail="vault started")
        self.unseal()
        loop.every(TICK_S, self.kick)
        loop.every(WINDOW_S, self.refusals.close_window)

    # ── Small helpers ─────────────────────────────────────────────────────────────────────────────

    def record(self, event: str, *, outcome: str = "done", principal: str = "", detail: str = "") -> int:
        """A durable ledger entry of hostd's own or an officer's deed; its number.

        Raises:
            LedgerError: it could not be recorded (the gate is shut then).
        """
        seq = self.ledger.size
        entry = Entry(
            seq=seq,
            time=_utc_ms(),
            event=event,
            outcome=outcome,
            principal=principal,
            passed=self.gate.passes,
            detail=detail[:4000],
        )
        try:
            self.ledger.append(entry)
            self.ledger.sync()
        except HostdError as error:
            self._ledger_failed(error.message)
            raise
        return seq

    def _ledger_failed(self, reason: str) -> None:
        self.set_shut("ledger", reason)

    def set_shut(self, what: str, reason: str | None) -> None:
        """Sets or takes away one reason for which the gate is closed to all."""
        if reason is None:
            self.shut_reasons.pop(what, None)
        else:
            self.shut_reasons[what] = reason
        self._apply_shut()

    def _apply_shut(self) -> None:
        self.gate.shut = next(iter(self.shut_reasons.values()), None)

    def _new_appraiser(self) -> Appraiser | None:
        if self.reference is None:
            return None
        rules = Rules(
            allow_jit=self.config.hypervisor.allow_jit,
            protected=self.config.measure.protected,
            accepted=self._accepted,
        )
        return Appraiser(self.reference, rules)

    def _evidence_digest(self, passed: Pass) -> bytes:
        return pass_digest(passed, self.reference_digest or bytes(32), self._channel_ca_digest)

    # ── Keys: unsealing, locking, reference values ────────────────────────────────────────────────

    def unseal(self) -> None:
        """Asks the TPM for the root key, unless a drift of the host keeps the vault locked."""
        if self._unsealing or self.keyring.unlocked:
            return
        if self.gate.host_drifted():
            self.set_shut("keys", "locked after drift; an officer has to clear it")
            return
        self._unsealing = True
        self.tpm.unseal(self._on_unsealed)

    def _on_unsealed(self, result: SecretBuffer | TpmError) -> None:
        self._unsealing = False
        if isinstance(result, TpmError):
            self.set_shut("keys", f"the TPM does not unseal the root key: {result}")
            self.record("unseal", outcome="failed", detail=str(result))
            # A PCR that differs stays so until a reboot; a TPM that did not answer may come back.
            if not isinstance(result, TpmPolicyError):
                self.loop.call_after(UNSEAL_RETRY_S, self.unseal)
            return
        if self.gate.host_drifted():
            result.wipe()
            return
        self.keyring.unlock(result)
        try:
            if self.channel_ca is None:
                self.channel_ca = ChannelCa.load(self.store, self.keyring, utc_now())
                self._channel_ca_digest = spki_digest(self.channel_ca.certificate_der)
            self._keep_accepted()
            self._load_reference()
            self.store.commit()
        except (IntegrityError, MalformedReferenceError) as error:
            self.lock()
            self.set_shut("keys", f"the store is not this host's, or was altered: {error}")
            self.record("unseal", outcome="failed", detail=str(error))
            return
        self.mint.start()
        self.set_shut("keys", None)
        self.record("unseal", detail="root key unsealed")
        self.kick()

    def _load_reference(self) -> None:
        wrapped = self.store.meta("reference")
        if wrapped is not None and self.reference is None:
            self._use_reference(parse_reference(self.keyring.unwrap_service_key("reference", wrapped)))

    def _keep_accepted(self) -> None:
        """What officers have accepted of the IMA log survives a restart, under the keys."""
        name = "ima_accepted"
        if self._newly_accepted:
            body = msgspec.msgpack.encode(self._accepted)
            self.store.set_meta(name, self.keyring.wrap_service_key(name, body))
            self._newly_accepted = False
        elif (wrapped := self.store.meta(name)) is not None:
            body = self.keyring.unwrap_service_key(name, wrapped)
            self._accepted = msgspec.msgpack.decode(body, type=Accepted)

    def _use_reference(self, reference: Reference) -> None:
        self.reference = reference
        self.reference_digest = reference_digest(reference)
        self.set_shut("reference", None)
        self.measuring.restart()

    def install_reference(self, reference: Reference, document: bytes, officer: str) -> None:
        """Puts reviewed reference values into force.

        Raises:
            UnavailableError: the keys are locked (the document is stored under them).
        """
        digest = reference_digest(reference).hex()
        self.store.set_meta("reference", self.keyring.wrap_service_key("reference", document))
        self.record("baseline", principal=officer, detail=f"reference values {digest}")
        self.store.commit()
        self._use_reference(reference)

    def lock(self) -> None:
        """Keys leave memory. (The channel CA stays: a guest must be able to ask why.)"""
        self.keyring.lock()
        self.mint.stop()

    # ── Drift ─────────────────────────────────────────────────────────────────────────────────────

    def _restore_drift(self) -> None:
        for component, raw, _since, _ledger in self.store.drift():
            findings = msgspec.msgpack.decode(raw, type=tuple[Finding, ...])
            kind, _, vm = component.partition(":")
            self.gate.latch(Component(Kind(kind), vm), findings)

    def found(self, component: Component, findings: tuple[Finding, ...]) -> None:
        """A component has drifted: close, record, lock."""
        if component in self.gate.latched:
            return
        refused = self.gate.latch(component, findings)
        self._react(component, findings, refused)

    def _react(self, component: Component, findings: tuple[Finding, ...], refused: list[Refused]) -> None:
        if component == IMA and self.measuring.appraiser is not None:
            self._found_in_log = self.measuring.appraiser.ima.so_far
        for finding in findings:
            self.counters.count(
                "hostd_findings_total", kind=str(component.kind), code=finding.code, severity=finding.severity
            )
        if self.gate.host_drifted():
            self.lock()
            self.set_shut("keys", "locked after drift; an officer has to clear it")
        else:
            self.keyring.drop()
        try:
            seq = self.record("drift", outcome="refused", detail=" | ".join(map(str, findings)))
            self.store.put_drift(str(component), findings, _utc_ms(), seq)
            self.store.commit()
        except HostdError as error:
            self._ledger_failed(error.message)
        self._refuse(refused)

    def clear_drift(self, component: Component, reason: str, officer: str) -> bool:
        """An officer vouches for the component again; False if it had not drifted."""
        if component not in self.gate.latched:
            return False
        self.record("clear", principal=officer, detail=f"{component}: {reason}")
        self.store.clear_drift(str(component))
        self.store.commit()
        self.gate.clear(component)
        if component == IMA and self._found_in_log is not None:
            # What came after the finding was never shown to the officer, and is judged again.
            self._accepted, self._found_in_log = self._found_in_log, None
            self._newly_accepted = True
            if self.keyring.unlocked:
                self._keep_accepted()
                self.store.commit()
        # What was learnt of processes and files before the drift is no longer vouched for.
        self.measuring.restart()
        self.unseal()
        return True

    # ── The measurer's listener ───────────────────────────────────────────────────────────────────

    def measurer_ready(self) -> None:
        self.set_shut("measurer", None)
        self.kick()

    def measurer_lost(self, reason: str) -> None:
        self.set_shut("measurer", f"the measurer is not connected: {reason}")
        self.gate.lose_measurer()
        self.batches.abandon("the measurer was lost")
        self.counters.count("hostd_measurer_lost_total")

    def on_verdict(self, verdict: Verdict, reading: Reading, started: int, ended: int, cost_ns: int) -> None:
        kind = str(verdict.component.kind)
        self.counters.count("hostd_readings_total", kind=kind, status=str(verdict.status))
        self.counters.observe("hostd_reading_seconds", cost_ns / 1e9, kind=kind)
        if verdict.component == GUESTS and isinstance(reading, GuestsReading):
            self.gate.guests(h for h in reading.hypervisors if h.vm)
            self.broker.close_gone(self.gate.hypervisors)
        known = verdict.component in self.gate.latched
        refused = self.gate.judged(verdict, started=started, ended=ended)
        if verdict.status is Status.DRIFTED and not known:
            self._react(verdict.component, verdict.findings, refused)
        else:
            self._refuse(refused)
        for finding in verdict.findings:
            if finding.severity is Severity.WARNING:
                self.counters.count(
                    "hostd_findings_total", kind=kind, code=finding.code, severity=finding.severity
                )
        self.kick()

    def _refuse(self, refused: list[Refused]) -> None:
        for one in refused:
            self.refusals.refuse_waiting(one.request, one.error)

    # ── The channels' desk ────────────────────────────────────────────────────────────────────────

    def who(self, cid: int, pid: int, told: Callable[[Reading], None]) -> None:
        self.measuring.who(cid, pid, told)

    def identity(self) -> serving.ChannelIdentity:
        """Raises: UnavailableError, the keys have not been unsealed since the start."""
        if self.channel_ca is None:
            raise UnavailableError("the channel CA is not available")
        return self.channel_ca.issue(utc_now())

    def on_gone(self, caller: Caller) -> None:
        if all(c.closed or c.caller != caller for c in self.broker.channels):
            self.gate.leave(caller)

    def on_call(self, channel: WorkerChannel, call: serving.Call, arrived: int) -> None:
        """One request of a channel's caller."""
        operation, seq = call.operation, call.seq
        name = type(operation).__name__
        deadline_s = (call.deadline_ms / 1000) or self.config.gate.deadline_s
        deadline = arrived + int(min(deadline_s, self.config.gate.deadline_s) * 1e9)

        def refuse(error: HostdError) -> None:
            channel.refuse(seq, error)

        if isinstance(operation, UNGATED):
            self._on_ungated(channel, seq, operation, arrived)
            return
        job = Job(
            name=name,
            mutates=isinstance(operation, MUTATING),
            shreds=isinstance(operation, ops.Shred),
            run=lambda now: self.service.execute(channel.caller, operation, now),
            answer=lambda result, receipt: channel.answer(seq, result, receipt),
            refuse=refuse,
        )
        self.submit(channel.caller, job, arrived, deadline)

    def submit(self, caller: Caller, job: Job, arrived: int, deadline: int) -> None:
        """Puts a gated request before the gate."""
        try:
            self.gate.arrive(Waiting(caller, arrived, deadline, job))
        except HostdError as error:
            self.refusals.refuse(caller.principal, job.name, error, job.refuse)

    # ── What works while the gate is closed ───────────────────────────────────────────────────────

    def _on_ungated(
        self, channel: WorkerChannel, seq: int, operation: ops.UngatedOperation, arrived: int
    ) -> None:
        try:
            match operation:
                case ops.GetEvidenceLog():
                    log = self.measuring.ima_log
                    data = bytes(log[operation.offset : operation.offset + ops.IMA_CHUNK_BYTES])
                    channel.answer(seq, ops.EvidenceLogResult(data=data), None)
                case ops.Health():
                    self._observe(channel, arrived, lambda: self._answer_health(channel, seq))
                case ops.GetEvidence():
                    nonce = operation.nonce
                    self._observe(channel, arrived, lambda: self._answer_evidence(channel, seq, nonce))
        except HostdError as error:
            channel.refuse(seq, error)

    def _observe(self, channel: WorkerChannel, arrived: int, then: Callable[[], None]) -> None:
        until = arrived + int(OBSERVE_SHARE * self.config.gate.deadline_s * 1e9)
        self.gate.observe(Waiting(channel.caller, arrived, until, then))

    def _answer_health(self, channel: WorkerChannel, seq: int) -> None:
        caller = channel.caller
        shut, latched = self.gate.shut, self.gate.latched_for(caller)
        reason = RefusedDriftError.code if latched is not None else UnavailableError.code if shut else ""
        claims = {kind: str(status) for kind, status in claims_for(caller, self.gate).items()}
        result = ops.HealthResult(gate="closed" if reason else "open", reason=reason, components=claims)
        channel.answer(seq, result, None)

    def _answer_evidence(self, channel: WorkerChannel, seq: int, nonce: bytes) -> None:
        if self.channel_ca is None:
            channel.refuse(seq, UnavailableError("the keys have not been unsealed"))
            return
        statement = statement_for(
            channel.caller,
            nonce,
            now=utc_now(),
            gate=self.gate,
            measuring=self.measuring,
            ledger=self.ledger,
            tpm=self.tpm.record,
            channel_ca=self.channel_ca.certificate_der,
            reference=self.reference_digest,
        )

        def told(result: Quoted | TpmError) -> None:
            if isinstance(result, TpmError):
                channel.refuse(seq, UnavailableError("the TPM did not quote"))
            else:
                quote = QuotedBytes(result.quote.attest, result.quote.signature)
                document = encode_evidence(Evidence(statement, result.pcrs, quote))
                size = len(self.measuring.ima_log)
                channel.answer(seq, ops.EvidenceResult(evidence=document, log_bytes=size), None)
            self.kick()

        self.tpm.quote(evidence_qualifying(nonce, encode_statement(statement)), told)

    # ── The clockwork ─────────────────────────────────────────────────────────────────────────────

    def kick(self) -> None:
        """Moves everything that can move; called after anything happened."""
        now = time.monotonic_ns()
        self._refuse(self.gate.expired(now))
        for observer in self.gate.observed(now):
            assert callable(observer.item)
            observer.item()
        self.batches.confirm()
        self.batches.start()
        self._read()
        self.refusals.flush()
        self.broker.flush()

    def _read(self) -> None:
        """Keeps the measurer busy with what blocks waiting requests; else with the sweep."""
        while self.measuring.has_room:
            busy = self.measuring.busy
            now = time.monotonic_ns()
            component = self.gate.wanted(busy)
            if component is None and not busy:
                component = self.gate.stale(now, int(self.config.measure.sweep_s * 1e9), busy)
            if component is None:
                return
            self.gate.asked(component, now)
            self.measuring.ask(component)

    def status(self) -> operating.StatusReport:
        """How it stands, on one screen."""
        now = time.monotonic_ns()
        latched = self.gate.latched
        components = tuple(
            operating.ComponentLine(
                component=str(component),
                status=str(stamp.status),
                age_ms=(now - stamp.started) / 1e6,
                cost_ms=(stamp.ended - stamp.started) / 1e6,
                drifted=component in latched,
            )
            for component, stamp in sorted(self.gate.stamps.items())
        )
        drifted = ", ".join(map(str, latched))
        return operating.StatusReport(
            gate="closed" if self.gate.shut or self.gate.host_drifted() else "open",
            reason=f"drift of {drifted}" if drifted else self.gate.shut or "",
            passes=self.gate.passes,
            reference=(self.reference_digest or b"").hex(),
            components=components,
            keys_unlocked=self.keyring.unlocked,
            tpm=self.config.tpm.device,
            ledger_size=self.ledger.size,
            ledger_root=self.ledger.tree.root().hex(),
            keys=self.store.key_counts(),
            waiting=self.gate.waiting,
            channels=len(self.broker.channels),
        )

    def close(self) -> None:
        """An orderly end: nothing new, keys wiped, said in the ledger."""
        self.batches.abandon("the vault stops")
        self.lock()
        self.refusals.flush()
        self.broker.flush()
        self.record("stop", detail="vault stopped")
        self.heads.save()
        self.tpm.close()
        self.store.close()
        self.ledger.close()


def _utc_ms() -> int:
    return time.time_ns() // 1_000_000
