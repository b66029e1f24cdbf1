"""`hostd run`: every role as its own process under one small supervisor.

For development, demonstrations and tests; production uses the systemd units. Same code, same
sockets, same checks. If the TPM is the embedded one it is started first and stopped last. A role,
or the TPM, that dies is started again after a growing delay; the gate is closed meanwhile, because each role
that another needs is missed at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from hostd.platform import program

if TYPE_CHECKING:
    from pathlib import Path

    from hostd.config import Config
    from hostd.platform.swtpm import Swtpm

ROLES: Final = ("measurer", "vault", "gateway", "metrics")
FIRST_DELAY_S: Final = 0.1
LAST_DELAY_S: Final = 5.0
CALM_S: Final = 10.0
"""A role that lived so long starts again without delay."""
STOP_S: Final = 5.0


class _Role:
    def __init__(self, name: str, argv: list[str], uid: int) -> None:
        self.name = name
        self._argv = argv
        self._uid = uid
        self._delay = FIRST_DELAY_S
        self.process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._not_before = 0.0

    def tend(self, now: float) -> None:
        """Starts the role if it should run and does not."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return
            calm = now - self._started > CALM_S
            self._delay = FIRST_DELAY_S if calm else min(self._delay * 2, LAST_DELAY_S)
            self._not_before = now + self._delay
            print(f"hostd: {self.name} ended ({code}); again in {self._delay:.1f} s", file=sys.stderr)
            self.process = None
        if now >= self._not_before:
            as_other = self._uid != os.geteuid()
            self.process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                user=self._uid if as_other else None,
                group=self._uid if as_other else None,
                extra_groups=[] if as_other else None,
                preexec_fn=partial(program.die_with_parent, os.getpid()),
            )
            self._started = now


def supervise(config_path: Path, config: Config) -> None:
    """Runs until SIGTERM or SIGINT; ends what it started."""
    config.run.mkdir(mode=0o755, parents=True, exist_ok=True)
    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    tpm = _start_tpm(config) if config.tpm.device == "swtpm" else None
    roles = [
        _Role(name, program.command("--config", str(config_path), name), _uid(config, name)) for name in ROLES
    ]
    _write_pids(config, roles)
    try:
        while not stopping:
            now = time.monotonic()
            if tpm is not None and tpm.ended():
                print("hostd: the embedded TPM ended; again", file=sys.stderr)
                time.sleep(FIRST_DELAY_S)
                tpm = _start_tpm(config)
            before = [r.process and r.process.pid for r in roles]
            for role in roles:
                role.tend(now)
            if before != [r.process and r.process.pid for r in roles]:
                _write_pids(config, roles)
            time.sleep(0.05)
    finally:
        _stop(roles)
        if tpm is not None:
            tpm.stop()


def _start_tpm(config: Config) -> Swtpm:
    """The embedded TPM, for the vault's user.

    Raises:
        TpmError: it does not start; without a TPM there is nothing to run.
    """
    from hostd.platform import swtpm

    tpm = swtpm.start(config.state / "swtpm", config.run / "swtpm.sock")
    os.chown(config.run / "swtpm.sock", config.uid_of("vault"), -1)
    return tpm


def _uid(config: Config, name: str) -> int:
    match name:
        case "measurer":
            return config.uid_of("measurer")
        case "vault":
            return config.uid_of("vault")
        case "gateway":
            return config.uid_of("gateway")
        case _:
            return config.uid_of("metrics")


def _write_pids(config: Config, roles: list[_Role]) -> None:
    """`pids` in the run directory: a line `role pid` each, for people and tests."""
    text = "".join(f"{r.name} {r.process.pid}\n" for r in roles if r.process is not None)
    temporary = config.run / ".pids"
    temporary.write_text(text)
    temporary.replace(config.run / "pids")


def _stop(roles: list[_Role]) -> None:
    deadline = time.monotonic() + STOP_S
    for role in reversed(roles):
        if role.process is not None:
            role.process.terminate()
    for role in reversed(roles):
        if role.process is None:
            continue
        try:
            role.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            role.process.kill()
            role.process.wait()
