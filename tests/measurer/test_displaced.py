"""Approved files that are not mapped as they are linked: each byte is the file's, and the code is not."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest

from hostd.core.codes import Code
from hostd.core.findings import Status
from hostd.core.readings import EXEC, READ, WRITE
from tests.measurer.test_relro import assert_good, verdict
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from hostd.platform.procfs import Vma
    from tests.support.watched import Watched

pytestmark = pytest.mark.qemu
FIXED = mmap.MAP_PRIVATE | 0x10
ANONYMOUS = FIXED | mmap.MAP_ANONYMOUS
PAGE = 4096


def constants(pid: int, name: str) -> Vma:
    """The mapping of `.rodata`: behind the code, read-only."""
    text = tamper.mapping(pid, name, READ | EXEC)
    return next(
        v for v in tamper.maps(pid) if v.name == text.name and v.offset > text.offset and v.protection == READ
    )


def remap(pid: int, at: int, name: str, protection: int, offset: int) -> None:
    with tamper.scratch(pid, name.encode() + b"\0") as path:
        fd = tamper.syscall(pid, tamper.SYS_OPEN, path, os.O_RDONLY, 0)
    tamper.syscall(pid, tamper.SYS_MMAP, at, PAGE, protection, FIXED, fd, offset)


def assert_named(watched: Watched, vm: qemu.Vm, address: int) -> None:
    found = verdict(watched, vm)
    assert found.status is not Status.VERIFIED
    assert any(
        item.code == Code.RELRO_UNCOVERED and f"{address:#x}" in item.seen for item in found.findings
    ), found


@pytest.mark.parametrize("name", ["libglib", "qemu-under-test"])
def test_code_of_the_same_file_from_elsewhere(watched: Watched, vm: qemu.Vm, name: str) -> None:
    """One function in the place of another, both approved."""
    watched.approve()
    assert_good(watched, vm)
    text = tamper.mapping(vm.pid, name, READ | EXEC)
    at = text.start + 3 * PAGE
    remap(vm.pid, at, text.name, mmap.PROT_READ | mmap.PROT_EXEC, text.offset + 8 * PAGE)
    assert_named(watched, vm, at)
    remap(vm.pid, at, text.name, mmap.PROT_READ | mmap.PROT_EXEC, text.offset + 3 * PAGE)
    assert_good(watched, vm)


def test_code_where_its_file_has_data(watched: Watched, vm: qemu.Vm) -> None:
    """Code that finds its data by its own address finds other data there."""
    watched.approve()
    assert_good(watched, vm)
    text = tamper.mapping(vm.pid, "qemu-under-test", READ | EXEC)
    data = next(v for v in tamper.maps(vm.pid) if v.name == text.name and v.protection & WRITE)
    at = data.end - PAGE
    remap(vm.pid, at, text.name, mmap.PROT_READ | mmap.PROT_EXEC, text.offset)
    assert_named(watched, vm, at)


@pytest.mark.parametrize("name", ["libglib", "qemu-under-test"])
def test_constants_of_no_file(watched: Watched, vm: qemu.Vm, name: str) -> None:
    """Anonymous memory with an altered copy of them, among which are the tables of jumps."""
    watched.approve()
    assert_good(watched, vm)
    at = constants(vm.pid, name).start + PAGE
    was = tamper.read(vm.pid, at, PAGE)
    tamper.syscall(vm.pid, tamper.SYS_MMAP, at, PAGE, mmap.PROT_READ, ANONYMOUS, -1, 0)
    tamper.write(vm.pid, at, was[:-1] + b"\xff")
    assert_named(watched, vm, at)


def test_altered_code_that_nobody_may_read_now(watched: Watched, vm: qemu.Vm) -> None:
    """Who handles the fault gives it back for as long as it runs."""
    watched.approve()
    assert_good(watched, vm)
    at = tamper.mapping(vm.pid, "libglib", READ | EXEC).start + 3 * PAGE
    tamper.write(vm.pid, at, b"\xcc")
    tamper.syscall(vm.pid, tamper.SYS_MPROTECT, at, PAGE, 0)
    assert_named(watched, vm, at)


def test_protected_data_in_memory_of_no_file(watched: Watched, vm: qemu.Vm) -> None:
    """The same words, where the process may write."""
    watched.approve()
    assert_good(watched, vm)
    # QEMU's own would be missed at once.
    text = tamper.mapping(vm.pid, "libgnutls", READ | EXEC)
    protected = [v for v in tamper.maps(vm.pid) if v.name == text.name and v.protection == READ][-1]
    at = protected.start + PAGE
    was = tamper.read(vm.pid, at, PAGE)
    tamper.syscall(vm.pid, tamper.SYS_MMAP, at, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, ANONYMOUS, -1, 0)
    tamper.write(vm.pid, at, was)
    assert_named(watched, vm, at)
