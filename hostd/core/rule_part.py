"""Base of all parts of a reference document (`hostd.core.reference`), and types they share."""

from __future__ import annotations

from typing import Annotated

import msgspec

Hex256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Switch = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen object whose every field is known."""
