"""What happened at the gate, in order: arrivals, readings, executions, quotes, answers.

Tests and benchmarks attach a `Recorder` to the parts of a vault that runs in their own process. Nothing in
hostd knows of it: without it no line of it runs, and no configuration switches it on. It takes
each time itself, before the part that it watches does anything. The vault is one thread, so the order of
the events is the order in which things happened.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import TYPE_CHECKING, Any, cast

import msgspec

from hostd.vault.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from guestlib.errors import HostdError
    from hostd.core.findings import Component, Finding, Verdict
    from hostd.core.readings import Hypervisor
    from hostd.vault.recording import Job
    from hostd.vault.waiting import Refused, Waiting


class Event(msgspec.Struct, frozen=True, array_like=True):
    """`at` is in nanoseconds on the monotonic clock."""

    at: int


class Arrived(Event, frozen=True, array_like=True, tag="arrived"):
    """`arrived` is the vault's own stamp; `vm` empty and `officer` false: a host-local caller."""

    number: int
    arrived: int
    deadline: int
    vm: str
    process: tuple[int, int]
    """pid and start time that the caller's channel is bound to."""
    officer: bool


class Asked(Event, frozen=True, array_like=True, tag="asked"):
    """A reading of the component is asked for: it cannot have started before."""

    component: str


class Judged(Event, frozen=True, array_like=True, tag="judged"):
    """The reading of the component that was asked for last has been judged."""

    component: str
    status: str


class Machines(Event, frozen=True, array_like=True, tag="machines"):
    """What the reading of `guests` that is judged next shows: UUID → pid and start time."""

    processes: dict[str, tuple[int, int]]


class Found(Event, frozen=True, array_like=True, tag="found"):
    """A drift was found; `Judged` may have been the reason."""

    component: str


class Cleared(Event, frozen=True, array_like=True, tag="cleared"):
    component: str


class Lost(Event, frozen=True, array_like=True, tag="lost"):
    """The connection to the measurer ended: what was read before counts no more."""


class Shut(Event, frozen=True, array_like=True, tag="shut"):
    """The gate is shut for all, or (empty) no longer."""

    why: str


class Executed(Event, frozen=True, array_like=True, tag="executed"):
    number: int


class Durable(Event, frozen=True, array_like=True, tag="durable"):
    """What the ledger holds has reached the disk."""


class Checking(Event, frozen=True, array_like=True, tag="checking"):
    """The TPM is asked for its PCRs, signed or read, for what was executed since the last time."""

    number: int


class Checked(Event, frozen=True, array_like=True, tag="checked"):
    """It answered: `good` if these are the values that the root key is sealed to."""

    number: int
    good: bool


class Told(Event, frozen=True, array_like=True, tag="told"):
    """The caller is told something. `outcome` empty: what the execution gave, be it a result or a typed
    refusal. Else the code of the refusal that was given instead."""

    number: int
    outcome: str
    ledger: int
    """Number of the answer's entry; -1: it has none."""


AnyEvent = (
    Arrived | Asked | Judged | Machines | Found | Cleared | Lost | Shut | Executed | Durable | Checking
    | Checked | Told
)  # fmt: skip
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(AnyEvent)


class _TracedGate(Gate):
    """A gate whose recorder is told first."""

    recorder: Recorder

    @property  # type: ignore[override]
    def shut(self) -> str | None:
        return self.__dict__["shut"]  # type: ignore[no-any-return]

    @shut.setter
    def shut(self, why: str | None) -> None:
        if why != self.__dict__.get("shut"):
            self.recorder.note(Shut, why or "")
        self.__dict__["shut"] = why

    def arrive(self, request: Waiting) -> None:
        number, job = self.recorder.arrived(request), cast("Job", request.item)
        own = job.run, job.answer, job.refuse
        self.recorder.watch(number, job)
        try:
            super().arrive(request)
        except BaseException as error:
            # Not let in; whoever refuses it does so by itself.
            job.run, job.answer, job.refuse = own
            self.recorder.note(Told, number, getattr(error, "code", "defect"), -1)
            raise

    def guests(self, hypervisors: Iterable[Hypervisor]) -> None:
        listed = tuple(hypervisors)
        self.recorder.note(Machines, {h.vm: (h.pid, h.start_time) for h in listed})
        super().guests(listed)

    def judged(self, verdict: Verdict, *, started: int, ended: int) -> list[Refused]:
        self.recorder.note(Judged, str(verdict.component), str(verdict.status))
        return super().judged(verdict, started=started, ended=ended)

    def latch(self, component: Component, findings: tuple[Finding, ...]) -> list[Refused]:
        self.recorder.note(Found, str(component))
        return super().latch(component, findings)

    def clear(self, component: Component) -> bool:
        self.recorder.note(Cleared, str(component))
        return super().clear(component)

    def lose_measurer(self) -> None:
        self.recorder.note(Lost)
        super().lose_measurer()


