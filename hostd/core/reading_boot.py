"""Reading of component `boot`: the boot event log (TCG PC Client Platform Firmware Profile)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_types import Count, Name, Sha256, Struct


class BootReading(Struct, frozen=True, tag="boot"):
    """The boot event log. It does not change after boot, so its bytes come once: `data` is all of it for
    an `Ask.position` of 0, and empty for a vault that holds it already (`position` = `size`)."""

    size: Count
    """Bytes of the whole log."""
    sha256: Sha256
    """Of the whole log."""
    data: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    command_line: Name
    """/proc/cmdline of the running kernel, without the line's end."""
