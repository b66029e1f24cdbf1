"""Those who want to see fresh readings, good or bad, and use no key: health and evidence (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guestlib.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostd.core.callers import Caller
    from hostd.vault.waiting import Waiting

MAX_PER_CALLER: Final = 16


class Observers:
    """A bounded queue of them."""

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    def add(self, observer: Waiting) -> None:
        """Raises:
        OverloadedError: the caller has too many.
        """
        if sum(o.caller == observer.caller for o in self._waiting) >= MAX_PER_CALLER:
            raise OverloadedError("too many requests for evidence are waiting")
        self._waiting.append(observer)

    def take(self, now: int, seen: Callable[[Waiting], bool]) -> list[Waiting]:
        """Removes and returns those who have seen everything, or whose time is over."""
        ready = [o for o in self._waiting if o.deadline <= now or seen(o)]
        if ready:
            gone = set(map(id, ready))
            self._waiting = [o for o in self._waiting if id(o) not in gone]
        return ready

    def leave(self, caller: Caller) -> None:
        """Forgets a caller's."""
        self._waiting = [o for o in self._waiting if o.caller != caller]
