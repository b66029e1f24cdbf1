"""Starting another role of hostd as a process of its own, from the very code that runs here."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Final

_ROOT: Final = str(Path(__file__).resolve().parents[2])
# Isolated (-I): no PYTHON* variable, no current folder, no user site. The folder that this code was
# loaded from comes last, so that a checkout works as an installation does.
_PROGRAM: Final = "import sys; sys.path.append(sys.argv.pop(1)); from hostd.__main__ import main; main()"


def command(*arguments: str) -> list[str]:
    """argv of `hostd ARGUMENTS…` under this interpreter."""
    return [sys.executable, "-I", "-c", _PROGRAM, _ROOT, *arguments]


_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """In a child, before exec: SIGTERM when the thread of `parent` that started it ends (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
