"""Drift: what follows when a component is not as it should be, and how it ends.

Refuse, always; record; and run the steps that follow (`hostd.vault.reactions`): if the drift is the host's,
the root key leaves memory. Nothing of it is undone by a restart: the store keeps the drift until an officer
clears it, with a reason, in the ledger; or, for the kinds that `drift.recovery` names, until a clean reading.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.errors import HostdError
from hostd.core.appraise_ima import Accepted
from hostd.core.codes import Code
from hostd.core.findings import IMA, Component, Finding, Kind, Severity, Status
from hostd.vault.reactions import Reactions
from hostd.vault.shredding import Shredding

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hostd.config import Drift as Settings
    from hostd.core.findings import Verdict
    from hostd.core.reacting import Plan
    from hostd.ipc.loop import Loop
    from hostd.vault.counters import Counters
    from hostd.vault.custody import Custody, House
    from hostd.vault.gate import Gate
    from hostd.vault.keyring import Keyring
    from hostd.vault.ledger import Ledger
    from hostd.vault.measuring import Measuring
    from hostd.vault.reactions import Poison, Power
    from hostd.vault.store import Store

STANDS_S: Final = 3.0
"""Warnings of a pending component count, where a reaction is configured, once they have stood so long: while
the dynamic linker of a VM that starts maps its libraries, some that are needed are not there."""
AUTO_PAUSE_S: Final = 600.0
"""A clean reading clears a component this long after the last such clear at the earliest. Each has everything
measured anew and a batch withheld, for all, and a machine that was taken over can drift and mend itself at
will."""
_SEEN: Final = re.compile(r"log of boot ([0-9a-f-]{1,36}) read to byte ([0-9]{1,18}) \| ")


class Drift:
    """The latch and its consequences."""

    def __init__(
        self,
        house: House,
        loop: Loop,
        settings: Settings,
        *,
        gate: Gate,
        store: Store,
        ledger: Ledger,
        keyring: Keyring,
        custody: Custody,
        counters: Counters,
        tpm: Poison,
        power: Power,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._house = house
        self._now = now
        self._gate = gate
        self._store = store
        self._ledger = ledger
        self._custody = custody
        self._counters = counters
        self._auto = settings.auto
        self.shredding = Shredding(house, store, keyring)
        self.reactions = Reactions(
            house,
            loop,
            settings,
            store=store,
            ledger=ledger,
            keyring=keyring,
            custody=custody,
            counters=counters,
            tpm=tpm,
            power=power,
            shredding=self.shredding,
        )
        self._cleared_at: dict[Component, float] = {}
        """When clean readings cleared components last, seconds."""
        self._warned_at: dict[Component, float] = {}
        """Since when every reading of a component had warnings, seconds."""
        self._unsaid: dict[Component, tuple[Finding, ...]] = {}
        self._seen_of_log: Accepted | None = None
        """The IMA log as far as it was read when its drift was recorded: what an officer has seen."""

    def restore(self, open_drift: Mapping[str, int]) -> None:
        """Latches what was not cleared before the last stop.

        `open_drift` is the ledger's word: component → entry of a drift that no later entry clears. A
        drift that is in the ledger and not in the store was taken out of it, and is latched all the same.
        """
        stored: set[str] = set()
        for name, raw, _since, _ledger in self._store.drift():
            stored.add(name)
            findings = msgspec.msgpack.decode(raw, type=tuple[Finding, ...])
            self._gate.latch(_component(name), findings)
            if name not in open_drift:
                self._unsaid[_component(name)] = findings
        for name, seq in open_drift.items():
            if name not in stored:
                finding = Finding(
                    component=name,
                    code=Code.DRIFT_ROW_MISSING.value,
                    severity=Severity.CRITICAL,
                    subject="the store",
                    expected=f"the drift of ledger entry {seq}, until an officer clears it",
                    seen="no such row",
                )
                self._gate.latch(_component(name), (finding,))
                self._store.put_drift(name, (finding,), _utc_ms(), seq)
        self._store.commit()
        if (noted := open_drift.get(str(IMA))) is not None:
            for entry in self._ledger.entries(noted, 1):
                self._seen_of_log = _seen_of_log(entry.detail)
        self.reactions.restore(self._gate.latched, open_drift)

    def go_on(self) -> None:
        """After a start: says what could not be said before the last stop, and goes on with the steps that
        were not done."""
        for component, findings in self._unsaid.items():
            self._record(component, findings, self.reactions.plan(component), "")
        self._unsaid.clear()
        for component in self._gate.latched:
            self.reactions.run(component)
        self.reactions.resume()

    def react(self, component: Component, findings: tuple[Finding, ...], measuring: Measuring) -> None:
        """A component has drifted, and the gate has latched it: lock and record."""
        seen = ""
        if component == IMA and measuring.appraiser is not None:
            self._seen_of_log = measuring.appraiser.ima.so_far
            # In the ledger, for a vault that starts again before an officer has come; nowhere else could it
            # not be altered, as the keys leave memory with this drift.
            seen = f"log of boot {self._seen_of_log.boot_id} read to byte {self._seen_of_log.position} | "
        for finding in findings:
            self._counters.count(
                "hostd_findings_total", kind=str(component.kind), code=finding.code, severity=finding.severity
            )
        # The row first: whatever becomes of the entry, the latch outlives this process.
        plan = self.reactions.decide(component, findings)
        try:
            self.reactions.begin(component, plan)
            self._store.put_drift(str(component), findings, _utc_ms(), self._ledger.size)
            self._store.commit()
        except HostdError as error:
            self._house.set_shut("store", error.message)
        self._record(component, findings, plan, seen)
        self.reactions.run(component)

    def _record(self, component: Component, findings: tuple[Finding, ...], plan: Plan, seen: str) -> None:
        with suppress(HostdError):  # the gate is shut then
            detail = f"{seen}{plan} | " + " | ".join(map(str, findings))
            self._house.record("drift", outcome="refused", subject=str(component), detail=detail)

    def judged(
        self,
        verdict: Verdict,
        found: Callable[[Component, tuple[Finding, ...]], None],
        measuring: Measuring,
    ) -> None:
        """A reading that shows no new drift. Its warnings are one where a reaction to them is configured (the
        component is PENDING, mostly); and if there are none, a clean reading ends a drift where that is
        configured, every `AUTO_PAUSE_S` at most."""
        component, findings = verdict.component, verdict.findings
        if self._warned_at:  # of a VM that is gone nothing stands
            self._warned_at = {c: at for c, at in self._warned_at.items() if c in self._gate.known}
        if self.reactions.reacts_to_warnings(component, findings):
            since = self._warned_at.setdefault(component, self._now())
            if verdict.status is not Status.PENDING or self._now() - since >= STANDS_S:
                found(component, findings)
            return
        self._warned_at.pop(component, None)
        if (
            verdict.status is Status.VERIFIED
            and component.kind in self._auto
            and component in self._gate.latched
            and self._may_clear(component)
        ):
            with suppress(HostdError):  # it stays latched
                self.clear(component, "a clean reading (drift.recovery is auto)", "", measuring)
                self._cleared_at[component] = self._now()

    def _may_clear(self, component: Component) -> bool:
        early = self._now() - AUTO_PAUSE_S
        self._cleared_at = {c: at for c, at in self._cleared_at.items() if at > early}
        return component not in self._cleared_at

    def clear(self, component: Component, reason: str, officer: str, measuring: Measuring) -> bool:
        """An officer vouches for the component again; False if it had not drifted."""
        if component not in self._gate.latched:
            return False
        self._house.record("clear", principal=officer, subject=str(component), detail=reason)
        self._store.clear_drift(str(component))
        self.reactions.strike(component)
        self._store.commit()
        self._gate.clear(component)
        self.reactions.forget(component)
        if component == IMA and self._seen_of_log is not None:
            # What came after the finding was never shown to the officer, and is judged again.
            self._custody.accept_log(self._seen_of_log)
            self._seen_of_log = None
        # What was learnt of processes and files before the drift is no longer vouched for.
        measuring.restart()
        self._custody.unseal()
        self.reactions.resume()
        return True


def _seen_of_log(detail: str) -> Accepted | None:
    """What `Drift.react` put into the ledger's entry; None: the IMA log was not read then."""
    match = _SEEN.match(detail)
    return None if match is None else Accepted(match[1], int(match[2]))


def _component(name: str) -> Component:
    kind, _, vm = name.partition(":")
    return Component(Kind(kind), vm)


def _utc_ms() -> int:
    return time.time_ns() // 1_000_000
