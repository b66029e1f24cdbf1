"""How the vault stands, on one screen: gate, drift, keys, components."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hostd.ipc import operating

if TYPE_CHECKING:
    from hostd.vault.vault import Vault


def report(vault: Vault) -> operating.StatusReport:
    """How it stands, on one screen."""
    now = time.monotonic_ns()
    latched = vault.gate.latched
    components = tuple(
        operating.ComponentLine(
            component=str(component),
            status=str(stamp.status),
            age_ms=(now - stamp.started) / 1e6,
            cost_ms=(stamp.ended - stamp.started) / 1e6,
            drifted=component in latched,
        )
        for component, stamp in sorted(vault.gate.stamps.items())
    )
    closed = vault.gate.shut is not None or vault.gate.host_drifted()
    return operating.StatusReport(
        gate="closed" if closed else "open",
        reason=vault.gate.shut or "",
        drifted=tuple(map(str, latched)),
        passes=vault.gate.passes,
        reference=vault.custody.reference_digest.hex() if vault.custody.reference else "",
        components=components,
        keys_unlocked=vault.keyring.unlocked,
        tpm=vault.config.tpm.device,
        ledger_size=vault.ledger.size,
        ledger_root=vault.ledger.tree.root().hex(),
        keys=vault.store.key_counts(),
        waiting=vault.gate.waiting,
        channels=len(vault.broker.channels),
    )
