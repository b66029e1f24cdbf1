"""The vault's end of the gateway: the broker's link and one channel per worker.

A channel is bound once, to the caller that the kernel named and the measurer found; records on it
never say who asks. It ends when the worker, the VM's process or the binding ends.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from guestlib.errors import HostdError, UnavailableError
from hostd.core.callers import Caller
from hostd.core.readings import Missing, ProcessReading, Reading
from hostd.ipc import serving
from hostd.ipc.channel import Channel, ChannelError
from hostd.ipc.connect import accept, listen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hostd.core.readings import Hypervisor
    from hostd.ipc.loop import Loop

MAX_CHANNELS: Final = 4096
MAX_BINDING: Final = 64
"""Callers about whom the measurer is being asked."""
MAX_UNSENT_BYTES: Final = 8 << 20
"""Answers of one worker between two sends: more than a batch of the largest has."""


class Desk(Protocol):
    """What the channels need of the vault."""

    def who(self, cid: int, pid: int, told: Callable[[Reading], None]) -> None: ...

    def identity(self) -> serving.ChannelIdentity: ...

    def on_call(self, channel: WorkerChannel, call: serving.Call, arrived: int) -> None: ...

    def on_gone(self, caller: Caller) -> None: ...

    def kick(self) -> None: ...


class WorkerChannel:
    """One worker. Answers are queued and go out together (`flush`)."""

    def __init__(self, desk: Desk, loop: Loop, sock: socket.socket, caller: Caller) -> None:
        self.caller = caller
        self._desk = desk
        self._loop = loop
        self._channel: Channel[serving.FromWorker] = Channel(
            sock, serving.FromWorker, max_record=serving.MAX_CALL_BYTES
        )
        self._opened = False
        self._out: list[object] = []
        self._out_bytes = 0
        self.closed = False
        self.on_close: Callable[[WorkerChannel], None] | None = None
        loop.watch(self._channel, self._on_events)

    def _on_events(self, _events: int) -> None:
        try:
            self._channel.flush()
            records = self._channel.receive()
            arrived = time.monotonic_ns()
            for record in records:
                self._on_record(record, arrived)
                if self.closed:
                    break
            if not self.closed:
                self._loop.watch(self._channel, self._on_events, write=self._channel.wants_write)
        except ChannelError:
            self.close()
        self._desk.kick()

    def _on_record(self, record: serving.FromWorker, arrived: int) -> None:
        if isinstance(record, serving.OpenChannel):
            # Once: a worker that was taken over must not have the vault make keys all day.
            if self._opened:
                self.close()
                return
            try:
                self._out.append(self._desk.identity())
            except HostdError:
                self.close()
                return
            self._opened = True
        elif self._opened:
            self._desk.on_call(self, record, arrived)
        else:
            self.close()

    def answer(self, seq: int, result: Any, receipt: serving.Receipt | None) -> None:
        """Queues an answer; a worker that asks for more than it may have waiting is cut off."""
        body = msgspec.msgpack.encode(result)
        self._out_bytes += len(body)
        if self._out_bytes > MAX_UNSENT_BYTES:
            self.close()
        if not self.closed:
            self._out.append(serving.Reply(seq, body, receipt))

    def refuse(self, seq: int, error: HostdError, *, named: bool = True) -> None:
        """Queues a refusal. Why the host cannot answer is for its operators: a guest gets the code, and the
        ledger entry if it is to be `named`."""
        message = "the host cannot answer now" if isinstance(error, UnavailableError) else error.message
        if not self.closed:
            self._out.append(serving.Fault(seq, error.code, message[:512], error.ledger if named else None))

    def flush(self) -> None:
        """One send for all that was answered since the last."""
        if self.closed or not self._out:
            return
        out, self._out, self._out_bytes = self._out, [], 0
        try:
            self._channel.send(*out)
            self._loop.watch(self._channel, self._on_events, write=self._channel.wants_write)
        except ChannelError:
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.forget(self._channel)
        self._channel.close()
        self._desk.on_gone(self.caller)
        if self.on_close is not None:
            self.on_close(self)


class BrokerLink:
    """Listens for the gateway's broker and binds the channels it brings."""

    def __init__(self, desk: Desk, loop: Loop, path: Path, *, gateway_uid: int) -> None:
        self._desk = desk
        self._loop = loop
        self._uid = gateway_uid
        self._listener = listen(path, mode=0o600, owner=gateway_uid)
        loop.watch(self._listener, self._on_accept)
        self._broker: Channel[serving.FromBroker] | None = None
        self._binding = 0
        self.channels: set[WorkerChannel] = set()

    def _on_accept(self, _events: int) -> None:
        accepted = accept(self._listener)
        if accepted is None:
            return
        sock, peer = accepted
        if peer.uid != self._uid:
            sock.close()
            return
        # The newest wins: it can only be the same uid, and an old one may be a dead process's.
        self._drop_broker()
        self._broker = Channel(sock, serving.FromBroker, max_record=serving.MAX_BIND_BYTES)
        self._loop.watch(self._broker, self._on_broker)

    def _drop_broker(self) -> None:
        broker, self._broker = self._broker, None
        if broker is not None:
            self._loop.forget(broker)
            broker.close()

    def _on_broker(self, _events: int) -> None:
        broker = self._broker
        if broker is None:
            return
        try:
            broker.flush()
            for record in broker.receive():
                fd = broker.take_descriptor()
                if fd is None:
                    raise ChannelError("a binding without a channel")
                self._bind(broker, record, fd)
        except ChannelError:
            self._drop_broker()
        self._desk.kick()

    def _bind(self, broker: Channel[serving.FromBroker], bind: serving.Bind, fd: int) -> None:
        def refuse(reason: str) -> None:
            os.close(fd)
            self._tell(broker, serving.Unbound(bind.bind, reason))

        def told(reading: Reading) -> None:
            self._binding -= 1
            if broker is not self._broker:
                os.close(fd)
                return
            if isinstance(reading, ProcessReading):
                hypervisor = reading.hypervisor
                if not hypervisor.vm:
                    refuse("that hypervisor process names no VM")
                    return
                if not bind.cid and hypervisor.uid != bind.uid:
                    # The peer's pid was recycled since it connected.
                    refuse("the peer is not that hypervisor process")
                    return
                caller = Caller(vm=hypervisor.vm, pid=hypervisor.pid, start_time=hypervisor.start_time)
            elif bind.cid:
                refuse("no known hypervisor process holds that CID")
                return
            elif not (isinstance(reading, Missing) and reading.absent):
                # A hypervisor that cannot be read now must not become its user.
                refuse("it cannot be said who that peer is")
                return
            else:
                caller = Caller(uid=bind.uid)
            try:
                sock = socket.socket(fileno=fd)
            except OSError:
                refuse("that descriptor is no socket")
                return
            right = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM
            if not right or len(self.channels) >= MAX_CHANNELS:
                sock.close()
                self._tell(broker, serving.Unbound(bind.bind, "no channel can be made"))
                return
            channel = WorkerChannel(self._desk, self._loop, sock, caller)
            channel.on_close = self.channels.discard
            self.channels.add(channel)
            self._tell(broker, serving.Bound(bind.bind, caller.principal))

        if self._binding >= MAX_BINDING:
            refuse("too many callers at once")
            return
        self._binding += 1
        self._desk.who(bind.cid, 0 if bind.cid else bind.pid, told)

    def _tell(self, broker: Channel[serving.FromBroker], record: object) -> None:
        try:
            broker.send(record)
            self._loop.watch(broker, self._on_broker, write=broker.wants_write)
        except ChannelError:
            if broker is self._broker:
                self._drop_broker()

    def renew(self) -> None:
        """The channels' certificates are an earlier CA's: new connections go to new ones."""
        if self._broker is not None:
            self._tell(self._broker, serving.Renew())

    def flush(self) -> None:
        for channel in list(self.channels):
            channel.flush()

    def close_gone(self, hypervisors: tuple[Hypervisor, ...]) -> None:
        """Ends the channels whose VM's process is no more: a CID or a pid may be another's now."""
        alive = {(h.vm, h.pid, h.start_time) for h in hypervisors}
        for channel in list(self.channels):
            caller = channel.caller
            if caller.vm and (caller.vm, caller.pid, caller.start_time) not in alive:
                channel.close()

    def close_bound_to(self, principal: str) -> None:
        """Ends the channels of a principal whose binding changed."""
        for channel in list(self.channels):
            if channel.caller.principal == principal:
                channel.close()
