"""How much of a batch is one caller's (pure).

Callers share a batch evenly. Besides, while others are about, no caller has more than an eighth: a request
that just missed a batch waits until that was executed and answered, and somebody who floods the gate would
make each batch as long as may be for a neighbour who asks one thing at a time. Who is alone has it all.

And whoever has more than such an eighth waiting lets those go first who have not, though their readings come
later: a batch of his, its quote and its second look would hold their readings up. He waits `HOLD_NS` for
that at most, and goes as soon as they are executed.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from hostd.core.callers import Caller
    from hostd.vault.waiting import Waiting

ABOUT_NS: Final = 1_000_000_000
"""Whoever asked something in the last second is about."""
PART: Final = 8
"""Of a batch of 1,024: 128 requests, some 5 ms on a machine of today."""
FLOOD: Final = 16
"""Units that anybody may have waiting, however small the batch."""
HOLD_NS: Final = 25_000_000
"""Twice the readings of a request, on two busy cores."""
_COST: Final = attrgetter("cost")


class Shares:
    """Who asked when, as far as the last second goes."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        """All of it, in units of `hostd.vault.cost`."""
        self._about: dict[Caller, int] = {}
        """When each asked last, nanoseconds; in order of that."""
        self._flooding: frozenset[Caller] = frozenset()
        self._held_since: int | None = None
        """Since when somebody of those is held back; from the first time since one of them went."""

    def arrived(self, caller: Caller, at: int) -> None:
        """A request of the caller arrived; `at` never goes back."""
        self._about.pop(caller, None)
        self._about[caller] = at

    def of_each(self, now: int, waiting: int) -> int:
        """The most that one of so many callers who wait may have in the batch that is taken now."""
        while self._about:
            caller, at = next(iter(self._about.items()))
            if at > now - ABOUT_NS:
                break
            del self._about[caller]
        alone = len(self._about) < 2 and waiting < 2
        return max(1, self.batch // max(waiting, 1 if alone else PART))

    def held(
        self, now: int, queues: Mapping[Caller, Sequence[Waiting]], without: Collection[Caller]
    ) -> frozenset[Caller]:
        """Those who flood the gate, while others wait who do not. Nobody is held back for who is `without`:
        his turn is not now."""
        if len(queues) < 2:
            self._flooding = frozenset(queues)
            return frozenset()
        most = max(FLOOD, self.batch // PART)
        self._flooding = frozenset(
            caller
            for caller, requests in queues.items()
            if len(requests) > most or sum(map(_COST, requests)) > most
        )
        if not self._flooding or all(c in self._flooding or c in without for c in queues):
            return frozenset()
        if self._held_since is None:
            self._held_since = now
        return self._flooding if now - self._held_since < HOLD_NS else frozenset()

    def took(self, callers: frozenset[Caller]) -> None:
        """These are in the batch that was taken."""
        if callers & self._flooding:
            self._held_since = None
