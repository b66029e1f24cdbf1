"""Which file is identified next (no I/O): in turn for the components that wait for one.

A process that maps hundreds of large files waits for them itself; the files of a VM that has just started
are not behind them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from hostd.core.findings import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostd.core.findings import Component

MAX_OPEN: Final = 4
"""Files being identified at once."""
MAX_OPEN_EACH: Final = 2
"""Of them for one component."""


class Identifying:
    """The files to be identified, by number."""

    def __init__(self) -> None:
        self._waiting: dict[Component, dict[int, None]] = {}
        self._turn: deque[Component] = deque()
        self._open: dict[int, Component] = {}

    def want(self, component: Component, files: Iterable[int]) -> None:
        """The component waits for these files. (What `files` asks for is what some process waits for: it
        goes to the back once that process asks itself.)"""
        mine = self._waiting.get(component, {})
        for file in sorted(files):
            elsewhere = [c for c, theirs in self._waiting.items() if file in theirs and c != component]
            if file in self._open or any(c.kind is not Kind.FILES for c in elsewhere):
                continue
            for other in elsewhere:
                del self._waiting[other][file]
            mine[file] = None
        if mine and component not in self._waiting:
            self._waiting[component] = mine
            self._turn.append(component)

    def next(self) -> int | None:
        """The file to ask for now; it counts as asked for. None: none, or enough are open."""
        for _ in range(len(self._turn)):
            if len(self._open) >= MAX_OPEN:
                return None
            component = self._turn.popleft()
            waiting = self._waiting[component]
            if not waiting:
                del self._waiting[component]
                continue
            self._turn.append(component)
            if sum(c == component for c in self._open.values()) < MAX_OPEN_EACH:
                file = next(iter(waiting))
                del waiting[file]
                self._open[file] = component
                return file
        return None

    def done(self, file: int) -> None:
        """Its identity, or that it has none, has been learnt."""
        self._open.pop(file, None)

    def clear(self) -> None:
        self._waiting.clear()
        self._turn.clear()
        self._open.clear()
