"""The worker: one process per caller, the only place where a guest's bytes are parsed.

It holds the plaintext of its caller's requests in flight and the key of its own TLS certificate;
no tenant key, no name of any caller, no descriptor but its loop, the broker's control socket, its
caller's channel to the vault and its guests' connections. It is closed in by
`hostd.platform.confine` before it takes the first guest byte. Who asks is decided by the channel.

It ends when the broker or the vault goes, and on any defect of its own: every connection ends with it.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from typing import TYPE_CHECKING, Final, TypeVar

from hostd.gateway import control, requests
from hostd.gateway.connection import Connection
from hostd.gateway.limits import (
    IDENTITY_S,
    REQUESTS_PER_WORKER,
    RETIRE_BEFORE_S,
    SWEEP_S,
    WAITING_BYTES_PER_WORKER,
    Limits,
)
from hostd.gateway.tls import rehearse, server_context
from hostd.ipc.channel import Channel, ChannelClosedError, ChannelError
from hostd.ipc.loop import Loop
from hostd.ipc.serving import Call, ChannelIdentity, Fault, OpenChannel, Reply, ToWorker
from hostd.platform import collector, confine

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from hostd.gateway.requests import Request

T = TypeVar("T")
_CONTROL_RECORD_BYTES: Final = 128 << 10
_IDLE_SWEEP_S: Final = 5.0
"""Between looks at the clock while there is no connection."""


class _Waiting:
    """A request that the vault has."""

    __slots__ = ("connection", "credit", "id")

    def __init__(self, connection: Connection, request: Request, credit: int) -> None:
        self.connection = connection
        self.id = request.id
        self.credit = credit


class Worker:
    """Serves the connections that come over `control` by asking `vault`."""

    def __init__(
        self,
        loop: Loop,
        control_channel: Channel[control.ToWorker],
        vault: Channel[ToWorker],
        context: ssl.SSLContext,
        limits: Limits,
        certificate_life_s: float,
    ) -> None:
        self._loop = loop
        self._control = control_channel
        self._vault = vault
        self._context = context
        self._limits = limits
        self._connections: dict[Connection, None] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._reserved = 0
        self._seq = 0
        self._calls: list[Call] = []
        self._touched: dict[Connection, None] = {}
        self._starved: dict[Connection, None] = {}
        self._ended = 0
        self._running = True
        now = time.monotonic()
        self._certificate_ends = now + certificate_life_s
        self._retire_at = self._certificate_ends - min(RETIRE_BEFORE_S, certificate_life_s / 4)
        self._retired = False
        loop.watch(control_channel, self._control_ready)
        loop.watch(vault, self._vault_ready)
        self._next_sweep = loop.call_after(_IDLE_SWEEP_S, self._sweep)

    def run(self, early: Sequence[control.ToWorker]) -> None:
        """Serves until the broker or the vault goes; `early` came on the control socket with Start."""
        self._take_control(early)
        while self._running:
            self._loop.run_once(None)
            self._end_turn()

    # ── What a connection asks of its worker ──────────────────────────────────────────────────────

    @property
    def accepts(self) -> bool:
        return (
            self._reserved < WAITING_BYTES_PER_WORKER
            and len(self._waiting) < REQUESTS_PER_WORKER
            and not self._vault.wants_write
        )

    def submit(self, connection: Connection, request: Request, credit: int) -> None:
        operation = request.operation
        assert not isinstance(operation, requests.Hello)
        self._seq += 1
        self._waiting[self._seq] = _Waiting(connection, request, credit)
        self._reserved += credit
        self._calls.append(Call(self._seq, operation, request.deadline_ms, request.receipt))

    def touched(self, connection: Connection) -> None:
        self._touched[connection] = None

    def starved(self, connection: Connection) -> None:
        self._starved[connection] = None

    def closed(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        self._touched.pop(connection, None)
        self._starved.pop(connection, None)
        self._ended += 1

    # ── Turns ─────────────────────────────────────────────────────────────────────────────────────

    def _end_turn(self) -> None:
        """One send to the vault and one to each guest for all that this wake-up brought."""
        now = time.monotonic()
        if self._starved and self.accepts:
            self._touched.update(self._starved)
            self._starved.clear()
        while self._touched:
            turn, self._touched = list(self._touched), {}
            for connection in turn:
                connection.pump(now)
            if self._calls:
                calls, self._calls = self._calls, []
                self._tell_vault(*calls)
            for connection in turn:
                connection.flush(now)
        if self._ended:
            ended, self._ended = self._ended, 0
            self._tell_broker(control.Closed(ended))

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections):
            connection.expire(now)
            if now >= self._certificate_ends:
                connection.retire()
        if not self._retired and now >= self._retire_at:
            self._retired = True
            self._tell_broker(control.Retire())
        if self._retired and now >= self._certificate_ends and not self._connections:
            self._running = False
        self._next_sweep = self._loop.call_after(SWEEP_S if self._connections else _IDLE_SWEEP_S, self._sweep)

    # ── The broker ────────────────────────────────────────────────────────────────────────────────

    def _control_ready(self, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                self._control.flush()
            self._take_control(self._control.receive())
        except ChannelError:
            self._running = False
            return
        self._loop.watch(self._control, self._control_ready, write=self._control.wants_write)

    def _take_control(self, records: Sequence[control.ToWorker]) -> None:
        for record in records:
            if not isinstance(record, control.Serve):
                raise ChannelError("Start comes once")
            descriptor = self._control.take_descriptor()
            if descriptor is None:
                raise ChannelError("a connection without its descriptor")
            self._serve(descriptor)

    def _serve(self, descriptor: int) -> None:
        sock = socket.socket(fileno=descriptor)
        if len(self._connections) >= self._limits.connections:
            sock.close()
            self._ended += 1
            return
        if not self._connections:
            self._next_sweep.cancel()
            self._next_sweep = self._loop.call_after(SWEEP_S, self._sweep)
        connection = Connection(sock, self._context, self._limits, self._loop, self, time.monotonic())
        self._connections[connection] = None

    def _tell_broker(self, record: control.FromWorker) -> None:
        try:
            self._control.send(record)
        except ChannelError:
            self._running = False
            return
        if self._control.wants_write:
            self._loop.watch(self._control, self._control_ready, write=True)

    # ── The vault ─────────────────────────────────────────────────────────────────────────────────

    def _tell_vault(self, *records: object) -> None:
        try:
            self._vault.send(*records)
        except ChannelError:
            self._running = False
            return
        if self._vault.wants_write:
            self._loop.watch(self._vault, self._vault_ready, write=True)

    def _vault_ready(self, events: int) -> None:
        wrote = self._vault.wants_write
        try:
            if wrote and events & select.EPOLLOUT:
                self._vault.flush()
            records = self._vault.receive()
        except ChannelError:
            self._running = False
            return
        for record in records:
            if isinstance(record, ChannelIdentity):
                self._running = False  # never asked for a second one
                return
            self._answer(record)
        if wrote:
            self._loop.watch(self._vault, self._vault_ready, write=self._vault.wants_write)

    def _answer(self, record: Reply | Fault) -> None:
        waiting = self._waiting.pop(record.seq, None)
        if waiting is None:
            self._running = False  # an answer to nothing: the two ends no longer agree
            return
        self._reserved -= waiting.credit
        connection = waiting.connection
        if not connection.alive:
            return
        if isinstance(record, Fault):
            data = requests.encode_error(waiting.id, record.code, record.message, record.ledger)
        else:
            data = requests.encode_result(waiting.id, record.result, record.receipt)
        connection.session.answer(waiting.credit, data)
        self._touched[connection] = None


def _receive_first(channel: Channel[T], deadline: float) -> list[T]:
    """What comes first on a channel, waited for: at least one record.

    Raises:
        ChannelError: it does not come by `deadline`, or the peer is gone.
    """
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([channel], [], [], left)[0]:
            raise ChannelError("no answer in time")
        if records := channel.receive():
            return records


def serve(control_fd: int, vault_fd: int) -> None:
    """Sets the worker up, closes the sandbox, and serves.

    Raises:
        ChannelError: broker or vault went away, or broke the protocol, before the first connection.
    """
    control_channel: Channel[control.ToWorker] = Channel(
        socket.socket(fileno=control_fd), control.ToWorker, max_record=_CONTROL_RECORD_BYTES
    )
    vault: Channel[ToWorker] = Channel(socket.socket(fileno=vault_fd), ToWorker)
    deadline = time.monotonic() + IDENTITY_S
    start, *early = _receive_first(control_channel, deadline)
    if not isinstance(start, control.Start):
        raise ChannelError("the broker did not start with Start")
    vault.send(OpenChannel())
    identity, *more = _receive_first(vault, deadline)
    if not isinstance(identity, ChannelIdentity) or more:
        raise ChannelError("the vault did not answer OpenChannel with an identity")
    life = identity.not_after - time.time()
    if life <= 0:
        raise ChannelError("the certificate has ended already")
    context = server_context(identity)
    del identity
    rehearse(context)
    worker = Worker(Loop(), control_channel, vault, context, start.limits, life)
    confine.confine(start.seccomp, descriptors=start.limits.connections + 32)
    collector.settle()
    worker.run(early)


def main(control_fd: int, vault_fd: int) -> int:
    """The process: returns its exit status."""
    try:
        serve(control_fd, vault_fd)
    except ChannelClosedError:
        return 0
    except ChannelError as error:
        print(f"hostd worker: {error}", file=sys.stderr)
        return 1
    return 0
