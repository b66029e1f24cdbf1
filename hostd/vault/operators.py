"""The operators' socket: hostctl's commands, each by an officer whom the kernel names by uid.

Commands that change who may do what wait at the gate like a guest's request. Those that explain a
closed gate or mend it do not; they are recorded all the same.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from guestlib.attest.bundle import TrustBundle, encode_bundle
from guestlib.errors import HostdError, NotFoundError, UnavailableError
from hostd.core.callers import Caller, host_principal, vm_principal
from hostd.core.findings import Component, Kind, process_of
from hostd.ipc import enrolling as enr
from hostd.ipc import operating as adm
from hostd.ipc.channel import Channel, ChannelError
from hostd.ipc.channel_ca import ChannelCommand
from hostd.ipc.connect import accept, listen
from hostd.ipc.manifest_status import ManifestStatus
from hostd.ipc.serving import Fault, Receipt, Reply
from hostd.vault import manifests, standing
from hostd.vault.baseline import Capture
from hostd.vault.channelkeeper import ChannelKeeper
from hostd.vault.done import Done
from hostd.vault.enrolment import EnrolmentDesk
from hostd.vault.explain import explain, finding_lines
from hostd.vault.gate import ALWAYS
from hostd.vault.ledgerdesk import LedgerDesk
from hostd.vault.recording import Job
from hostd.vault.waiting import Waiting

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from hostd.ipc.loop import Loop
    from hostd.vault.vault import Vault

MAX_CONNECTIONS: Final = 16


class _Connection:
    def __init__(self, channel: Channel[adm.Command], officer: Caller) -> None:
        self.channel = channel
        self.officer = officer
        self.closed = False


def _channel(sock: socket.socket) -> Channel[adm.Command]:
    limit, queue = adm.MAX_RECORD_BYTES, adm.MAX_QUEUED_BYTES
    return Channel(sock, adm.Command, max_record=limit, max_sent=limit, max_queued=queue)


class Operators:
    """Serves `admin.sock`."""

    def __init__(self, vault: Vault, loop: Loop, path: Path, *, uids: frozenset[int]) -> None:
        self._vault = vault
        self._loop = loop
        self._uids = uids
        self._connections: set[_Connection] = set()
        # Mode 0666: the uid that the kernel gives decides, and it is checked before a byte is read.
        self._listener = listen(path, mode=0o666)
        loop.watch(self._listener, self._on_accept)
        self._desk = LedgerDesk(vault.ledger, vault.heads, vault.checkpoints, loop, vault.record)
        self._enrolment = EnrolmentDesk(vault.tpm, vault.record)
        self._desk.sweep(lambda reason: vault.set_shut("ledger", reason))
        self._immediate: dict[type, Callable[[_Connection, int, Any], None]] = {
            adm.ListTenants: self._list_tenants,
            adm.ListVms: self._list_vms,
            adm.ListKeys: self._list_keys,
            adm.Status: self._status,
            adm.Measure: self._measure,
            adm.CaptureManifest: self._capture,
            adm.InstallManifest: self._install,
            adm.ShowManifest: self._show_manifest,
            ManifestStatus: self._manifest_status,
            adm.ListDrift: self._list_drift,
            adm.ClearDrift: self._clear_drift,
            **dict.fromkeys(LedgerDesk.COMMANDS, self._on_ledger),
            **dict.fromkeys(EnrolmentDesk.COMMANDS, self._on_enrolment),
            **dict.fromkeys(ChannelKeeper.COMMANDS, self._on_channel),
            adm.TrustBundle: self._trust_bundle,
        }
        self._gated: dict[type, Callable[[Any, int], Done]] = {
            adm.CreateTenant: self._create_tenant,
            adm.SetOnDrift: self._set_on_drift,
            adm.BindVm: lambda c, now: self._bind(vm_principal(c.vm), c.tenant, now),
            adm.UnbindVm: lambda c, _now: self._unbind(vm_principal(c.vm)),
            adm.BindUser: lambda c, now: self._bind(host_principal(c.uid), c.tenant, now),
            adm.UnbindUser: lambda c, _now: self._unbind(host_principal(c.uid)),
        }

    # ── Connections ───────────────────────────────────────────────────────────────────────────────

    def _on_accept(self, _events: int) -> None:
        accepted = accept(self._listener)
        if accepted is None:
            return
        sock, peer = accepted
        if peer.uid not in self._uids or len(self._connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        connection = _Connection(_channel(sock), Caller(uid=peer.uid, officer=True))
        self._connections.add(connection)
        self._loop.watch(connection.channel, lambda _events: self._on_events(connection))

    def _on_events(self, connection: _Connection) -> None:
        try:
            connection.channel.flush()
            records = connection.channel.receive()
            arrived = time.monotonic_ns()
            for record in records:
                self._on_command(connection, record, arrived)
            self._watch(connection)
        except ChannelError:
            self._close(connection)
        self._vault.kick()

    def _watch(self, connection: _Connection) -> None:
        if not connection.closed:
            self._loop.watch(
                connection.channel,
                lambda _events: self._on_events(connection),
                write=connection.channel.wants_write,
            )

    def _close(self, connection: _Connection) -> None:
        if not connection.closed:
            connection.closed = True
            self._connections.discard(connection)
            self._loop.forget(connection.channel)
            connection.channel.close()

    def _send(self, connection: _Connection, record: object) -> None:
        if connection.closed:
            return
        try:
            connection.channel.send(record)
        except ChannelError:
            self._close(connection)
            return
        self._watch(connection)

    def _answer(
        self, connection: _Connection, seq: int, result: object, receipt: Receipt | None = None
    ) -> None:
        self._send(connection, Reply(seq, msgspec.msgpack.encode(result), receipt))

    def _refuse(self, connection: _Connection, seq: int, error: HostdError) -> None:
        self._send(connection, Fault(seq, error.code, error.message[:512], error.ledger))

    # ── Dispatch ──────────────────────────────────────────────────────────────────────────────────

    def _on_command(self, connection: _Connection, record: adm.Command, arrived: int) -> None:
        command, seq = record.command, record.seq
        immediate = self._immediate.get(type(command))
        if immediate is not None:
            try:
                immediate(connection, seq, command)
            except HostdError as error:
                self._refuse(connection, seq, error)
            return
        run = self._gated[type(command)]
        job = Job(
            name=type(command).__name__,
            mutates=True,
            shreds=False,
            run=lambda now: run(command, now),
            answer=lambda result, receipt: self._answer(connection, seq, result, receipt),
            refuse=lambda error: self._refuse(connection, seq, error),
        )
        deadline = arrived + int(self._vault.config.gate.deadline_s * 1e9)
        self._vault.submit(connection.officer, job, arrived, deadline)

    # ── Behind the gate ───────────────────────────────────────────────────────────────────────────

    def _create_tenant(self, command: adm.CreateTenant, now: int) -> Done:
        self._vault.store.add_tenant(command.name, now)
        return Done(adm.Nothing(), command.name)

    def _set_on_drift(self, command: adm.SetOnDrift, _now: int) -> Done:
        self._vault.drift.shredding.choose(command.tenant, command.what == "shred")
        return Done(adm.Nothing(), command.tenant, detail=f"on drift: {command.what}")

    def _bind(self, principal: str, tenant: str, now: int) -> Done:
        if self._vault.store.kek_generation(tenant) is None:
            raise NotFoundError(f"no such tenant: {tenant}")
        self._vault.membership.bind(principal, tenant, now)
        return Done(adm.Nothing(), tenant, detail=principal)

    def _unbind(self, principal: str) -> Done:
        tenant = self._vault.store.tenant_of(principal)
        if tenant is None or not self._vault.store.unbind(principal):
            raise NotFoundError(f"{principal} is bound to no tenant")
        return Done(adm.Nothing(), tenant, detail=principal)

    # ── What works while the gate is closed ───────────────────────────────────────────────────────

    def _list_tenants(self, connection: _Connection, seq: int, _command: adm.ListTenants) -> None:
        store = self._vault.store
        shred = self._vault.drift.shredding.chosen(None)
        self._answer(connection, seq, adm.Tenants(tuple(store.tenants()), tuple(store.bindings()), shred))

    def _list_vms(self, connection: _Connection, seq: int, _command: adm.ListVms) -> None:
        gate, store = self._vault.gate, self._vault.store
        stamps, latched = gate.stamps, gate.latched
        vms = []
        for h in sorted(gate.hypervisors, key=lambda h: h.name):
            component = process_of(h.vm)
            stamp = stamps.get(component)
            vms.append(
                adm.VmInfo(
                    vm=h.vm,
                    name=h.name,
                    pid=h.pid,
                    cid=h.cid,
                    accel=h.accel,
                    tenant=store.tenant_of(vm_principal(h.vm)) or "",
                    status="unread" if stamp is None else str(stamp.status),
                    drifted=component in latched,
                )
            )
        self._answer(connection, seq, adm.Vms(tuple(vms)))

    def _list_keys(self, connection: _Connection, seq: int, command: adm.ListKeys) -> None:
        keys = self._vault.store.keys(command.tenant, "", 10_000)
        lines = tuple(
            adm.KeyLine(k.id, k.alias or "", k.algorithm.value, k.state.value, len(k.versions)) for k in keys
        )
        self._answer(connection, seq, adm.Keys(lines))

    def _status(self, connection: _Connection, seq: int, _command: adm.Status) -> None:
        self._answer(connection, seq, standing.report(self._vault))

    def _measure(self, connection: _Connection, seq: int, command: adm.Measure) -> None:
        vault = self._vault
        caller = Caller(uid=connection.officer.uid)
        if command.vm:
            hypervisor = vault.gate.hypervisor(command.vm)
            if hypervisor is None:
                raise NotFoundError(f"no VM {command.vm} runs here")
            caller = Caller(vm=command.vm, pid=hypervisor.pid, start_time=hypervisor.start_time)

        def told() -> None:
            custody = vault.custody
            report = explain(
                vault.gate.needs(caller),
                gate=vault.gate,
                last=vault.last,
                now=time.monotonic_ns(),
                reference="" if custody.reference is None else custody.reference_digest.hex(),
                version=0 if custody.reference is None else custody.reference.version,
            )
            self._answer(connection, seq, report)

        now = time.monotonic_ns()
        deadline = now + int(vault.config.gate.deadline_s * 1e9)
        vault.gate.observe(Waiting(caller, now, deadline, told))

    def _capture(self, connection: _Connection, seq: int, _command: adm.CaptureManifest) -> None:
        def told(result: bytes | HostdError) -> None:
            if isinstance(result, HostdError):
                self._refuse(connection, seq, result)
            else:
                self._answer(connection, seq, adm.Document(result, hashlib.sha256(result).hexdigest()))
            self._vault.kick()

        vault = self._vault
        Capture(
            vault.config,
            vault.measuring,
            self._loop,
            told,
            base=vault.custody.reference,
            pcrs=vault.tpm.sealed_to,
        ).start()

    def _install(self, connection: _Connection, seq: int, command: adm.InstallManifest) -> None:
        custody = self._vault.custody
        names = custody.install_reference(command.document, command.signatures, connection.officer.principal)
        assert custody.reference is not None
        installed = adm.Installed(custody.reference_digest.hex(), custody.reference.version, names)
        self._answer(connection, seq, installed)

    def _show_manifest(self, connection: _Connection, seq: int, _command: adm.ShowManifest) -> None:
        self._answer(connection, seq, manifests.show(self._vault))

    def _manifest_status(self, connection: _Connection, seq: int, _command: ManifestStatus) -> None:
        self._answer(connection, seq, manifests.report(self._vault, int(time.time())))

    def _list_drift(self, connection: _Connection, seq: int, _command: adm.ListDrift) -> None:
        stored = {name: (since, entry) for name, _raw, since, entry in self._vault.store.drift()}
        lines = []
        for component, findings in sorted(self._vault.gate.latched.items()):
            since, entry = stored.get(str(component), (0, 0))
            steps = tuple(
                adm.ReactionLine(line.step, line.outcome, line.detail)
                for line in self._vault.drift.reactions.lines(component)
            )
            lines.append(adm.DriftLine(str(component), since, entry, finding_lines(findings), steps))
        self._answer(connection, seq, adm.Drift(tuple(lines)))

    def _clear_drift(self, connection: _Connection, seq: int, command: adm.ClearDrift) -> None:
        kind, _, vm = command.component.partition(":")
        try:
            component = Component(Kind(kind), vm)
        except ValueError:
            raise NotFoundError(f"no such component: {kind}") from None
        vault, officer = self._vault, connection.officer.principal
        if not vault.drift.clear(component, command.reason, officer, vault.measuring):
            raise NotFoundError(f"{component} has not drifted")
        self._answer(connection, seq, adm.Nothing())

    def _on_ledger(self, connection: _Connection, seq: int, command: adm.LedgerCommand) -> None:
        self._desk.answer(
            command,
            connection.officer.principal,
            lambda result: self._answer(connection, seq, result),
        )

    def _on_enrolment(self, connection: _Connection, seq: int, command: enr.EnrolmentCommand) -> None:
        def told(result: object) -> None:
            if isinstance(result, HostdError):
                self._refuse(connection, seq, result)
            else:
                self._answer(connection, seq, result)

        self._enrolment.answer(command, connection.officer.principal, told)

    def _on_channel(self, connection: _Connection, seq: int, command: ChannelCommand) -> None:
        keeper = self._vault.custody.channel
        self._answer(connection, seq, keeper.answer(command, connection.officer.principal))

    def _trust_bundle(self, connection: _Connection, seq: int, _command: adm.TrustBundle) -> None:
        vault, custody = self._vault, self._vault.custody
        if custody.channel.ca is None or custody.reference is None:
            raise UnavailableError("the keys are not unsealed or no reference values are in force")
        bundle = TrustBundle(
            require=frozenset({*vault.config.measure.require, *map(str, ALWAYS)}),
            aks=(vault.tpm.record.ak_public,),
            channel_cas=custody.channel.pinned,
            pcrs=tuple((i, frozenset({v})) for i, v in sorted(vault.tpm.sealed_to.items())),
            reference=frozenset({custody.reference_digest}),
            ledger=(str(vault.checkpoints.key()),),
        )
        document = encode_bundle(bundle)
        self._answer(connection, seq, adm.Document(document, ""))
