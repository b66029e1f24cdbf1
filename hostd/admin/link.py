"""hostctl's connection to the vault: one command, one answer."""

from __future__ import annotations

import itertools
import socket
import time
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from guestlib.errors import TransportError, from_wire
from hostd.ipc import operating as adm
from hostd.ipc.channel import Channel, ChannelError, peer_of
from hostd.ipc.serving import Fault, Reply

if TYPE_CHECKING:
    from hostd.config import Config

T = TypeVar("T")
_SEQ = itertools.count(1)


class Link:
    """An open connection to `admin.sock`."""

    def __init__(self, config: Config, *, timeout_s: float) -> None:
        """Raises: TransportError, the vault is not there, or whoever serves the socket is not the vault."""
        path = config.run / "admin.sock"
        self._timeout_s = timeout_s
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(5.0)
        try:
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise TransportError(f"{path}: {error.strerror}; is the vault running?") from error
        if peer_of(sock).uid != config.uid_of("vault"):
            sock.close()
            raise TransportError(f"{path} is served by somebody who is not the vault")
        self._channel: Channel[Reply | Fault] = Channel(
            sock,
            Reply | Fault,
            max_record=adm.MAX_RECORD_BYTES,
            max_sent=adm.MAX_RECORD_BYTES,
            max_queued=adm.MAX_QUEUED_BYTES,
        )

    def ask(self, command: adm.GatedCommand | adm.UngatedCommand, result: type[T]) -> T:
        """Sends a command and waits for its result.

        Raises:
            HostdError: the vault's refusal.
            TransportError: no answer in time, or the connection ended.
        """
        seq = next(_SEQ)
        deadline = time.monotonic() + self._timeout_s
        try:
            self._channel.send(adm.Command(seq, command))
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TransportError("the vault did not answer in time")
                self._channel.sock.settimeout(left)
                self._channel.flush()
                for record in self._channel.receive():
                    if record.seq == seq:
                        return self._result(record, result)
        except ChannelError as error:
            raise TransportError(f"the vault closed the connection: {error} (are you an officer?)") from error

    @staticmethod
    def _result(record: Reply | Fault, result: type[T]) -> T:
        if isinstance(record, Fault):
            raise from_wire(record.code, record.message, record.ledger)
        return msgspec.msgpack.decode(record.result, type=result)

    def close(self) -> None:
        self._channel.close()


def plain(value: Any) -> Any:
    """A result as plain data, for `--json`."""
    return msgspec.to_builtins(value)
