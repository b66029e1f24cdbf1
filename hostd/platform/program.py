"""Starting another role of hostd as a process of its own, from the very code that runs here."""

from __future__ import annotations

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
