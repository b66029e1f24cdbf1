"""Drift: what follows when a component is not as it should be, and how it ends.

Refuse, always; record; drop what was unwrapped; and if the drift is the host's, lock: the root key
leaves memory. Nothing of it is undone by a good reading, nor by a restart: the store keeps the drift
until an officer clears it, with a reason, in the ledger.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from guestlib.errors import HostdError
from hostd.core.findings import IMA, Component, Finding, Kind
from hostd.vault.custody import LOCKED

if TYPE_CHECKING:
    from hostd.core.appraise_ima import Accepted
    from hostd.vault.counters import Counters
    from hostd.vault.custody import Custody, House
    from hostd.vault.gate import Gate
    from hostd.vault.keyring import Keyring
    from hostd.vault.measuring import Measuring
    from hostd.vault.store import Store


class Drift:
    """The latch and its consequences."""

    def __init__(
        self,
        house: House,
        *,
        gate: Gate,
        store: Store,
        keyring: Keyring,
        custody: Custody,
        counters: Counters,
    ) -> None:
        self._house = house
        self._gate = gate
        self._store = store
        self._keyring = keyring
        self._custody = custody
        self._counters = counters
        self._seen_of_log: Accepted | None = None
        """The IMA log as far as it was read when its drift was recorded: what an officer has seen."""

    def restore(self) -> None:
        """Latches what was not cleared before the last stop."""
        for component, raw, _since, _ledger in self._store.drift():
            kind, _, vm = component.partition(":")
            findings = msgspec.msgpack.decode(raw, type=tuple[Finding, ...])
            self._gate.latch(Component(Kind(kind), vm), findings)

    def react(self, component: Component, findings: tuple[Finding, ...], measuring: Measuring) -> None:
        """A component has drifted, and the gate has latched it: lock and record."""
        if component == IMA and measuring.appraiser is not None:
            self._seen_of_log = measuring.appraiser.ima.so_far
        for finding in findings:
            self._counters.count(
                "hostd_findings_total", kind=str(component.kind), code=finding.code, severity=finding.severity
            )
        if self._gate.host_drifted():
            self._custody.lock()
            self._house.set_shut("keys", LOCKED)
        else:
            self._keyring.drop()
        try:
            seq = self._house.record("drift", outcome="refused", detail=" | ".join(map(str, findings)))
            self._store.put_drift(str(component), findings, time.time_ns() // 1_000_000, seq)
            self._store.commit()
        except HostdError as error:
            self._house.set_shut("ledger", error.message)

    def clear(self, component: Component, reason: str, officer: str, measuring: Measuring) -> bool:
        """An officer vouches for the component again; False if it had not drifted."""
        if component not in self._gate.latched:
            return False
        self._house.record("clear", principal=officer, detail=f"{component}: {reason}")
        self._store.clear_drift(str(component))
        self._store.commit()
        self._gate.clear(component)
        if component == IMA and self._seen_of_log is not None:
            # What came after the finding was never shown to the officer, and is judged again.
            self._custody.accept_log(self._seen_of_log)
            self._seen_of_log = None
        # What was learnt of processes and files before the drift is no longer vouched for.
        measuring.restart()
        self._custody.unseal()
        return True
