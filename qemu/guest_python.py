"""A Python session in a guest, with a hostd client in it: the outside of ``guest_shell.py``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qemu.guest import Guest
from qemu.service import TRUST

SHELL: Final = Path(__file__).with_name("guest_shell.py")
REMOTE: Final = "/root/guest_shell.py"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one expression."""

    ok: bool
    shown: str  # the value's repr, or the error
    code: str  # of a refusal
    ms: float
    passed: int | None
    ledger: int | None
    value: Any


class GuestPython:
    """One process in the guest; its client connects at the first use and stays connected."""

    def __init__(self, guest: Guest) -> None:
        guest.put(SHELL, REMOTE)
        self._process = guest.start_command(["python3", REMOTE, TRUST])
        self._read = 0

    def ask(self, code: str, timeout: float = 90.0) -> Answer:
        """Evaluate an expression, or ``name = expression``."""
        self._process.write(json.dumps({"code": code}).encode() + b"\n")
        text = self._process.wait_for_line(self._read, timeout)
        self._read += 1
        said = json.loads(text)
        return Answer(
            ok=said["ok"],
            shown=said["shown"],
            code=said["code"],
            ms=said["ms"],
            passed=said["pass"],
            ledger=said["ledger"],
            value=said.get("value"),
        )

    def close(self) -> None:
        """End the process."""
        self._process.end_input()
