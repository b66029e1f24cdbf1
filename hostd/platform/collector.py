"""Python's garbage collector in a role that answers within milliseconds.

What a role has imported and made before it serves is never garbage, and a full collection looks through all
of it again: 60,000 objects and 35 ms in a vault, in the middle of somebody's request. So it is put aside
once (gc.freeze), and what is left is looked through seldom. Reference counting frees nearly everything at
once; the collector is for cycles, which an exception's traceback may make.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 10_000
"""Objects made and not freed since the last collection of the youngest."""
MIDDLE: Final = 10
FULL: Final = 100
"""A full collection after so many of the middle ones: some million objects that outlived two of them."""


def settle() -> None:
    """What exists now stays: it is not looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, FULL)
