"""The embedded TPM: a swtpm process with its state under hostd's own directory. For development.

`manufacture` makes its state once, with a P-256 endorsement key certified by a CA of its own
(`ek-ca.pem` in the state directory, for trust bundles to name). `start` runs it.

What it is not: its PCRs start at zero at each start and nobody measures a boot into them, and who can
read its state directory has its keys. There is no control channel, so nobody can reset it while it runs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Final

from hostd.platform.program import die_with_parent
from hostd.platform.tpm_errors import TpmError, TpmUnavailableError
from hostd.platform.tpm_tcti import SocketLink, check_response

CA_FILE: Final = "ek-ca.pem"
_STATE_FILE: Final = "tpm2-00.permall"
_START_S: Final = 10.0
_COMMAND_S: Final = 30.0
_STOP_S: Final = 5.0
_GET_TEST_RESULT: Final = bytes.fromhex("8001 0000000a 0000017c")
_SHUTDOWN: Final = bytes.fromhex("8001 0000000c 00000145 0000")
_CLOSE_PLATFORM_HIERARCHY: Final = bytes.fromhex(
    "8002 00000020 00000121 4000000c 00000009 40000009 0000 00 0000 4000000c 00"
)
"""TPM2_HierarchyControl(platform, platform, NO), empty password."""


def is_manufactured(state_dir: Path) -> bool:
    """Whether `manufacture` was done, to the end, in this directory."""
    return (state_dir / CA_FILE).exists() and (state_dir / _STATE_FILE).exists()


def manufacture(state_dir: Path, *, now: datetime.datetime) -> None:
    """Makes an embedded TPM's state in `state_dir`, which must not exist; it appears whole or not at all.

    Raises:
        FileExistsError: the directory is there: a TPM is never made over another.
        TpmUnavailableError: swtpm is not installed or does not start.
    """
    # Only here: who starts and stops the TPM needs no TSS in its process.
    from hostd.platform import tpm_maker

    if state_dir.exists():
        raise FileExistsError(f"{state_dir} exists")
    state_dir.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=state_dir.parent, prefix=f".{state_dir.name}."))
    try:
        # The socket's own directory is short: a path in sun_path has 107 bytes.
        with tempfile.TemporaryDirectory(prefix="hostd-tpm-") as short:
            path = Path(short) / "tpm"
            connect = partial(SocketLink, path)
            with _running(work, path):
                tpm_maker.allocate_sha256_only(connect, command_s=_COMMAND_S)
            with _running(work, path):
                made = tpm_maker.certify(connect, now=now, command_s=_COMMAND_S)
        (work / CA_FILE).write_text(ssl.DER_cert_to_PEM_cert(made.ca_certificate))
        work.rename(state_dir)
    except BaseException:
        shutil.rmtree(work)
        raise


@dataclass(slots=True)
class Swtpm:
    """A running embedded TPM."""

    process: subprocess.Popen[bytes]
    socket: Path

    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def stop(self) -> None:
        """Shuts the TPM down in order (TPM2_Shutdown, then the process), by force if it hangs."""
        if self.process.poll() is None:
            # TPM2_Shutdown(CLEAR): without it the next start counts as a power cut.
            with contextlib.suppress(TpmError):
                _command(self.socket, _SHUTDOWN, _STOP_S)
        self._end()

    def kill(self) -> None:
        """As a power cut does."""
        self.process.kill()
        self._end()

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.socket.unlink(missing_ok=True)


def start(state_dir: Path, socket_path: Path, *, log: Path | None = None) -> Swtpm:
    """Starts the embedded TPM on `socket_path` (mode 0600) and waits until it answers.

    Call it from the main thread: the process dies with the thread that started it. `log` gets every
    command and response in hex (the tests' wire tap).

    Raises:
        TpmUnavailableError: no state, swtpm is not installed, somebody serves the socket, or no answer.
    """
    if not is_manufactured(state_dir):
        raise TpmUnavailableError(f"{state_dir}: no embedded TPM was made here")
    swtpm = _spawn(state_dir, socket_path, log)
    try:
        # As firmware does before it boots the system.
        _command(socket_path, _CLOSE_PLATFORM_HIERARCHY, _COMMAND_S)
    except BaseException:
        swtpm.kill()
        raise
    return swtpm


@contextlib.contextmanager
def _running(state_dir: Path, socket_path: Path) -> Iterator[None]:
    swtpm = _spawn(state_dir, socket_path, None)
    try:
        yield
    finally:
        swtpm.stop()


def _spawn(state_dir: Path, socket_path: Path, log: Path | None) -> Swtpm:
    _clear_stale(socket_path)
    command = [
        "swtpm",
        "socket",
        "--tpm2",
        "--tpmstate",
        f"dir={state_dir},mode=0600",
        "--server",
        f"type=unixio,path={socket_path},mode=0600",
        "--flags",
        "not-need-init,startup-clear",
    ]
    if log is not None:
        command += ["--log", f"file={log},level=20"]
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        except OSError as error:
            raise TpmUnavailableError(f"swtpm: {error.strerror}") from error
        swtpm = Swtpm(process, socket_path)
        try:
            _wait_for(swtpm, said)
        except BaseException:
            swtpm.kill()
            raise
    return swtpm


def _command(path: Path, command: bytes, within_s: float) -> None:
    """One command that must succeed.

    Raises:
        TpmUnavailableError: no answer, or a refusal.
    """
    response = SocketLink(path).exchange(command, time.monotonic() + within_s)
    check_response(response)
    if any(response[6:10]):
        raise TpmUnavailableError(f"{path}: the TPM answers 0x{response[6:10].hex()}")


def _clear_stale(path: Path) -> None:
    """Removes the socket of a swtpm that is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise TpmUnavailableError(f"{path}: {error.strerror or error}") from error
    raise TpmUnavailableError(f"{path}: another process serves it")


def _wait_for(swtpm: Swtpm, said: IO[bytes]) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if swtpm.process.poll() is not None:
            said.seek(0)
            reason = said.read(4096).decode(errors="replace").strip()
            raise TpmUnavailableError(f"swtpm ended at once: {reason}")
        # The socket is there before anybody listens on it.
        with contextlib.suppress(TpmUnavailableError):
            SocketLink(swtpm.socket).exchange(_GET_TEST_RESULT, end)
            return
        time.sleep(0.005)
    raise TpmUnavailableError("swtpm did not start")
