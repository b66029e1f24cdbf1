"""An embedded TPM as the tests use it."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hostd.platform import swtpm
from hostd.platform.tpm import Tpm, open_tpm
from hostd.platform.tpm_files import TpmRecord
from hostd.platform.tpm_provision import provision
from hostd.platform.tpm_tcti import Link, SocketLink

NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)


@dataclass
class Embedded:
    """A running embedded TPM that is provisioned."""

    state: Path
    process: swtpm.Swtpm
    record: TpmRecord
    log: Path

    @property
    def connect(self) -> Callable[[], Link]:
        return partial(SocketLink, self.process.socket)

    def open(self, command_s: float = 20.0) -> Tpm:
        return open_tpm(self.connect, self.record, command_s=command_s)

    def restart(self) -> None:
        self.process.kill()
        self.process = swtpm.start(self.state, self.process.socket, log=self.log)


def make_embedded(directory: Path) -> Embedded:
    state, log = directory / "state", directory / "log"
    swtpm.manufacture(state, now=NOW)
    process = swtpm.start(state, directory / "sock", log=log)
    try:
        record = provision(partial(SocketLink, process.socket), command_s=20.0)
    except BaseException:
        process.kill()
        raise
    return Embedded(state, process, record, log)
