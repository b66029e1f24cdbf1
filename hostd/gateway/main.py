"""The gateway role: listeners, the link to the vault, and the broker between them.

The vault is accepted only as the configured user (SO_PEERCRED). While it is away connections are
closed at once and the link is tried again, at slowly growing intervals: guests do not wait for long once it
is there.
"""

from __future__ import annotations

import resource
import socket
import sys
from typing import TYPE_CHECKING, Final

from hostd.gateway import listeners
from hostd.gateway.broker import Broker
from hostd.ipc.channel import Channel, peer_of
from hostd.ipc.loop import Loop
from hostd.ipc.serving import ToBroker
from hostd.platform import confine
from hostd.platform.notify import READY, WATCHDOG, notify, watchdog_interval

if TYPE_CHECKING:
    from pathlib import Path

    from hostd.config import Config

RETRY_FIRST_S: Final = 0.02
RETRY_LAST_S: Final = 5.0
RETRY_GROWTH: Final = 1.25
"""The vault, whose start takes the longest of all roles', is noticed after a quarter more than it took."""
CONNECT_S: Final = 1.0
EXHAUSTED_S: Final = 1.0
"""Pause in accepting when the process is out of descriptors."""


def say(text: str) -> None:
    print(f"hostd gateway: {text}", file=sys.stderr, flush=True)


class VaultLink:
    """Keeps the broker attached to the vault."""

    def __init__(self, loop: Loop, broker: Broker, path: Path, uid: int) -> None:
        self._loop = loop
        self._broker = broker
        self._path = path
        self._uid = uid
        self._delay = RETRY_FIRST_S

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONNECT_S)
            sock.connect(str(self._path))
            peer = peer_of(sock)
        except OSError as error:
            sock.close()
            self._again(error.strerror or "timed out")
            return
        if peer.uid != self._uid:
            sock.close()
            self._again(f"its user is uid {peer.uid}, not {self._uid}")
            return
        say("the vault is there")
        self._delay = RETRY_FIRST_S
        self._broker.attach(Channel(sock, ToBroker), self._lost)

    def _lost(self) -> None:
        self._again("it closed the link")

    def _again(self, reason: str) -> None:
        if self._delay == RETRY_FIRST_S:
            say(f"no vault at {self._path}: {reason}; trying again")
        self._loop.call_after(self._delay, self.connect)
        self._delay = min(RETRY_GROWTH * self._delay, RETRY_LAST_S)


def run(config: Config) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        OSError: a listener cannot be made.
        ConfigError: the vault's user does not exist.
        ConfineError: workers cannot be closed in on this host.
    """
    confine.undumpable()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = Loop()
    loop.stop_on_signals()
    broker = Broker(loop, config.gateway, confine.compile_filter(), say)
    sockets: list[socket.socket] = []
    try:
        if config.gateway.unix_socket:
            sockets.append(listeners.listen_unix(config.run / "guest.sock"))
        if config.gateway.vsock_port:
            sockets.append(listeners.listen_vsock(config.gateway.vsock_port))
        for listener in sockets:
            _watch(loop, broker, listener)
        VaultLink(loop, broker, config.run / "broker.sock", config.uid_of("vault")).connect()
        _keep_alive(loop)
        notify(READY)
        loop.run()
    finally:
        for listener in sockets:
            listener.close()
        broker.close()
        loop.close()


def _keep_alive(loop: Loop) -> None:
    """Tells systemd's watchdog that the loop turns, if there is one."""
    interval = watchdog_interval()
    if interval is not None:
        notify(WATCHDOG)
        loop.call_after(interval, lambda: _keep_alive(loop))


def _watch(loop: Loop, broker: Broker, listener: socket.socket) -> None:
    def ready(_events: int) -> None:
        try:
            for sock, caller in listeners.accept(listener):
                broker.knock(sock, caller)
        except listeners.ExhaustedError as error:
            # Watching on would spin: the connection keeps waiting in the backlog.
            say(f"no new connections for now: {error}")
            loop.forget(listener)
            loop.call_after(EXHAUSTED_S, lambda: loop.watch(listener, ready))

    loop.watch(listener, ready)
