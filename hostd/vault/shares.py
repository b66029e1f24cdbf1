"""How much of a batch is one caller's (pure).

Callers share a batch evenly. Besides, while others are about, no caller has more than an eighth: a request
that just missed a batch waits until that was executed and answered, and somebody who floods the gate would
make each batch as long as may be for a neighbour who asks one thing at a time. Who is alone has it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hostd.core.callers import Caller

ABOUT_NS: Final = 1_000_000_000
"""Whoever asked something in the last second is about."""
PART: Final = 8
"""Of a batch of 1,024: 128 requests, some 5 ms on a machine of today."""


class Shares:
    """Who asked when, as far as the last second goes."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        """All of it, in units of `hostd.vault.cost`."""
        self._about: dict[Caller, int] = {}
        """When each asked last, nanoseconds; in order of that."""

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
