"""Links to a TPM: bytes of a command in, bytes of its response out, always within a deadline.

The native TCTIs of tpm2-tss wait for ever, so hostd brings its own. `SocketLink` speaks to the
command socket of a swtpm, one connection for each command (a held connection shuts everybody else
out). `DeviceLink` speaks to `/dev/tpmrm0` or `/dev/tpm0` without blocking (drivers/char/tpm/
tpm-dev-common.c: a non-blocking write queues the command and poll tells of the response).

A link knows nothing of TPM commands but the ten-byte header: tag (2 bytes), size of the whole
(4 bytes, big-endian), code (4 bytes): TPM 2.0 part 1, section 18.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Final, Protocol

from hostd.platform.tpm_errors import TpmUnavailableError

MAX_RESPONSE_BYTES: Final = 4096
"""TPM2_MAX_RESPONSE_SIZE of every TPM on the market, and the size of tpm2-tss' own buffer."""
HEADER_BYTES: Final = 10
MAX_UNIX_PATH_BYTES: Final = 107


class Link(Protocol):
    """A way to a TPM."""

    @property
    def managed(self) -> bool:
        """Whether something behind the link (the kernel) flushes what a client leaves behind."""

    def exchange(self, command: bytes, deadline: float) -> bytes:
        """Sends one command and returns its response (for the caller to check).

        `deadline` is a time of the monotonic clock, in seconds.

        Raises:
            TpmUnavailableError: no TPM, connection lost, or deadline over.
        """

    def close(self) -> None:
        """Ends the link. Never blocks."""


def open_link(device: str, embedded_socket: Path | None = None) -> Link:
    """The link for the setting `tpm.device`: `swtpm`, `unix:PATH` or the path of a device.

    `embedded_socket` is where the embedded TPM of `swtpm` listens.

    Raises:
        TpmUnavailableError: `swtpm` without a socket, or a device that cannot be opened.
    """
    if device == "swtpm":
        if embedded_socket is None:
            raise TpmUnavailableError("the embedded TPM was not started")
        return SocketLink(embedded_socket)
    if device.startswith("unix:"):
        return SocketLink(Path(device.removeprefix("unix:")))
    return DeviceLink(Path(device))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TpmUnavailableError("the TPM did not answer before the deadline")
    return left


def _response_size(header: bytes) -> int:
    size = int.from_bytes(header[2:6], "big")
    if not HEADER_BYTES <= size <= MAX_RESPONSE_BYTES:
        raise TpmUnavailableError(f"the response claims a size of {size} bytes")
    return size


def check_response(response: bytes) -> None:
    """Checks that a response has a header and is as long as that says.

    Raises:
        TpmUnavailableError: it is not.
    """
    if len(response) < HEADER_BYTES or _response_size(response) != len(response):
        raise TpmUnavailableError(f"a malformed response of {len(response)} bytes")


class SocketLink:
    """The command socket of a swtpm (`--server type=unixio,path=…`)."""

    managed = False

    def __init__(self, path: Path) -> None:
        if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            raise TpmUnavailableError(f"{path}: over {MAX_UNIX_PATH_BYTES} bytes, too long for a socket")
        self._path = path

    def exchange(self, command: bytes, deadline: float) -> bytes:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_left(deadline))
                sock.connect(os.fspath(self._path))
                sock.sendall(command)
                header = self._read(sock, HEADER_BYTES, deadline)
                return header + self._read(sock, _response_size(header) - HEADER_BYTES, deadline)
        except TimeoutError as error:
            raise TpmUnavailableError(f"{self._path}: no answer before the deadline") from error
        except OSError as error:
            raise TpmUnavailableError(f"{self._path}: {error.strerror or error}") from error

    def _read(self, sock: socket.socket, count: int, deadline: float) -> bytes:
        data = b""
        while len(data) < count:
            sock.settimeout(_left(deadline))
            chunk = sock.recv(count - len(data))
            if not chunk:
                raise TpmUnavailableError(f"{self._path}: the TPM closed the connection")
            data += chunk
        return data

    def close(self) -> None:
        """Nothing is held between commands."""


class DeviceLink:
    """A TPM character device, held open: the kernel's resource manager keeps a space for each open file.

    While the driver runs a command it holds the lock that poll takes, so against a hung chip this
    deadline may be late by the driver's own; that of `TpmWorker` is not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TpmUnavailableError(f"{path}: {error.strerror}") from error
        if not stat.S_ISCHR(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise TpmUnavailableError(f"{path}: not a character device")

    @property
    def managed(self) -> bool:
        return self._path.name.startswith("tpmrm")

    def exchange(self, command: bytes, deadline: float) -> bytes:
        if self._fd < 0:
            raise TpmUnavailableError(f"{self._path}: the link was closed")
        try:
            if os.write(self._fd, command) != len(command):
                raise TpmUnavailableError(f"{self._path}: the device took only part of the command")
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            # Milliseconds, rounded up: a poll of 0 would spin.
            if not poll.poll(int(_left(deadline) * 1000) + 1):
                raise TpmUnavailableError(f"{self._path}: no answer before the deadline")
            return os.read(self._fd, MAX_RESPONSE_BYTES)
        except OSError as error:
            raise TpmUnavailableError(f"{self._path}: {error.strerror}") from error

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # close() waits for the command that runs (tpm_common_release flushes its work), which
            # is just what a hung TPM does not finish.
            threading.Thread(target=os.close, args=(fd,), daemon=True).start()
