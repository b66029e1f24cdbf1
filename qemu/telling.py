"""Tells a demonstration on a terminal: numbered steps, commands and what they answered."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

_BOLD: Final = "1"
_DIM: Final = "2"
_RED: Final = "31"
_GREEN: Final = "32"
_CYAN: Final = "36"


class Teller:
    """Writes to ``out``; with colours if that is a terminal and NO_COLOR is not set."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._colours = out.isatty() and not os.environ.get("NO_COLOR")
        self._started = time.monotonic()
        self._steps = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A numbered step, and how long it took."""
        self._steps += 1
        start = time.monotonic()
        self._line(self._paint(_BOLD, f"\n{self._steps}. {title}"))
        yield
        took, total = time.monotonic() - start, self.seconds
        self._line(self._paint(_DIM, f"   ({took:.1f} s; {total:.0f} s since the start)"))

    def say(self, text: str) -> None:
        """A sentence."""
        self._line(f"   {text}")

    def good(self, text: str) -> None:
        """Something is as it must be."""
        self._line("   " + self._paint(_GREEN, f"ok  {text}"))

    def bad(self, text: str) -> None:
        """Something was refused, or has drifted."""
        self._line("   " + self._paint(_RED, text))

    def command(self, where: str, text: str) -> None:
        """A command as it is typed, before it runs."""
        self._line("   " + self._paint(_CYAN, f"{where}{text}"))

    def output(self, text: str | Iterable[str]) -> None:
        """What a command answered."""
        for line in text.splitlines() if isinstance(text, str) else text:
            self._line(f"     {line.rstrip()}")

    def _line(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours else text
