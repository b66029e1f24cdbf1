"""What an executed operation gave: to its caller, and to the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import msgspec


@dataclass(frozen=True, slots=True)
class Done:
    """What an operation gave, and what the ledger says of it."""

    result: msgspec.Struct
    """What the caller gets."""
    tenant: str
    key: str = ""
    version: int = 0
    detail: str = ""
