"""A latch with its consequences on real files: store, ledger, keyring; what is around them is simulated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hostd.config import Config
from hostd.core.appraise_ima import Accepted
from hostd.core.findings import Component, Finding
from hostd.core.reference import Reference
from hostd.ipc.loop import Loop
from hostd.platform.secretmem import SecretBuffer
from hostd.platform.tpm_errors import TpmError, TpmUnavailableError
from hostd.vault.counters import Counters
from hostd.vault.custody import Custody
from hostd.vault.drift import Drift
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry, Ledger
from hostd.vault.mint import Mint
from hostd.vault.reactions import Power
from hostd.vault.store import Store
from tests.vault.support_gate import finding, make_gate
from tests.vault.support_keys import NOW, root


class SimulatedMeasuring:
    """The link to the measurer: the log as far as it was read."""

    def __init__(self) -> None:
        self.appraiser = self
        self.ima = self
        self.so_far = Accepted("boot", 100)
        self.restarts = 0

    def restart(self) -> None:
        self.restarts += 1


class SimulatedTpm:
    """Unseals at once; `poisons` is how often it was told to unseal no more."""

    def __init__(self) -> None:
        self.poisons = 0
        self.fails = False

    def poison(self, told: Callable[[str | TpmError], None]) -> None:
        if self.fails:
            told(TpmUnavailableError("no TPM"))
            return
        self.poisons += 1
        told("extended")

    def unseal(self, told: Callable[[SecretBuffer], None]) -> None:
        told(root())


def nobody_suspends(_vm: str, _on: bool, told: Callable[[bool, str], None]) -> None:
    told(False, "nobody suspends here")


class Vault:
    """What the drift's consequences need, on real files; it is the house too."""

    def __init__(
        self,
        folder: Path,
        loop: Loop,
        config: Config = Config(),  # noqa: B008
        *,
        tpm: Any = None,
        power: Power = nobody_suspends,
    ) -> None:
        tpm = tpm or SimulatedTpm()
        self.store = Store(folder / "drift.sqlite", create=not (folder / "drift.sqlite").exists())
        self.ledger = Ledger(folder / "drift.jsonl")
        self.gate = make_gate()
        self.keyring = Keyring(self.store)
        self.keyring.unlock(root())
        self.measuring = SimulatedMeasuring()
        self.seconds = 0.0
        self.shut: dict[str, str | None] = {}
        self.custody = Custody(
            self,
            config,
            loop,
            gate=self.gate,
            store=self.store,
            keyring=self.keyring,
            mint=Mint(loop),
            tpm=tpm,
            last={},
        )
        self.counters = Counters()
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
            tpm=tpm,
            power=power,
            now=lambda: self.seconds,
        )
        self.drift.restore(self.ledger.open_drift)
        self.drift.go_on()

    def record(
        self, event: str, *, outcome: str = "done", principal: str = "", subject: str = "", detail: str = ""
    ) -> int:
        seq = self.ledger.size
        self.ledger.append(
            Entry(seq, NOW, event, outcome, principal=principal, op=subject, detail=detail[:4000])
        )
        self.ledger.sync()
        return seq

    def set_shut(self, what: str, reason: str | None) -> None:
        self.shut[what] = reason

    def new_reference(self) -> None:
        self.measuring.restart()

    def judge_by(self, reference: Reference) -> None:
        raise AssertionError("nothing retires here")

    def kick(self) -> None:
        pass

    def find(self, component: Component, *seen: Finding) -> None:
        findings = seen or (finding(component),)
        self.gate.latch(component, findings)
        self.drift.react(component, findings, cast("Any", self.measuring))

    def found(self, component: Component, findings: tuple[Finding, ...]) -> None:
        if component not in self.gate.latched:
            self.find(component, *findings)

    def clear(self, component: Component) -> bool:
        return self.drift.clear(component, "looked at it", "officer", cast("Any", self.measuring))

    def fill_disk(self) -> None:
        full = os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(full, self.ledger._fd, inheritable=False)
        os.close(full)

    def close(self) -> None:
        self.custody.lock()
        self.store.close()
        self.ledger.close()
