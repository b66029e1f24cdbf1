"""The boot event log's probe, on files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from guestlib.attest.eventlog import MAX_LOG_BYTES
from hostd.core.reading_boot import BootReading
from hostd.core.readings import Missing
from hostd.measurer.boot import BootProbe


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    log, command_line = tmp_path / "log", tmp_path / "cmdline"
    log.write_bytes(b"events" * 20000)
    command_line.write_text("root=/dev/vda ro \n")
    return log, command_line


def test_bytes_go_out_once(files: tuple[Path, Path]) -> None:
    probe, data = BootProbe(*files), b"events" * 20000
    digest = hashlib.sha256(data).digest()
    assert probe.read(0) == BootReading(len(data), digest, data, "root=/dev/vda ro ")
    assert probe.read(len(data)) == BootReading(len(data), digest, b"", "root=/dev/vda ro ")
    assert probe.read(7) == probe.read(0)
    probe.close()


def test_absent(files: tuple[Path, Path]) -> None:
    log, command_line = files
    log.write_bytes(b"")
    assert BootProbe(log, command_line).read(0) == Missing("the firmware left no boot event log", absent=True)
    log.unlink()
    assert BootProbe(log, command_line).read(0) == Missing("this kernel keeps no boot event log", absent=True)


def test_too_large_is_not_absent(files: tuple[Path, Path]) -> None:
    files[0].write_bytes(bytes(MAX_LOG_BYTES + 1))
    missing = BootProbe(*files).read(0)
    assert isinstance(missing, Missing)
    assert not missing.absent


def test_unreadable_is_an_error(files: tuple[Path, Path]) -> None:
    log, command_line = files
    log.unlink()
    log.mkdir()
    with pytest.raises(OSError, match="directory"):
        BootProbe(log, command_line).read(0)
