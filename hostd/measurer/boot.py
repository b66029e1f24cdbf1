"""The boot event log, as the kernel keeps it since boot.

Read whole each time: it is some 5 KiB to 100 KiB in the kernel's memory (securityfs). Its bytes are
handed out only to a reader that does not hold them.

Needs CAP_DAC_READ_SEARCH where the log is not root's own; no other.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Final

from guestlib.attest.eventlog import MAX_LOG_BYTES
from hostd.core.reading_boot import BootReading
from hostd.core.readings import Missing

LOG: Final = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
COMMAND_LINE: Final = Path("/proc/cmdline")
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
_READ_BYTES: Final = 1 << 16
_MAX_COMMAND_LINE: Final = 4096


class BootProbe:
    """Reads the log at `log`."""

    def __init__(self, log: Path = LOG, command_line: Path = COMMAND_LINE) -> None:
        self._log = log
        self._command_line = command_line

    def read(self, position: int) -> BootReading | Missing:
        """The log's size and digest, and its bytes unless `position` says that the reader holds them.

        Raises:
            OSError: the log is there and cannot be read.
        """
        try:
            data = _read(self._log)
        except OSError as error:
            if error.errno in _ABSENT:
                return Missing("this kernel keeps no boot event log", absent=True)
            raise
        if not data:
            return Missing("the firmware left no boot event log", absent=True)
        if len(data) > MAX_LOG_BYTES:
            return Missing(f"a boot event log of over {MAX_LOG_BYTES} bytes", absent=False)
        command_line = _read(self._command_line).decode("utf-8", "backslashreplace").rstrip("\n")
        held = position == len(data)
        return BootReading(
            size=len(data),
            sha256=hashlib.sha256(data).digest(),
            data=b"" if held else data,
            command_line=command_line[:_MAX_COMMAND_LINE],
        )

    def close(self) -> None:
        """Nothing is kept open."""


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts: list[bytes] = []
        left = MAX_LOG_BYTES + 1
        while left > 0 and (part := os.read(fd, min(left, _READ_BYTES))):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)
