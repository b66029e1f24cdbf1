"""Runs the steps that follow a drift: one after the other, each recorded, each tried again until it is done.

A step that fails holds up none after it. It is said once in the ledger, counted each time, and tried again
every `RETRY_S` while the drift is open. What is still to do is in the store before the first step, and what
was done is in the ledger, so that a vault that is killed between two steps goes on where it was: every step
may run twice. (The ledger's word counts too, if the store has lost its own.)

A VM that was suspended is resumed when no open drift wants it suspended any more.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from guestlib.errors import HostdError
from hostd.core.callers import vm_principal
from hostd.core.findings import VM_KINDS, Component
from hostd.core.reacting import ORDER, Plan, Step, steps_of
from hostd.platform.tpm_errors import TpmError
from hostd.vault.custody import LOCKED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from hostd.config import Drift as Settings
    from hostd.core.findings import Finding
    from hostd.ipc.loop import Loop, Timer
    from hostd.vault.counters import Counters
    from hostd.vault.custody import Custody, House
    from hostd.vault.keyring import Keyring
    from hostd.vault.ledger import Entry, Ledger
    from hostd.vault.shredding import Shredding
    from hostd.vault.store import Store

RETRY_S: Final = 5.0
MAX_HEARD: Final = 65_536
"""Entries after a drift's own in which a start looks for its steps, some 0.1 s: while one machine's drift is
open the others work on. A step that was done later, and not by the store's word, is done again."""
_BOOK: Final = "reactions"
_PLAN: Final = re.compile(
    r"(?:log of boot [0-9a-f-]{1,36} read to byte [0-9]{1,18} \| )?"
    r"then ([a-z, -]{1,64}?)(?: for ([A-Za-z0-9][A-Za-z0-9_.-]{0,62}))? \| ",
    re.ASCII,
)
"""Begins the detail of a drift's entry; findings, whose text others choose, follow."""
_STEP: Final = re.compile(r"([a-z-]{1,16}) \| ")


class Power(Protocol):
    """Who suspends (`on` false: resumes) a VM. Tells whether it is so now, and what was done."""

    def __call__(self, vm: str, on: bool, told: Callable[[bool, str], None], /) -> None: ...


class Poison(Protocol):
    """The TPM: extends the poison PCR, and tells what it did."""

    def poison(self, told: Callable[[str | TpmError], None], /) -> None: ...


class Line(NamedTuple):
    """How one step stands, for people: `done`, `failed` (and tried again) or `waiting`."""

    step: Step
    outcome: str
    detail: str


class Work(msgspec.Struct, array_like=True, frozen=True):
    """As stored: what was decided, and what of it is done."""

    plan: Plan
    done: tuple[Step, ...] = ()
    unsaid: tuple[Step, ...] = ()
    """Done, and not yet in the ledger, which could not be written."""


class Book(msgspec.Struct, array_like=True, frozen=True):
    """The store's row: open work by component, and VMs that are to be resumed."""

    open: dict[str, Work] = {}
    resume: tuple[str, ...] = ()


def read_book(raw: bytes | None) -> Book:
    """The store's row; empty if there is none or it is damaged: then the ledger's word is all there is."""
    if raw is None:
        return Book()
    try:
        return msgspec.msgpack.decode(raw, type=Book)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Book()


@dataclass(eq=False, slots=True)
class _Course:
    component: Component
    plan: Plan
    done: dict[Step, str] = field(default_factory=dict)
    failed: dict[Step, str] = field(default_factory=dict)
    unsaid: set[Step] = field(default_factory=set)
    todo: list[Step] = field(default_factory=list)


