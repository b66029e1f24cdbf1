"""The tail of IMA's binary measurement log.

The log's descriptor stays open: a read at its end continues when entries were added
(security/integrity/ima/ima_fs.c; a seq_file), so nothing is read twice. A reader that asks for
another position (a vault that started again asks for 0) makes it be opened anew and skipped to there.

Needs CAP_DAC_READ_SEARCH where the log is not root's own; no other.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from guestlib.attest.imalog import MalformedLogError, whole_entries
from hostd.core.readings import ImaReading, Missing

LOG: Final = Path("/sys/kernel/security/ima/binary_runtime_measurements")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
MAX_READING_BYTES: Final = 1 << 20
MAX_LOG_BYTES: Final = 256 << 20
"""About two million entries; a log beyond it is not read, and IMA is then not verified."""
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


class ImaProbe:
    """Reads the log at `log`."""

    def __init__(self, log: Path = LOG, boot_id: Path = BOOT_ID) -> None:
        self._log = log
        self._boot_id = boot_id
        self._fd = -1
        self._start = 0
        """Position in the log of the first byte of `_held`."""
        self._held = b""
        """Bytes read from the log and not handed out yet."""

    def read(self, position: int) -> ImaReading | Missing:
        """Whole entries from byte `position` of the log on, 1 MiB at most.

        Raises:
            OSError: the log is there and cannot be read.
        """
        try:
            self._seek(position)
        except OSError as error:
            if error.errno in _ABSENT:
                return Missing("this kernel keeps no measurement log (IMA)", absent=True)
            raise
        if position != self._start:
            return Missing(f"the log has no byte {position}", absent=False)
        more = self._fill(MAX_READING_BYTES + 1)
        try:
            # What is in them the judge looks at; here only where the last one ends.
            end = whole_entries(self._held[:MAX_READING_BYTES])
        except MalformedLogError as error:
            return Missing(f"the log is not an IMA log: {error}"[:512], absent=False)
        if not end and self._held:
            return Missing("the log ends inside an entry", absent=False)
        data, self._held = self._held[:end], self._held[end:]
        self._start += end
        return ImaReading(self._boot_id.read_text().strip()[:36], position, data, more or bool(self._held))

    def _seek(self, position: int) -> None:
        if self._fd >= 0 and position == self._start:
            return
        self.close()
        self._fd = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)
        if position > MAX_LOG_BYTES:
            return
        while self._start < position:
            self._held = b""
            if not self._fill(min(MAX_READING_BYTES, position - self._start)) and not self._held:
                return
            self._start += len(self._held)
        self._held = b""

    def _fill(self, size: int) -> bool:
        """Reads until `size` bytes are held, or the log ends; True if it may go on."""
        parts = [self._held]
        left = size - len(self._held)
        while left > 0:
            part = os.read(self._fd, left)
            if not part:
                break
            parts.append(part)
            left -= len(part)
        self._held = b"".join(parts)
        return left <= 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._start, self._held = -1, 0, b""