class Recorder:
    """Notes events and gives each to `take`."""

    def __init__(self, take: Callable[[AnyEvent], None], now: Callable[[], int] = time.monotonic_ns) -> None:
        self._take = take
        self._now = now
        self._requests = itertools.count()
        self._checks = itertools.count()

    def note(self, kind: type[Any], *fields: object) -> None:
        self._take(kind(self._now(), *fields))

    def attach(self, gate: Gate, measuring: Any, tpm: Any) -> None:
        """Watches from now on. `measuring` and `tpm` are the parts that the gate's driver uses."""
        shut, gate.__class__ = gate.__dict__.pop("shut"), _TracedGate
        assert isinstance(gate, _TracedGate)
        gate.recorder = self
        gate.shut = shut
        measuring.ask = functools.partial(self._ask, measuring.ask)
        tpm.attest = functools.partial(self._attest, tpm, tpm.attest)

    def watch_ledger(self, ledger: Any) -> None:
        """Notes what has become durable, too."""
        ledger.sync = functools.partial(self._sync, ledger.sync)

    def _ask(self, ask: Callable[[Component], None], component: Component) -> None:
        self.note(Asked, str(component))
        ask(component)

    def _sync(self, sync: Callable[[], None]) -> None:
        sync()
        self.note(Durable)

    def _attest(self, tpm: Any, attest: Callable[..., None], head: Any, told: Callable[[Any], None]) -> None:
        number = next(self._checks)
        self.note(Checking, number)

        def answered(result: Any) -> None:
            pcrs = getattr(result, "pcrs", None)
            self.note(Checked, number, pcrs is not None and not tpm.differing(pcrs))
            told(result)

        attest(head, answered)

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def arrived(self, request: Waiting) -> int:
        """Notes the arrival; the request's number in the trace."""
        number = next(self._requests)
        caller = request.caller
        process = (caller.pid, caller.start_time)
        self.note(Arrived, number, request.arrived, request.deadline, caller.vm, process, caller.officer)
        return number

    def watch(self, number: int, job: Job) -> None:
        """Notes what becomes of the request."""
        run, answer, refuse = job.run, job.answer, job.refuse
        typed: list[BaseException] = []

        def running(now: int) -> Any:
            self.note(Executed, number)
            try:
                return run(now)
            except BaseException as error:
                typed.append(error)
                raise

        def answering(result: Any, receipt: Any, *more: Any) -> None:
            self.note(Told, number, "", getattr(receipt, "ledger", -1))
            answer(result, receipt, *more)

        def refusing(error: HostdError) -> None:
            own = any(error is one for one in typed)
            self.note(Told, number, "" if own else error.code, -1 if error.ledger is None else error.ledger)
            refuse(error)

        job.run, job.answer, job.refuse = running, answering, refusing


class Lines:
    """Keeps a trace in a file, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=1 << 16)

    def take(self, event: AnyEvent) -> None:
        self._file.write(_ENCODER.encode(event) + b"\n")

    def flush(self) -> None:
        self._file.flush()


def read_trace(path: Path) -> list[AnyEvent]:
    """What `Lines` wrote; a last line that is not complete was being written."""
    return [
        _DECODER.decode(line) for line in path.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"
    ]
