"""Reading another process's memory through /proc/kcore."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from hostd.platform.memory import _range
from hostd.platform.pages import PAGE
from hostd.platform.procfs import ProcessGoneError


def test_a_page_out_of_memory_is_not_the_hosts_fault() -> None:
    """It cannot be brought in there. Who drops pages of its own must not make its data `absent`."""
    area = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    area.madvise(mmap.MADV_DONTNEED)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        with pytest.raises(ProcessGoneError, match="not in memory"):
            _range(-1, pagemap, [], address, memoryview(bytearray(PAGE)))
        area[0] = 1
        with pytest.raises(ProcessGoneError, match="does not show"):
            _range(-1, pagemap, [], address, memoryview(bytearray(PAGE)))
    finally:
        os.close(pagemap)
