"""A whole hostd with another program for its vault, which a test or the benchmark is made of.

`python -m MODULE run CONFIG` stands in for `hostd run`: the same roles under the same supervisor, but the
vault is `python -m MODULE vault CONFIG`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hostd import supervisor
from hostd.config import load_config
from hostd.platform import program
from tests.e2e.harness import READY_S, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.harness import Host

ROOT = Path(__file__).resolve().parents[2]


def start(host: Host, module: str, seconds: float = READY_S) -> None:
    """Starts the host so; returns when the officers' socket answers."""
    with host.log_path.open("ab") as log:
        host.supervisor = subprocess.Popen(
            [sys.executable, "-m", module, "run", str(host.config_path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
        )
    until(host.status, "the vault answers", seconds)


def main(module: str, vault: Callable[[Path], None]) -> None:
    """The module's own entry; `vault` runs the vault of a configuration."""
    what, config_path = sys.argv[1], Path(sys.argv[2])
    if what == "vault":
        vault(config_path)
        return
    plain = program.command

    def command(*arguments: str) -> list[str]:
        if arguments[-1] == "vault":
            return [sys.executable, "-m", module, "vault", str(config_path)]
        return plain(*arguments)

    program.command = command
    supervisor.supervise(config_path, load_config(config_path))
