"""What follows a drift, step by step (pure): which steps, for which drift, in which order.

`refuse` always, and `lock` for every drift of the host; the others are what the configuration has for the
component's kind and the severity of its findings. `shred` is never configured: a tenant sets it for its own
keys. What cannot be undone (`poison`, `shred`) never follows findings that only say that something could
not be read, or that can come of an officer's own manifest.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import msgspec

from hostd.core.codes import Code
from hostd.core.findings import VM_KINDS, Component, Finding, Kind, Severity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Step(enum.StrEnum):
    """One reaction, in the order in which they run. Names are append-only: ledger and store keep them."""

    REFUSE = "refuse"
    """Nobody who rests on the component is answered until the drift is cleared."""
    LOCK = "lock"
    """Keys leave memory: all of them, or those of the drifted VM's tenant."""
    SUSPEND_VM = "suspend-vm"
    """libvirt suspends the drifted VM; resumed when the drift is cleared."""
    POISON = "poison"
    """The poison PCR is extended: the TPM unseals no more before the machine is reset."""
    SHRED = "shred"
    """Keys of the tenants that chose so are destroyed."""


ORDER: Final = tuple(Step)
UNSURE: Final = frozenset(
    {
        Code.FILE_UNREADABLE,
        Code.POSTURE_UNREADABLE,
        Code.DRIFT_ROW_MISSING,
        Code.RELRO_UNCOVERED,
        Code.IMA_MALFORMED,
        Code.BOOT_MALFORMED,
    }
)
"""Codes of findings that say: this could not be read, or was lost. (A reading that fails as a whole is no
drift at all: `hostd.core.appraisal`.)"""
REVIEWED: Final = frozenset({Code.FILE_RETIRED, Code.DOMAIN_EMULATOR})
"""Codes of findings that an officer's own deed can bring: a build's time has come, or a manifest was made
while none of a domain's machines ran."""
NEVER_POISON: Final = {
    10: "IMA extends it all the time",
    16: "it is the debug PCR, which anybody resets",
    23: "it is the application PCR, which anybody resets",
    **dict.fromkeys((17, 18, 19, 20, 21, 22), "only a dynamic launch may extend or reset it"),
}
"""PCRs that cannot serve (TCG PC Client Platform TPM Profile 1.05, section 4.6), and why."""
MANUAL: Final = {
    Kind.BOOT: "what was measured at boot stays so until the next one",
    Kind.IMA: "what the log has stays in it until an officer accepts it",
}
"""Kinds that only officers clear, and why."""


class RuleError(ValueError):
    """A rule that makes no sense; the text says which and why."""


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """What one drift leads to, decided once, when it is found."""

    steps: tuple[Step, ...]
    tenant: str = ""
    """The drifted VM's; empty for a drift of the host, or a VM that is nobody's."""

    def __str__(self) -> str:
        return f"then {', '.join(self.steps)}" + (f" for {self.tenant}" if self.tenant else "")


def check_rule(kind: Kind, severity: Severity, steps: Iterable[Step]) -> None:
    """Passes if the steps may follow drift of this kind.

    Raises:
        RuleError: they may not.
    """
    for step in steps:
        if step is Step.SHRED:
            raise RuleError("`shred` is a tenant's own choice: `hostctl tenant on-drift`")
        if step is Step.SUSPEND_VM and kind not in VM_KINDS:
            raise RuleError(f"`suspend-vm` for {kind}: that is the host, no VM")
        if step is Step.POISON and severity is Severity.WARNING:
            raise RuleError(f"`poison` for a warning of {kind}: too much for something that may be harmless")


def check_poison_pcr(pcr: int, sealed: Iterable[int]) -> None:
    """Passes if the PCR may be the poison PCR of a key that is sealed to `sealed`.

    Raises:
        RuleError: extending it would not keep the TPM from unsealing, or it cannot be relied on.
    """
    if (why := NEVER_POISON.get(pcr)) is not None:
        raise RuleError(f"PCR {pcr} cannot be the poison PCR: {why}")
    known = tuple(sorted(sealed))
    if pcr not in known:
        raise RuleError(
            f"PCR {pcr} cannot be the poison PCR: the root key is sealed to {', '.join(map(str, known))}"
        )


def sure(findings: Iterable[Finding]) -> bool:
    """Whether a critical finding says more than that something could not be read, or is out of date."""
    unsure = {str(code) for code in UNSURE | REVIEWED}
    return any(f.severity is Severity.CRITICAL and f.code not in unsure for f in findings)


def steps_of(
    component: Component,
    findings: tuple[Finding, ...],
    table: Mapping[tuple[Kind, Severity], frozenset[Step]],
    *,
    host_scope: bool,
    shreds: bool,
) -> tuple[Step, ...]:
    """The steps that follow, in order. `shreds`: a tenant that it concerns chose `shred`."""
    critical = any(f.severity is Severity.CRITICAL for f in findings)
    severity = Severity.CRITICAL if critical else Severity.WARNING
    steps = {Step.REFUSE, *table.get((component.kind, severity), frozenset())}
    if shreds:
        steps.add(Step.SHRED)
    if not sure(findings):
        steps -= {Step.POISON, Step.SHRED}
    # What poison is for would be lost if the root key stayed in memory.
    if host_scope or component.kind not in VM_KINDS or Step.POISON in steps:
        steps.add(Step.LOCK)
    return tuple(step for step in ORDER if step in steps)
