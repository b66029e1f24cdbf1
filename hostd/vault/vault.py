"""The vault: the one process that holds keys, decides, and speaks to the TPM.

It wires together the gate, the measurer's readings, the TPM, the store and the ledger, and serves
the gateway, the operators and the metrics role on unix sockets of its own. It opens no network
socket and reads no guest's bytes.

Everything starts closed. The gate opens when the root key is unsealed, reference values are in force
and the measurer is connected, and even then only for requests whose own readings are good.
"""

from __future__ import annotations

import time
from random import SystemRandom
from typing import TYPE_CHECKING, Final

from guestlib.errors import DeniedError, HostdError
from hostd.core.findings import GUESTS, Component, Finding, Kind, Severity, Status, Verdict
from hostd.core.readings import GuestsReading, Reading
from hostd.ipc import operations as ops
from hostd.vault.allowance import Allowance
from hostd.vault.attesting import Attesting
from hostd.vault.batches import Batches
from hostd.vault.channels import BrokerLink, WorkerChannel
from hostd.vault.checkpoints import Checkpoints
from hostd.vault.cost import FULL_RECEIPT
from hostd.vault.counters import Counters
from hostd.vault.custody import Custody
from hostd.vault.drift import Drift
from hostd.vault.evidence import pass_digest
from hostd.vault.gate import Gate
from hostd.vault.heads import Heads
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry, Ledger
from hostd.vault.measuring import Measuring
from hostd.vault.membership import Membership
from hostd.vault.mint import Mint
from hostd.vault.receipts import Receipts
from hostd.vault.recording import Job, Recorder
from hostd.vault.refusals import WINDOW_S, Refusals
from hostd.vault.ring import PENDING_PAUSE_NS, draw
from hostd.vault.service import Service
from hostd.vault.store import Store
from hostd.vault.tpmlink import TpmLink
from hostd.vault.waiting import Judged, Pass, Refused, Waiting
from hostd.vault.witness import OBSERVE_SHARE, UNGATED, Witness

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.config import Config
    from hostd.core.callers import Caller
    from hostd.core.reference import Reference
    from hostd.ipc import serving
    from hostd.ipc.loop import Loop

TICK_S: Final = 0.05
STANDING_SWEEPS: Final = 4
"""A standing reading that is older, in sweeps, when a request arrives, is read again for it."""
MUTATING: Final = (ops.CreateKey, ops.Rotate, ops.Shred)


