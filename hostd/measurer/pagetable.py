"""Reads the page table of a process, in parts that two threads share.

Needs CAP_SYS_PTRACE, and CAP_SYS_ADMIN for the frames.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hostd.platform.procfs import ProcessGoneError

if TYPE_CHECKING:
    from hostd.platform.pages import Spans
    from hostd.platform.procfs import ProcessHandle


class PageTable:
    """A process's page table while it is read, by one thread or two."""

    def __init__(self, handle: ProcessHandle, spans: Spans) -> None:
        self._spans = spans
        self._left = list(enumerate(spans.parts()))
        self._read = [b""] * len(self._left)
        self._fd = handle.open("pagemap")

    def __enter__(self) -> PageTable:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self) -> None:
        """Reads the next part until there is none left.

        Raises:
            ProcessGoneError: it cannot be read.
        """
        while True:
            # `pop` is atomic: each part is one thread's.
            try:
                number, part = self._left.pop()
            except IndexError:
                return
            try:
                self._read[number] = self._spans.read(self._fd, part)
            except OSError as error:
                raise ProcessGoneError("its page table cannot be read") from error

    def entries(self) -> bytes:
        """All entries, once every part was read.

        Raises:
            ProcessGoneError: there is no page table any more.
        """
        entries = self._spans.joined(self._read)
        if entries is None:
            raise ProcessGoneError("its page table is gone")
        return entries


def entries_of(handle: ProcessHandle, spans: Spans) -> bytes:
    """All entries, read here.

    Raises:
        ProcessGoneError: the process has ended.
    """
    with PageTable(handle, spans) as table:
        table.read()
        return table.entries()
