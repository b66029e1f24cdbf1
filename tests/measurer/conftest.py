from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import qemu
from tests.support.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not Path(qemu.QEMU).exists():
        pytest.skip(f"{qemu.QEMU} is not installed")
    return qemu.copy_of_qemu(tmp_path_factory.mktemp("qemu"))


@pytest.fixture
def vm(binary: Path) -> Iterator[qemu.Vm]:
    with qemu.running(binary) as started:
        yield started


@pytest.fixture
def watched(binary: Path) -> Iterator[Watched]:
    watched = Watched(binary)
    yield watched
    watched.close()


@pytest.fixture
def memory_directory() -> Iterator[Path]:
    """A directory on tmpfs, where a page can be changed without a trace in the inode."""
    import tempfile

    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)
