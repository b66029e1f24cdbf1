"""Ends this process by SIGKILL at the N-th thing that it does."""

from __future__ import annotations

import os
import signal
from typing import Any


class Deaths:
    """Counts what is done."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def point(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, thing: Any, name: str) -> None:
        done = getattr(thing, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            self.point()
            result = done(*arguments, **more)
            self.point()
            return result

        setattr(thing, name, wrapped)
