"""What the ledger says of a batch: its pass, then each request, with commitments to request and answer.

Written once everything has been executed, so that the entries of a batch stand together and the `pass`
entry before them tells how many there are. A commitment hides what it commits to: its salt is derived
from ROOT (`Keyring.salt`) and leaves only with the caller's own receipt.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from guestlib.attest.canonical import commitment
from guestlib.errors import CallerError, HostdError
from hostd.ipc.canonical import answer_bytes, request_bytes
from hostd.vault.ledger import Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.ipc import operations as ops
    from hostd.ipc.serving import Receipt
    from hostd.vault.done import Done
    from hostd.vault.keyring import Keyring
    from hostd.vault.ledger import Ledger
    from hostd.vault.membership import Membership
    from hostd.vault.waiting import Pass, Waiting

MAX_RUNS: Final = 512
"""Runs of entries that one `withheld` entry names, some 12 KiB; the rest follow in entries of their own."""


@dataclass(slots=True)
class Job:
    """A gated request as the pipeline sees it. `run` executes it (raising the typed refusal)."""

    name: str
    mutates: bool
    shreds: bool
    run: Callable[[int], Done]
    answer: Callable[[Any, Receipt], None]
    refuse: Callable[[HostdError], None]
    operation: ops.GatedOperation | None = None
    """A guest's; None for an officer's command, to which nothing is committed."""
    full: bool = False
    """The caller wants its receipt whole, with the answer."""


@dataclass(slots=True)
class Executed:
    """A request that was executed: either `done` or `error`. `seq` is its ledger entry."""

    request: Waiting
    done: Done | None
    error: HostdError | None
    seq: int = -1


def job_of(request: Waiting) -> Job:
    assert isinstance(request.item, Job)
    return request.item


class Recorder:
    """Makes the entries of batches."""

    def __init__(self, ledger: Ledger, keyring: Keyring, membership: Membership) -> None:
        self._ledger = ledger
        self._keyring = keyring
        self._membership = membership

    def record(self, passed: Pass, evidence: bytes, executed: list[Executed], wall: int) -> int:
        """Appends the pass and the entries of `executed` (not durable yet); the pass's entry number.

        Raises:
            LedgerError: the ledger takes no more.
            UnavailableError: the keys went away meanwhile.
        """
        ledger = self._ledger
        first = ledger.size
        numbers = [stamp.number for _, stamp in passed.readings]
        ledger.append(
            Entry(
                seq=first,
                time=wall,
                event="pass",
                outcome="done",
                passed=passed.number,
                pass_entry=first,
                evidence=evidence,
                first_start_ns=passed.first_start,
                last_end_ns=passed.last_end,
                readings=(min(numbers), max(numbers)),
                requests=len(executed),
            )
        )
        for one in executed:
            one.seq = ledger.size
            ledger.append(self._entry(one, passed.number, first, wall))
        return first

    def _entry(self, one: Executed, number: int, pass_entry: int, wall: int) -> Entry:
        job, done, error = job_of(one.request), one.done, one.error
        principal = one.request.caller.principal
        tenant = done.tenant if done is not None else self._tenant_of(job, principal)
        request = response = b""
        if job.operation is not None and tenant:
            salt = self._keyring.salt(tenant, one.seq)
            request = commitment(salt, request_bytes(job.operation))
            if done is not None:
                response = commitment(salt, answer_bytes(done.result))
        return Entry(
            seq=one.seq,
            time=wall,
            event="operation",
            outcome="released" if done else "denied" if isinstance(error, CallerError) else "failed",
            passed=number,
            principal=principal,
            tenant=tenant,
            op=job.name,
            key=done.key if done else "",
            version=done.version if done else 0,
            code=error.code if error else "",
            detail=done.detail if done else "",
            request=request,
            response=response,
            pass_entry=pass_entry,
        )

    def _tenant_of(self, job: Job, principal: str) -> str:
        """Whose refusal it is, if that can be said: the keys may be locked, or the binding altered."""
        with suppress(HostdError):
            if job.operation is not None and self._keyring.unlocked:
                return self._membership.tenant_of(principal) or ""
        return ""

    def withheld(self, executed: list[Executed], number: int, why: str) -> None:
        """Says, durably, that the answers of these entries never left.

        Raises:
            LedgerError: it could not be recorded.
        """
        runs = _runs(executed)
        for start in range(0, max(1, len(runs)), MAX_RUNS):
            some = runs[start : start + MAX_RUNS]
            text = ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in some)
            count = sum(last - first + 1 for first, last in some)
            self._ledger.append(
                Entry(
                    seq=self._ledger.size,
                    time=time.time_ns() // 1_000_000,
                    event="withheld",
                    outcome="withheld",
                    passed=number,
                    detail=f"{why}: {count} answers, entries {text}"[:4000],
                    withheld=tuple(some),
                )
            )
        self._ledger.sync()


def _runs(executed: list[Executed]) -> list[tuple[int, int]]:
    """First and last of each run of entries that follow each other."""
    runs: list[tuple[int, int]] = []
    for one in executed:
        if runs and one.seq == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], one.seq)
        else:
            runs.append((one.seq, one.seq))
    return runs
