"""A list of attacks that are staged one after the other on a running hostd, and what came of each.

Each is tried in the same way: a caller is answered; the attack is staged; the next request is refused
for drift; `hostctl --json drift list` names the thing; whoever else was not touched goes on being
answered; the attack is undone, an officer clears the drift, and the caller is answered again.
Where these steps are done, on this machine or in the lab, is the `Scene`'s business.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

REFUSED = "refused_drift"
Finding = dict[str, str]
"""A finding by field, as `hostctl --json drift list` has it."""


@dataclass(frozen=True, slots=True)
class Sign:
    """A finding that must be there."""

    component: str
    codes: tuple[str, ...]
    """One of these."""
    names: tuple[str, ...]
    """Each must be in the finding's subject or place."""

    def among(self, findings: Iterable[Finding]) -> Finding | None:
        """The finding that is this sign."""
        for finding in findings:
            named = f"{finding['subject']} {finding['where']}"
            if (
                finding["component"] == self.component
                and finding["code"] in self.codes
                and all(name in named for name in self.names)
            ):
                return finding
        return None


@dataclass(frozen=True, slots=True)
class Staged:
    """What was done, by how it must be found, and how it is undone."""

    signs: tuple[Sign, ...]
    undo: Callable[[], None] = lambda: None
    others: bool = True
    """Whether everybody else must go on being answered: the drift is one VM's own."""
    anew: bool = True
    """Whether the attacked machine has to be started anew: what was done to it cannot be undone."""
    within_s: float = 0.0
    """Not by the next pass, but in this time, by design: docs/measurement.md says why."""


S = TypeVar("S", bound="Scene", contravariant=True)


class Scene(Protocol):
    """Where attacks are staged."""

    def answered(self) -> str:
        """Waits until the attacked VM's request is answered; empty, or the last refusal."""
        ...

    def refusal(self) -> str:
        """The code of the next request's refusal; empty if it is answered."""
        ...

    def others_answered(self) -> str:
        """One request of somebody else; empty, or the refusal."""
        ...

    def drift(self) -> list[Finding]:
        """All findings of all drifted components."""
        ...

    def recover(self, staged: Staged) -> None:
        """After the attack was undone: what was spoilt is started anew, and all drift is cleared."""
        ...


@dataclass(frozen=True, slots=True)
class Attack:
    """One row of the list."""

    name: str
    stage: Callable[[S], Staged]


@dataclass(slots=True)
class Outcome:
    """What came of one attack."""

    name: str
    staged: bool = False
    found: bool = False
    named: bool = False
    refused: bool = False
    others: bool = True
    recovered: bool = False
    seconds: float = 0.0
    shown: list[str] = field(default_factory=list)
    """The findings, as an officer reads them."""
    trouble: str = ""

    @property
    def good(self) -> bool:
        return all((self.staged, self.found, self.named, self.refused, self.others, self.recovered))


def attempt(scene: Scene, attack: Attack, *, before: Outcome | None = None) -> Outcome:
    """Stages one attack. Whatever goes wrong is in the outcome: the others are tried all the same.

    `before` is what came of the attack before: where that ended with an answer, none is asked for first.
    """
    outcome = Outcome(attack.name)
    began = time.monotonic()
    try:
        if before is None or not before.recovered:
            refused = scene.answered()
            if refused:
                outcome.trouble = f"nothing is answered before the attack: {refused}"
                return outcome
        _attempt(scene, attack, outcome)
    except Exception:  # noqa: BLE001 - a row that fails must not hide the others
        outcome.trouble = traceback.format_exc(limit=-4)
    outcome.seconds = time.monotonic() - began
    return outcome


def _attempt(scene: Scene, attack: Attack, outcome: Outcome) -> None:
    staged = attack.stage(scene)
    outcome.staged = True
    try:
        code = _refusal(scene, staged.within_s)
        outcome.refused = code == REFUSED
        if not outcome.refused:
            outcome.trouble = f"the next request: {code or 'answered'}"
        findings = scene.drift()
        outcome.shown = [show(finding) for finding in findings]
        outcome.found = bool(findings)
        missing = [sign for sign in staged.signs if sign.among(findings) is None]
        outcome.named = not missing
        if missing:
            outcome.trouble += f"\nnot named: {missing}"
        if staged.others:
            refused = scene.others_answered()
            outcome.others = not refused
            if refused:
                outcome.trouble += f"\nsomebody else: {refused}"
    finally:
        staged.undo()
        scene.recover(staged)
    after = scene.answered()
    outcome.recovered = not after
    if after:
        outcome.trouble += f"\nnot answered after an officer cleared it: {after}"


def _refusal(scene: Scene, within_s: float) -> str:
    deadline = time.monotonic() + within_s
    while (code := scene.refusal()) != REFUSED and time.monotonic() < deadline:
        time.sleep(0.2)
    return code


def show(finding: Finding) -> str:
    """A finding on one line, as `hostctl drift list` words it."""
    where = f" at {finding['where']}" if finding["where"] else ""
    return (
        f"{finding['component']}: {finding['code']}: {finding['subject']}{where}: "
        f"expected {finding['expected']}, seen {finding['seen']}"
    )


def report(outcomes: list[Outcome]) -> str:
    """The list with its totals."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{'ok  ' if outcome.good else 'FAIL'} {outcome.name} ({outcome.seconds:.1f} s)")
        lines += [f"       {_short(line)}" for line in outcome.shown[:3]]
        if not outcome.good:
            lines += [f"     ! {line}" for line in outcome.trouble.splitlines() if line]
    staged, found, named, refused = (
        sum(getattr(outcome, name) for outcome in outcomes)
        for name in ("staged", "found", "named", "refused")
    )
    totals = f"attacks staged: {staged}, found {found}, named {named}, refused {refused}"
    return "\n".join([*lines, totals])


def _short(line: str) -> str:
    return line if len(line) <= 300 else line[:300] + "…"
