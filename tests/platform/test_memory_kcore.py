"""Reading another process's memory through /proc/kcore."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from hostd.platform.memory import MemoryReader
from hostd.platform.pages import PAGE
from hostd.platform.procfs import ProcessGoneError


def test_a_page_out_of_memory_is_not_the_hosts_fault() -> None:
    """It cannot be brought in there. Who drops pages of its own must not make its data `absent`."""
    reader = MemoryReader()
    area = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    area.madvise(mmap.MADV_DONTNEED)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        with pytest.raises(ProcessGoneError, match="not in memory"):
            reader._range(-1, pagemap, [], address, PAGE, 0)
        area[0] = 1
        with pytest.raises(ProcessGoneError, match="does not show"):
            reader._range(-1, pagemap, [], address, PAGE, 0)
    finally:
        os.close(pagemap)
