"""One file under two names: what one process calls it is not held against the others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostd.core.findings import Status
from hostd.core.readings import EXEC, READ
from tests.measurer.test_relro import assert_good, verdict
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from tests.support.watched import Watched

pytestmark = pytest.mark.qemu
LIBRARY = Path(os.path.realpath("/usr/lib/x86_64-linux-gnu/libpixman-1.so.0"))


def test_another_name_later(watched: Watched, binary: Path, memory_directory: Path) -> None:
    library = memory_directory / "libpixman-1.so.0"
    shutil.copy(LIBRARY, library)
    with qemu.running(binary, env={"LD_LIBRARY_PATH": str(memory_directory)}) as vm:
        watched.approve()
        watched.assert_good(vm.uuid)
        assert_good(watched, vm)
        os.link(library, memory_directory / "other.so")
        with qemu.running(binary) as other:
            # A range that is new has the file identified again, under the name it has here.
            tamper.map_file(other.pid, memory_directory / "other.so", length=8192)
            watched.verdicts(other.uuid)
            verdict(watched, other)
            watched.assert_good(vm.uuid)
            assert_good(watched, vm)


def test_another_name_first(watched: Watched, binary: Path, memory_directory: Path) -> None:
    library = memory_directory / "libpixman-1.so.0"
    shutil.copy(LIBRARY, library)
    env = {"LD_LIBRARY_PATH": str(memory_directory)}
    with qemu.running(binary, env=env):
        reference = watched.approve()
    twin = memory_directory / "twin"
    shutil.copy(LIBRARY, twin)
    twin.rename(library)
    aside = memory_directory / "aside"
    aside.mkdir()
    os.link(library, aside / "other.so")
    with qemu.running(binary) as other:
        tamper.map_file(other.pid, aside / "other.so")
        watched.use(reference)
        assert watched.verdicts(other.uuid)[3].status is Status.DRIFTED
        verdict(watched, other)
        with qemu.running(binary, env=env) as vm:
            assert tamper.mapping(vm.pid, str(library), READ | EXEC)
            watched.assert_good(vm.uuid)
            assert_good(watched, vm)
