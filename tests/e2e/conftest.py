from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import harness
from tests.support import qemu

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: it reads the memory of other processes")


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not Path(qemu.QEMU).exists():
        pytest.skip(f"{qemu.QEMU} is not installed")
    directory = tmp_path_factory.mktemp("qemu")
    return qemu.copy_of_qemu(directory)


@pytest.fixture
def vm(binary: Path) -> Iterator[qemu.Vm]:
    """The machine that runs when the baseline is taken."""
    with harness.machine(binary) as started:
        yield started


@pytest.fixture
def host(binary: Path) -> Iterator[harness.Host]:
    """A host that serves, without any machine."""
    with harness.adopted(binary) as made:
        yield made
