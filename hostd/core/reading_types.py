"""Types that all readings are made of, with their bounds.

Readings are MessagePack arrays; every string, byte string and list in one has a limit here or at its
field. Addresses, offsets and lengths are bytes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

WINDOW_BYTES = 16
"""Bytes shown on each side of a difference."""

Name = Annotated[str, msgspec.Meta(max_length=4096)]
Label = Annotated[str, msgspec.Meta(max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Address = Annotated[int, msgspec.Meta(ge=0)]
"""Of a process or of the kernel: up to 2^64 - 1 (MessagePack's own bound)."""
Tag = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Sha256 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Window = Annotated[bytes, msgspec.Meta(max_length=2 * WINDOW_BYTES)]


class Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all readings."""
