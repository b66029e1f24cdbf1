"""How much a caller may ask for of what is answered at once, beside the gate (pure).

A bucket per caller and one for all: each fills with time up to its burst, each question takes its cost.
"""

from __future__ import annotations

from typing import Final

from guestlib.errors import OverloadedError

PER_SECOND: Final = 200
"""Units of one caller, of some 50 us: a flood takes about 1 % of the vault."""
BURST: Final = 400
ALL_PER_SECOND: Final = 2000
"""Units of all callers together: a tenth of the vault's time."""
ALL_BURST: Final = 4000
MAX_CALLERS: Final = 4096
"""Remembered; over it those whose buckets are full again are forgotten. If none is, nobody new is served."""


class _Bucket:
    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate: int, burst: int, now: int) -> None:
        self._rate = rate / 1e9
        self._burst = burst
        self._level = float(burst)
        self._at = now

    def level(self, now: int) -> float:
        if now > self._at:
            self._level = min(self._burst, self._level + (now - self._at) * self._rate)
            self._at = now
        return self._level

    def full(self, now: int) -> bool:
        return self.level(now) >= self._burst

    def take(self, cost: int) -> None:
        self._level -= cost


class Allowance:
    """Times are nanoseconds of one monotonic clock."""

    def __init__(self) -> None:
        self._callers: dict[str, _Bucket] = {}
        self._all = _Bucket(ALL_PER_SECOND, ALL_BURST, 0)

    def take(self, principal: str, cost: int, now: int) -> None:
        """Raises: OverloadedError, the caller (or all of them) asked for too much of late."""
        bucket = self._callers.get(principal)
        if bucket is None:
            if len(self._callers) >= MAX_CALLERS:
                self._callers = {who: b for who, b in self._callers.items() if not b.full(now)}
            if len(self._callers) >= MAX_CALLERS:
                raise OverloadedError("too many callers ask for receipts")
            bucket = self._callers[principal] = _Bucket(PER_SECOND, BURST, now)
        if bucket.level(now) < cost or self._all.level(now) < cost:
            raise OverloadedError("too many questions about receipts; try again in a moment")
        bucket.take(cost)
        self._all.take(cost)
