"""Refusals that never reached execution: in the ledger before the caller sees them, and bounded.

The first refusal of a kind (caller, operation, code) in each second is an entry of its own; more of
the same in that second refer to it, and how many there were is an entry at the second's end. So a
caller that hammers on a closed gate cannot fill the disk, and nothing is unsaid.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.errors import CallerError, HostdError, RefusedDriftError
from hostd.vault.ledger import Entry
from hostd.vault.recording import job_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.vault.counters import Counters
    from hostd.vault.ledger import Ledger
    from hostd.vault.waiting import Waiting

WINDOW_S: Final = 1.0
MAX_KINDS: Final = 4096
"""Kinds remembered in one window; over it further kinds share one summary."""


@dataclass(slots=True)
class _Kind:
    seq: int
    more: int = 0


class Refusals:
    """Records and sends refusals."""

    def __init__(self, ledger: Ledger, counters: Counters, shut: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._counters = counters
        self._shut = shut
        self._kinds: dict[tuple[str, str, str], _Kind] = {}
        self._pending: list[tuple[Callable[[HostdError], None], HostdError, _Kind]] = []

    def refuse(
        self,
        principal: str,
        op: str,
        error: HostdError,
        answer: Callable[[HostdError], None],
        passed: int = 0,
    ) -> None:
        """Queues a refusal; `flush` makes it durable and sends it."""
        self._counters.count("hostd_requests_total", op=op, outcome=error.code)
        place = (principal, op, error.code)
        if place not in self._kinds and len(self._kinds) >= MAX_KINDS:
            place = ("", "", "")
        kind = self._kinds.get(place)
        if kind is None:
            kind = self._kinds[place] = _Kind(self._ledger.size)
            try:
                self._ledger.append(self._entry(principal, op, error, passed, ""))
            except HostdError as failure:
                self._shut(failure.message)
        else:
            kind.more += 1
        self._pending.append((answer, error, kind))

    def refuse_waiting(self, request: Waiting, error: HostdError) -> None:
        """Queues the refusal of a request that waited in the gate."""
        job = job_of(request)
        self.refuse(request.caller.principal, job.name, error, job.refuse)

    def _entry(self, principal: str, op: str, error: HostdError, passed: int, detail: str) -> Entry:
        outcome = (
            "refused-drift"
            if isinstance(error, RefusedDriftError)
            else "denied"
            if isinstance(error, CallerError)
            else "failed"
        )
        return Entry(
            seq=self._ledger.size,
            time=time.time_ns() // 1_000_000,
            event="operation" if op else "refusals",
            outcome=outcome,
            passed=passed,
            principal=principal,
            op=op,
            code=error.code,
            detail=detail,
        )

    def flush(self) -> None:
        """Makes what is queued durable, then sends it. The refusal leaves even if the ledger fails:
        it carries nothing, and the gate is then shut."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        try:
            self._ledger.sync()
            recorded = True
        except HostdError as failure:
            self._shut(failure.message)
            recorded = False
        for answer, error, kind in pending:
            error.ledger = kind.seq if recorded else None
            answer(error)

    def close_window(self) -> None:
        """Once a window: says how many more there were of each kind."""
        kinds, self._kinds = self._kinds, {}
        for (principal, op, code), kind in kinds.items():
            if kind.more:
                try:
                    self._ledger.append(
                        Entry(
                            seq=self._ledger.size,
                            time=time.time_ns() // 1_000_000,
                            event="repeated",
                            outcome="refused",
                            principal=principal,
                            op=op,
                            code=code,
                            detail=f"{kind.more} more like entry {kind.seq}",
                        )
                    )
                except HostdError as failure:
                    self._shut(failure.message)
                    return
        try:
            self._ledger.sync()
        except HostdError as failure:
            self._shut(failure.message)