class Vault:
    """The role. `shut_reasons` say why the gate is closed for all; empty is open (drift apart)."""

    def __init__(self, config: Config, loop: Loop) -> None:
        """Raises: StoreError, LedgerError, TpmError, ConfigError; nothing is served then."""
        self.config = config
        self.loop = loop
        self.counters = Counters()
        self.store = Store(config.state / "store.sqlite")
        self.tpm = TpmLink(config, loop, self.counters)
        self.heads = Heads(config.state / "head.json")
        self.ledger = Ledger(config.state / "ledger.jsonl", self.heads.load(self.tpm.record.ak_public))
        self.keyring = Keyring(self.store)
        self.checkpoints = Checkpoints(
            config.state / "checkpoint",
            self.keyring,
            store_id=self.store.store_id,
            ak_public=self.tpm.record.ak_public,
        )
        self.heads.saved = self.checkpoints.save
        self.mint = Mint(loop)
        self.membership = Membership(self.store, self.keyring)
        self.service = Service(self.store, self.keyring, self.mint, self.membership)
        self.shut_reasons: dict[str, str] = {
            "keys": "the root key is not unsealed",
            "reference": "no reference values are in force",
            "measurer": "the measurer is not connected",
        }
        self.gate = Gate(
            require=frozenset(map(Kind, config.measure.require)),
            host_scope=config.drift.scope == "host",
            waiting_per_caller=config.gate.waiting_per_caller,
            batch=config.gate.batch,
            sweep_ns=int(config.measure.sweep_s * 1e9),
            standing_ns=STANDING_SWEEPS * int(config.measure.sweep_s * 1e9),
        )
        self.last: dict[Component, Judged] = {}
        """How each component was judged last. For people: the gate keeps its own stamps."""
        self._apply_shut()
        self.custody = Custody(
            self,
            config,
            loop,
            gate=self.gate,
            store=self.store,
            keyring=self.keyring,
            mint=self.mint,
            tpm=self.tpm,
            last=self.ledger.last,
        )
        self.measuring = Measuring(
            loop,
            config.run / "measurer.sock",
            uid=config.uid_of("measurer"),
            deadline_s=config.measure.deadline_s,
            log_attested=config.tpm.device.startswith("/dev/"),
            new_appraiser=self.custody.new_appraiser,
            listener=self,
        )
        self.drift = Drift(
            self,
            loop,
            config.drift,
            gate=self.gate,
            store=self.store,
            ledger=self.ledger,
            keyring=self.keyring,
            custody=self.custody,
            counters=self.counters,
            tpm=self.tpm,
            power=self.measuring.suspend,
        )
        self.drift.restore(self.ledger.open_drift)
        self.refusals = Refusals(self.ledger, self.counters, self._ledger_failed)
        self.receipts = Receipts(
            ledger=self.ledger,
            heads=self.heads,
            keyring=self.keyring,
            membership=self.membership,
            gate=self.gate,
            allowance=Allowance(),
            unsettled=lambda: self.batches.unsettled,
        )
        self.attesting = Attesting(
            self.tpm, loop, self.heads, self.ledger, config.gate, found=self.found, shut=self._ledger_failed
        )
        self.batches = Batches(
            gate=self.gate,
            measuring=self.measuring,
            tpm=self.attesting,
            ledger=self.ledger,
            heads=self.heads,
            recorder=Recorder(self.ledger, self.keyring, self.membership),
            receipts=self.receipts,
            store=self.store,
            counters=self.counters,
            evidence_digest=self._evidence_digest,
            found=self.found,
            shut=self._ledger_failed,
        )
        self.witness = Witness(
            gate=self.gate,
            measuring=self.measuring,
            custody=self.custody,
            ledger=self.ledger,
            tpm=self.tpm,
            receipts=self.receipts,
            wait_s=OBSERVE_SHARE * config.gate.deadline_s,
            kick=self.kick,
        )
        self.broker = BrokerLink(self, loop, config.run / "broker.sock", gateway_uid=config.uid_of("gateway"))
        self.custody.channel.changed = self.broker.renew
        self._awake = loop.call_after(0.0, self.kick)
        self.record("start", detail="vault started")
        self.drift.go_on()
        self.custody.unseal()
        loop.every(TICK_S, self.kick)
        loop.every(WINDOW_S, self.refusals.close_window)
        self._chance = SystemRandom()
        self._await_chance()

    # ── Small helpers ─────────────────────────────────────────────────────────────────────────────

    def record(
        self, event: str, *, outcome: str = "done", principal: str = "", subject: str = "", detail: str = ""
    ) -> int:
        """A durable ledger entry of hostd's own or an officer's deed; its number.

        Raises:
            LedgerError: it could not be recorded (the gate is shut then).
        """
        entry = Entry(
            seq=self.ledger.size,
            time=time.time_ns() // 1_000_000,
            event=event,
            outcome=outcome,
            principal=principal,
            op=subject,
            passed=self.gate.passes,
            detail=detail[:4000],
        )
        try:
            self.ledger.append(entry)
            self.ledger.sync()
        except HostdError as error:
            self._ledger_failed(error.message)
            raise
        return entry.seq

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

    def _evidence_digest(self, passed: Pass) -> bytes:
        return pass_digest(passed, self.custody.reference_digest, self.custody.channel.digest)

    def new_reference(self) -> None:
        """Other reference values are in force: everything is judged anew."""
        self.measuring.restart()

    def judge_by(self, reference: Reference) -> None:
        """Some digests have retired: everything that is read from now on is judged without them."""
        if self.measuring.appraiser is not None:
            self.measuring.appraiser.reference = reference

    # ── Drift ─────────────────────────────────────────────────────────────────────────────────────

    def found(self, component: Component, findings: tuple[Finding, ...]) -> None:
        """The pipeline found a drift that no reading shows (a PCR, a log that does not replay)."""
        if component not in self.gate.latched:
            refused = self.gate.latch(component, findings)
            self.drift.react(component, findings, self.measuring)
            self._refuse(refused)

    # ── The measurer's listener ───────────────────────────────────────────────────────────────────

    def measurer_ready(self) -> None:
        self.set_shut("measurer", None)
        self.kick()

    def measurer_lost(self, reason: str) -> None:
        self.set_shut("measurer", f"the measurer is not connected: {reason}")
        self.gate.lose_measurer()
        self.last.clear()
        self.batches.abandon("the measurer was lost")
        self.counters.count("hostd_measurer_lost_total")

    def on_verdict(self, verdict: Verdict, reading: Reading, started: int, ended: int, cost_ns: int) -> None:
        kind = str(verdict.component.kind)
        self.counters.count("hostd_readings_total", kind=kind, status=str(verdict.status))
        self.counters.observe("hostd_reading_seconds", cost_ns / 1e9, kind=kind)
        if verdict.component == GUESTS and isinstance(reading, GuestsReading):
            self.gate.guests(h for h in reading.hypervisors if h.vm)
            # Also of a VM that was started again: what was read was of another process.
            for component in [c for c in self.last if c.vm and c not in self.gate.stamps]:
                del self.last[component]
            self.broker.close_gone(self.gate.hypervisors)
        if verdict.component in self.gate.known:
            self.last[verdict.component] = Judged(verdict, started, ended, cost_ns)
        known = verdict.component in self.gate.latched
        refused = self.gate.judged(verdict, started=started, ended=ended)
        if verdict.status is Status.DRIFTED and not known:
            self.drift.react(verdict.component, verdict.findings, self.measuring)
        else:
            self.drift.judged(verdict, self.found, self.measuring)
        self._refuse(refused)
        for finding in verdict.findings:
            if finding.severity is Severity.WARNING:
                self.counters.count(
                    "hostd_findings_total", kind=kind, code=finding.code, severity=finding.severity
                )
        self.kick()

    def on_hint(self, component: Component) -> None:
        self.counters.count("hostd_hints_total", kind=str(component.kind))
        self.gate.hint(component)
        self._read()

    def _read_at_random(self) -> None:
        """Has a component read that nobody waits for, and draws the moment of the next."""
        component = draw(self.gate.known, self._chance)
        self.counters.count("hostd_random_readings_total", kind=str(component.kind))
        self.gate.hint(component)
        self._read()
        self._await_chance()

    def _await_chance(self) -> None:
        gap = self._chance.expovariate(1 / self.config.measure.random_s)
        self.loop.call_after(gap, self._read_at_random)

    def _refuse(self, refused: list[Refused]) -> None:
        for one in refused:
            self.refusals.refuse_waiting(one.request, one.error)

    # ── The channels' desk ────────────────────────────────────────────────────────────────────────

    def who(self, cid: int, pid: int, told: Callable[[Reading], None]) -> None:
        self.measuring.who(cid, pid, told)

    def identity(self) -> serving.ChannelIdentity:
        return self.custody.channel.identity()

    def on_gone(self, caller: Caller) -> None:
        if all(c.closed or c.caller != caller for c in self.broker.channels):
            self.gate.leave(caller)

    def on_call(self, channel: WorkerChannel, call: serving.Call, arrived: int) -> None:
        """One request of a channel's caller."""
        operation, seq = call.operation, call.seq
        name = type(operation).__name__
        deadline_s = (call.deadline_ms / 1000) or self.config.gate.deadline_s
        deadline = arrived + int(min(deadline_s, self.config.gate.deadline_s) * 1e9)

        told = call.receipt != "none"

        def refuse(error: HostdError) -> None:
            channel.refuse(seq, error, named=told)

        if isinstance(operation, UNGATED):
            self.witness.on_call(channel, seq, operation, arrived)
            return
        job = Job(
            name=name,
            mutates=isinstance(operation, MUTATING),
            shreds=isinstance(operation, ops.Shred),
            run=lambda now: self.service.execute(channel.caller, operation, now),
            answer=lambda result, receipt: channel.answer(seq, result, receipt if told else None),
            refuse=refuse,
            operation=operation,
            full=call.receipt == "full",
        )
        if self.gate.shut is None and self.store.binding(channel.caller.principal) is None:
            # Here, and not only when it executes: a caller who is nobody's must not cost an entry each time.
            stranger = DeniedError("this caller belongs to no tenant")
            self.refusals.refuse(channel.caller.principal, name, stranger, refuse)
            return
        cost = self.service.cost(channel.caller, operation) + (FULL_RECEIPT if job.full else 0)
        self.submit(channel.caller, job, arrived, deadline, cost)

    def submit(self, caller: Caller, job: Job, arrived: int, deadline: int, cost: int = 1) -> None:
        """Puts a gated request before the gate."""
        try:
            self.gate.arrive(Waiting(caller, arrived, deadline, job, cost))
        except HostdError as error:
            self.refusals.refuse(caller.principal, job.name, error, job.refuse)

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
        """Keeps the measurer busy: with what blocks waiting requests, and with the background."""
        while self.measuring.has_room:
            component = self.gate.next_reading(time.monotonic_ns(), self.measuring.takes)
            if component is None:
                if self.gate.ring.soon and not self._awake.pending:
                    self._awake = self.loop.call_after(PENDING_PAUSE_NS / 1e9, self.kick)
                return
            self.measuring.ask(component)

    def close(self) -> None:
        """An orderly end: nothing new, keys wiped, said in the ledger."""
        self.batches.abandon("the vault stops")
        self.attesting.finish()
        try:
            self.heads.save()  # Before the keys go: one of them signs the checkpoint.
        finally:
            self.custody.lock()
        self.refusals.flush()
        self.refusals.close_window()
        self.broker.flush()
        self.record("stop", detail="vault stopped")
        self.tpm.close()
        self.store.close()
        self.ledger.close()
