"""Operators ↔ vault: the channel CA, and what becomes of it.

None of these commands passes the gate: they change nobody's rights.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hostd.core.reading_types import Struct


class ShowChannel(Struct, frozen=True, tag="show-channel"):
    """`ChannelReport`."""


class RotateChannel(Struct, frozen=True, tag="rotate-channel"):
    """Another channel CA comes into force: `ChannelReport`. Recorded.

    `now`: a new one, at once; what was prepared is forgotten. `prepare`: the next one is made, and bundles
    accept it; nothing else changes. `commit`: the prepared one comes into force.
    """

    step: Literal["now", "prepare", "commit"]


ChannelCommand = ShowChannel | RotateChannel


class CaLine(msgspec.Struct, frozen=True):
    """Times are Unix seconds."""

    digest: str
    """SHA-256 of the key's SubjectPublicKeyInfo, hexadecimal."""
    not_before: int
    not_after: int


class ChannelReport(msgspec.Struct, frozen=True):
    ca: CaLine
    renews: int
    """When the vault rotates by itself, Unix seconds."""
    issued: int
    """Certificates issued since the vault's start, by this CA and by those before it."""
    next: CaLine | None = None
    """What is prepared."""
