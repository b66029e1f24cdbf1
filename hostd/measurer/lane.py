"""One thread beside the main one, for calls that leave the interpreter (reads of /proc, AES over page cache).

Half of the work at a time: whoever gives work to the lane does its own half and then takes the result.
Nothing else runs there, so nothing is shared but what a call is given. A reading costs half where a
second core is free. Where none is, the lane has not begun when its result is wanted: then the call is made
here, and nobody waits for a thread that waits for a core.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_Job = list[tuple["Callable[..., Any]", tuple[Any, ...]]]
"""One call, until somebody takes it out to make it."""
_NAME: Final = "lane"


class Lane:
    """Runs one call at a time. `start`, then `result`, in turn."""

    def __init__(self) -> None:
        self._process = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._job: _Job = []
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def start(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Has `call` made. Its result must be taken before the next start."""
        if self._process != os.getpid():
            # A thread does not survive fork.
            self._process = os.getpid()
            self._jobs, self._results = queue.SimpleQueue(), queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._jobs, self._results), name=_NAME, daemon=True).start()
        self._job = [(call, arguments)]
        self._jobs.put(self._job)

    def result(self) -> Any:
        """What the call gave; raises what it raised."""
        # `pop` is atomic: one of the two threads gets the call.
        try:
            call, arguments = self._job.pop()
        except IndexError:
            value, error = self._results.get()
            if error is not None:
                raise error from None
            return value
        return call(*arguments)

    def close(self) -> None:
        """Ends the thread, once it is idle."""
        if self._process == os.getpid():
            self._jobs.put(None)
        self._process = 0


def _serve(
    jobs: queue.SimpleQueue[_Job | None], results: queue.SimpleQueue[tuple[Any, BaseException | None]]
) -> None:
    while (job := jobs.get()) is not None:
        try:
            call, arguments = job.pop()
        except IndexError:
            continue
        try:
            outcome: tuple[Any, BaseException | None] = call(*arguments), None
        except Exception as error:  # noqa: BLE001 - it is raised again where the result is taken
            outcome = None, error
        del job, call, arguments
        results.put(outcome)
        del outcome
