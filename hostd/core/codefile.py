"""Which files on a disk hold code, as far as reference values are concerned (pure).

A regular file does if it has an execute bit, or if its name says what runs without one: shared objects,
kernel modules, Python (and what tells it where to look for more), and the firmware and option ROMs that
QEMU loads.
"""

from __future__ import annotations

import re
from typing import Final

_CODE: Final = re.compile(
    rb".*(\.so(\.[0-9.]+)?|\.ko(\.(xz|zst|gz))?|\.py|\.pyc|\.pth|\.bin|\.rom|\.fd)|pyvenv\.cfg", re.DOTALL
)
EXECUTE_BITS: Final = 0o111


def holds_code(name: bytes, mode: int) -> bool:
    """Whether a regular file of this base name and permission bits is one that reference values name."""
    return bool(mode & EXECUTE_BITS) or _CODE.fullmatch(name) is not None
