"""The metrics role's socket: one question, one snapshot."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from hostd.core.findings import Kind
from hostd.ipc import counting
from hostd.ipc.channel import Channel, ChannelError
from hostd.ipc.connect import accept, listen

if TYPE_CHECKING:
    from pathlib import Path

    from hostd.ipc.loop import Loop
    from hostd.vault.vault import Vault

MAX_CONNECTIONS: Final = 4
MAX_RECORD_BYTES: Final = 64


class CountersEndpoint:
    """Serves `metrics.sock` to the metrics role alone."""

    def __init__(self, vault: Vault, loop: Loop, path: Path, *, uid: int) -> None:
        self._vault = vault
        self._loop = loop
        self._uid = uid
        self._channels: set[Channel[counting.Scrape]] = set()
        self._listener = listen(path, mode=0o600, owner=uid)
        loop.watch(self._listener, self._on_accept)

    def _on_accept(self, _events: int) -> None:
        accepted = accept(self._listener)
        if accepted is None:
            return
        sock, peer = accepted
        if peer.uid != self._uid or len(self._channels) >= MAX_CONNECTIONS:
            sock.close()
            return
        channel: Channel[counting.Scrape] = Channel(sock, counting.Scrape, max_record=MAX_RECORD_BYTES)
        self._channels.add(channel)
        self._watch(channel)

    def _watch(self, channel: Channel[counting.Scrape]) -> None:
        self._loop.watch(channel, lambda _e: self._on_events(channel), write=channel.wants_write)

    def _on_events(self, channel: Channel[counting.Scrape]) -> None:
        try:
            channel.flush()
            for _ in channel.receive():
                self._refresh()
                channel.send(self._vault.counters.snapshot())
            self._watch(channel)
        except ChannelError:
            self._loop.forget(channel)
            self._channels.discard(channel)
            channel.close()

    def _refresh(self) -> None:
        """Gauges are taken when they are asked for. VMs are counted, not named."""
        vault, now = self._vault, time.monotonic_ns()
        counters, gate = vault.counters, vault.gate
        latched = gate.latched
        counters.gauge("hostd_gate_open", float(gate.shut is None and not gate.host_drifted()))
        counters.gauge("hostd_drifted_components", len(latched))
        counters.gauge("hostd_keys_unlocked", float(vault.keyring.unlocked))
        counters.gauge("hostd_waiting_requests", gate.waiting)
        counters.gauge("hostd_channels", len(vault.broker.channels))
        counters.gauge("hostd_hypervisors", len(gate.hypervisors))
        counters.gauge("hostd_ledger_entries", vault.ledger.size)
        counters.gauge("hostd_ledger_bytes", vault.ledger.stored_bytes)
        for name in (
            "hostd_component_age_seconds",
            "hostd_component_good",
            "hostd_component_good_age_seconds",
            "hostd_keys",
        ):
            counters.forget_gauges(name)
        ages: dict[Kind, float] = {}
        good: dict[Kind, bool] = {}
        for component, stamp in gate.stamps.items():
            kind = component.kind
            ages[kind] = max(ages.get(kind, 0.0), (now - stamp.started) / 1e9)
            fine = gate.acceptable(component, stamp.status) and component not in latched
            good[kind] = good.get(kind, True) and fine
        for kind, age in ages.items():
            counters.gauge("hostd_component_age_seconds", age, kind=str(kind))
            counters.gauge("hostd_component_good", float(good[kind]), kind=str(kind))
        since: dict[Kind, int] = {}
        for component, started in gate.last_good.items():
            since[component.kind] = min(since.get(component.kind, started), started)
        for kind, started in since.items():
            counters.gauge("hostd_component_good_age_seconds", (now - started) / 1e9, kind=str(kind))
        for state, count in vault.store.key_counts().items():
            counters.gauge("hostd_keys", count, state=state)
