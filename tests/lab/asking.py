"""A guest that asks all the while."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from tests.lab.stage import ASKED

if TYPE_CHECKING:
    from tests.lab.conftest import Running

BETWEEN_ANSWERS_S = 0.2


class Asking:
    """Alice asks all the while."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.answers = 0
        self.refused: list[str] = []
        self.began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asking:
        self._python = self._running.python(self._running.alice)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._python.close()

    def answered_once_more(self, within_s: float = 90.0) -> None:
        """Waits for two answers from now on: the second was asked for after this."""
        wanted, until = self.answers + 2, time.monotonic() + within_s
        while self.answers < wanted and time.monotonic() < until:
            time.sleep(0.2)
        assert self.answers >= wanted, self.refused[-3:]

    def _ask(self) -> None:
        while not self._stop.wait(BETWEEN_ANSWERS_S):
            answer = self._python.ask(ASKED)
            if answer.ok:
                self.answers += 1
            else:
                self.refused.append(answer.code or answer.shown)