class Reactions:
    """The steps of all open drifts."""

    def __init__(
        self,
        house: House,
        loop: Loop,
        settings: Settings,
        *,
        store: Store,
        ledger: Ledger,
        keyring: Keyring,
        custody: Custody,
        counters: Counters,
        tpm: Poison,
        power: Power,
        shredding: Shredding,
    ) -> None:
        self._house = house
        self._loop = loop
        self._settings = settings
        self._table = settings.table
        self._store = store
        self._ledger = ledger
        self._keyring = keyring
        self._custody = custody
        self._counters = counters
        self._tpm = tpm
        self._power = power
        self._shredding = shredding
        self._courses: dict[Component, _Course] = {}
        self._resume: list[str] = []
        self._resume_failed: set[str] = set()
        self._resume_again: Timer | None = None

    # ── Deciding ──────────────────────────────────────────────────────────────────────────────────

    def reacts_to_warnings(self, component: Component, findings: tuple[Finding, ...]) -> bool:
        """Whether findings that are no drift by themselves count as one here."""
        return any((component.kind, f.severity) in self._table for f in findings)

    def decide(self, component: Component, findings: tuple[Finding, ...]) -> Plan:
        """What follows this drift. A store that fails stands in the way of nothing but `shred`."""
        tenant, shreds = "", False
        try:
            tenant = self._store.tenant_of(vm_principal(component.vm)) or "" if component.vm else ""
            shreds = bool(self._shredding.chosen(tenant if component.vm else None))
        except HostdError as error:
            self._house.set_shut("store", error.message)
        host_scope = self._settings.scope == "host"
        steps = steps_of(component, findings, self._table, host_scope=host_scope, shreds=shreds)
        return Plan(steps, tenant)

    def plan(self, component: Component) -> Plan:
        """What was decided for a drift that is open."""
        return self._courses[component].plan

    # ── Running ───────────────────────────────────────────────────────────────────────────────────

    def begin(self, component: Component, plan: Plan) -> None:
        """Takes the keys away at once, and writes down what is to follow (the caller commits)."""
        self._courses[component] = _Course(component, plan)
        if component.vm in self._resume:
            self._resume.remove(component.vm)
        self._apply_locks()
        self._write()

    def run(self, component: Component) -> None:
        """Runs the steps that are not done."""
        course = self._courses.get(component)
        if course is not None:
            for step in sorted(course.unsaid, key=ORDER.index):
                self._say(course, step, "done", course.done[step])
            self._again(course)

    def _again(self, course: _Course) -> None:
        if self._courses.get(course.component) is course and not course.todo:
            course.todo = [step for step in course.plan.steps if step not in course.done]
            self._next(course)

    def _next(self, course: _Course) -> None:
        if self._courses.get(course.component) is not course:
            return  # it was cleared meanwhile
        if not course.todo:
            self._gauge()
            if course.failed:
                self._loop.call_after(RETRY_S, lambda: self._again(course))
            return
        step = course.todo[0]
        match step:
            case Step.REFUSE:
                self._ended(course, step, True, "the gate is closed to all that rest on it")
            case Step.LOCK:
                self._ended(course, step, True, self._locked(course))
            case Step.SUSPEND_VM:
                self._power(course.component.vm, True, lambda ok, text: self._ended(course, step, ok, text))
            case Step.POISON:
                self._tpm.poison(
                    lambda result: self._ended(course, step, isinstance(result, str), str(result))
                )
            case Step.SHRED:
                try:
                    text = self._shredding.shred(
                        course.component, course.plan.tenant if course.component.vm else None
                    )
                except HostdError as error:
                    self._ended(course, step, False, error.message)
                else:
                    self._ended(course, step, True, text)

    def _ended(self, course: _Course, step: Step, ok: bool, text: str) -> None:
        outcome = "done" if ok else "failed"
        self._counters.count("hostd_reactions_total", step=step, outcome=outcome)
        if self._courses.get(course.component) is course:
            known = course.failed.pop(step, None)
            (course.done if ok else course.failed)[step] = text
            # A drift's own entry says that it refuses; a failure is said once, and shown as it is now.
            if step is not Step.REFUSE and (ok or known is None):
                self._say(course, step, outcome, text)
            self._save()
        if course.todo and course.todo[0] is step:
            course.todo.pop(0)
        self._next(course)

    def _say(self, course: _Course, step: Step, outcome: str, text: str) -> None:
        detail = f"{step} | {text}"
        try:
            self._house.record("reaction", outcome=outcome, subject=str(course.component), detail=detail)
        except HostdError:  # the gate is shut then; the next start says it
            course.unsaid.update({step} & course.done.keys())
        else:
            course.unsaid.discard(step)

    def _locked(self, course: _Course) -> str:
        self._apply_locks()
        if self._whole(course):
            return "all keys left memory"
        if course.plan.tenant:
            return f"the keys of tenant {course.plan.tenant} left memory"
        return "the VM belongs to no tenant"

    def _whole(self, course: _Course) -> bool:
        component, steps = course.component, course.plan.steps
        return (
            component.kind not in VM_KINDS or self._settings.scope == "host" or Step.POISON in steps
        ) and Step.LOCK in steps

    def _apply_locks(self) -> None:
        """Keys are in memory as the open drifts allow."""
        locking = [c for c in self._courses.values() if Step.LOCK in c.plan.steps]
        self._keyring.lock_tenants(frozenset(c.plan.tenant for c in locking if c.plan.tenant))
        self._custody.held = any(map(self._whole, locking))
        if self._custody.held:
            self._custody.lock()
            self._house.set_shut("keys", LOCKED)
        elif self._courses:
            self._keyring.drop()

    # ── Clearing ──────────────────────────────────────────────────────────────────────────────────

    def strike(self, component: Component) -> None:
        """Takes a drift that is being cleared out of the store's row (the caller commits)."""
        self._write(without=component)

    def forget(self, component: Component) -> None:
        """The drift is cleared: nothing of it goes on. `resume` follows."""
        self._resume = self._to_resume(component)
        self._courses.pop(component, None)
        self._apply_locks()
        self._gauge()

    def _to_resume(self, cleared: Component) -> list[str]:
        """VMs to be resumed once this drift is cleared."""
        wanted = [c.component for c in self._courses.values() if Step.SUSPEND_VM in c.plan.steps]
        last = cleared in wanted and all(c == cleared or c.vm != cleared.vm for c in wanted)
        return [*self._resume, cleared.vm] if last else list(self._resume)

    def _gauge(self) -> None:
        self._counters.gauge("hostd_reactions_failed", sum(len(c.failed) for c in self._courses.values()))

    def resume(self) -> None:
        """Has VMs resumed that no open drift wants suspended."""
        for vm in tuple(self._resume):
            self._power(vm, False, lambda ok, text, vm=vm: self._resumed(vm, ok, text))  # type: ignore[misc]

    def _resumed(self, vm: str, ok: bool, text: str) -> None:
        if vm not in self._resume:
            return
        outcome = "done" if ok else "failed"
        self._counters.count("hostd_reactions_total", step="resume-vm", outcome=outcome)
        if ok:
            self._resume.remove(vm)
        elif self._resume_again is None or not self._resume_again.pending:  # one, for however many VMs
            self._resume_again = self._loop.call_after(RETRY_S, self.resume)
        if ok or vm not in self._resume_failed:
            with suppress(HostdError):
                self._house.record("reaction", outcome=outcome, subject=vm, detail=f"resume-vm | {text}")
        (self._resume_failed.discard if ok else self._resume_failed.add)(vm)
        self._save()

    # ── For people ────────────────────────────────────────────────────────────────────────────────

    def lines(self, component: Component) -> tuple[Line, ...]:
        """How each step of a drift stands."""
        course = self._courses.get(component)
        if course is None:
            return ()
        return tuple(
            Line(step, "done", course.done[step])
            if step in course.done
            else Line(step, "failed", course.failed[step])
            if step in course.failed
            else Line(step, "waiting", "")
            for step in course.plan.steps
        )

    # ── Across restarts ───────────────────────────────────────────────────────────────────────────

    def _write(self, without: Component | None = None) -> None:
        resume = self._resume if without is None else self._to_resume(without)
        open_work = {
            str(c.component): Work(c.plan, tuple(c.done), tuple(c.unsaid))
            for c in self._courses.values()
            if c.component != without
        }
        self._store.set_meta(_BOOK, msgspec.msgpack.encode(Book(open_work, tuple(resume))))

    def _save(self) -> None:
        try:
            self._write()
            self._store.commit()
        except HostdError as error:
            self._house.set_shut("store", error.message)

    def restore(self, latched: Iterable[Component], open_drift: Mapping[str, int]) -> None:
        """Takes up what was not done before the last stop; `run` goes on with it.

        `open_drift`: the ledger's open drifts, component → entry. A drift that neither knows a plan of is
        one of an earlier version: nothing follows but what followed then.
        """
        book = read_book(self._store.meta(_BOOK))
        said = self._said(open_drift)
        for component in latched:
            name = str(component)
            work, heard = book.open.get(name), said.get(name)
            if work is None and heard is None:
                steps = steps_of(component, (), {}, host_scope=self._settings.scope == "host", shreds=False)
                work = Work(Plan(steps), steps)
            unsaid = {*work.unsaid} & {*work.done} if work is not None else set()
            unsaid -= {*heard.done} if heard is not None else set()
            plan = _whole_plan(*(one.plan for one in (heard, work) if one is not None))
            course = self._courses[component] = _Course(component, plan, unsaid=unsaid)
            for one in (work, heard):
                for step in one.done if one is not None else ():
                    course.done.setdefault(step, "before this start")
        self._resume = [vm for vm in book.resume if all(c.vm != vm for c in self._courses)]
        self._apply_locks()

    def _said(self, open_drift: Mapping[str, int]) -> dict[str, Work]:
        """What the ledger says of the open drifts."""
        found: dict[str, Work] = {}
        for entry in self._after(open_drift.values()):
            if entry.op not in open_drift or entry.seq < open_drift[entry.op]:
                continue
            if entry.event == "drift" and (match := _PLAN.match(entry.detail)) is not None:
                with suppress(ValueError):
                    steps = tuple(Step(step) for step in match[1].split(", "))
                    found[entry.op] = Work(Plan(steps, match[2] or ""), ())
            elif entry.event == "reaction" and entry.outcome == "done" and entry.op in found:
                match = _STEP.match(entry.detail)
                with suppress(ValueError):
                    step = Step(match[1] if match is not None else "")
                    work = found[entry.op]
                    found[entry.op] = Work(work.plan, (*work.done, step))
        return found

    def _after(self, numbers: Iterable[int]) -> Iterator[Entry]:
        """These entries, and `MAX_HEARD` after each; each entry once, in order."""
        at = 0
        for number in sorted(numbers):
            start, at = max(at, number), max(at, number + MAX_HEARD)
            yield from self._ledger.entries(start, at - start)


def _whole_plan(*plans: Plan) -> Plan:
    """All that was decided, by the ledger first: no step is lost because the store's row lost it."""
    steps = {step for plan in plans for step in plan.steps}
    tenant = next((plan.tenant for plan in plans if plan.tenant), "")
    return Plan(tuple(step for step in ORDER if step in steps), tenant)
