"""The broker: accepts guests, asks the vault who they are, and hands them to their workers.

It never reads a byte of a guest. The caller is what the kernel says (`listeners`); every caller has
a worker process and a channel to the vault of its own, bound by the vault to that caller. It
refuses by closing: a caller that hostd does not know, over the bounds on connections, waiting or workers,
a caller whose workers keep dying, and everybody while there is no vault.
"""

from __future__ import annotations

import enum
import os
import select
import time
from typing import TYPE_CHECKING, Final

from hostd.gateway import control, listeners
from hostd.gateway.limits import BIND_S, WAITING_CONNECTIONS, WORKER_IDLE_S, WORKERS_PER_USER, limits_of
from hostd.gateway.process import WorkerProcess, spawn
from hostd.ipc.channel import Channel, ChannelError
from hostd.ipc.serving import Bind, Bound, Renew, ToBroker

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from hostd.config import Gateway
    from hostd.gateway.listeners import Caller
    from hostd.ipc.loop import Loop, Timer

DEATH_DELAY_S: Final = 1.0
"""After a worker's unexpected end its caller waits this long for the next, doubled each time."""
DEATH_DELAY_MAX_S: Final = 30.0
DEATHS_REMEMBERED: Final = 4096
TICK_S: Final = 1.0


class State(enum.Enum):
    """`BINDING` → `BOUND` → gone; `RETIRED`: keeps its connections, gets no new ones."""

    BINDING = enum.auto()
    BOUND = enum.auto()
    RETIRED = enum.auto()


class Served:
    """A caller and its worker."""

    __slots__ = ("bind", "caller", "connections", "idle_since", "made", "peer", "state", "waiting", "worker")

    def __init__(
        self, bind: int, caller: Caller, worker: WorkerProcess, peer: int | None, now: float
    ) -> None:
        self.bind = bind
        self.caller = caller
        self.worker = worker
        self.peer = peer
        """pidfd of a unix caller: its number may be given to another process once it ends."""
        self.state = State.BINDING
        self.connections = 0
        """Handed over and not yet reported closed."""
        self.waiting: list[socket.socket] = []
        self.made = now
        self.idle_since = now


class Broker:
    """All callers of this host, while one vault lives."""

    def __init__(self, loop: Loop, gateway: Gateway, seccomp: bytes, say: Callable[[str], None]) -> None:
        self._loop = loop
        self._gateway = gateway
        self._limits = limits_of(gateway)
        self._seccomp = seccomp
        self._say = say
        self._vault: Channel[ToBroker] | None = None
        self._vault_lost: Callable[[], None] = lambda: None
        self._callers: dict[Caller, Served] = {}
        self._by_bind: dict[int, Served] = {}
        self._dying: dict[int, WorkerProcess] = {}
        self._deaths: dict[Caller, tuple[float, float]] = {}
        """Caller → (when the last worker died, how long to wait from then on)."""
        self._binds = 0
        self._timer: Timer = loop.call_after(TICK_S, self._tick)

    # ── The vault ─────────────────────────────────────────────────────────────────────────────────

    def attach(self, vault: Channel[ToBroker], lost: Callable[[], None]) -> None:
        """Serves with this vault until it goes; then `lost` is called."""
        self._vault, self._vault_lost = vault, lost
        self._deaths.clear()
        self._loop.watch(vault, self._vault_ready)

    def _vault_ready(self, events: int) -> None:
        vault = self._vault
        assert vault is not None
        try:
            if events & select.EPOLLOUT:
                vault.flush()
            records = vault.receive()
        except ChannelError:
            self._detach()
            return
        for record in records:
            if isinstance(record, Renew):
                self._renew()
                continue
            served = self._by_bind.get(record.bind)
            if served is None:
                continue  # it went while the vault was at it
            if isinstance(record, Bound):
                self._bound(served, record)
            else:
                self._say(f"caller {_describe(served.caller)} is not served: {record.reason}")
                self._drop(served)
        if self._vault is vault:
            self._loop.watch(vault, self._vault_ready, write=vault.wants_write)

    def _detach(self) -> None:
        """The vault went, and every channel to it: nothing that is open can be answered."""
        vault, self._vault = self._vault, None
        if vault is None:
            return
        self._loop.forget(vault)
        vault.close()
        for served in list(self._by_bind.values()):
            self._drop(served)
        self._vault_lost()

    # ── Connections ───────────────────────────────────────────────────────────────────────────────

    def knock(self, sock: socket.socket, caller: Caller) -> None:
        """Takes over an accepted connection: handed to a worker, kept waiting for one, or closed."""
        now = time.monotonic()
        if self._vault is None:
            sock.close()
            return
        served = self._callers.get(caller) or self._make(caller, now)
        if served is None or served.connections + len(served.waiting) >= self._limits.connections:
            sock.close()
        elif served.state is State.BOUND:
            self._hand_over(served, sock)
        elif len(served.waiting) < WAITING_CONNECTIONS:
            served.waiting.append(sock)
        else:
            sock.close()

    def _make(self, caller: Caller, now: float) -> Served | None:
        """A worker for a caller that has none; None if it may not have one now."""
        died, delay = self._deaths.get(caller, (now, 0.0))
        if now < died + delay or len(self._by_bind) + len(self._dying) >= self._gateway.workers:
            return None
        if not caller.cid and self._workers_of(caller.uid) >= WORKERS_PER_USER:
            return None
        peer = listeners.watch_process(caller.pid) if caller.pid else None
        if caller.pid and peer is None:
            return None
        try:
            worker, vault_end = spawn(self._limits, self._seccomp)
        except (OSError, ChannelError) as error:
            self._say(f"no worker for {_describe(caller)}: {error}")
            if peer is not None:
                os.close(peer)
            return None
        self._binds += 1
        served = Served(self._binds, caller, worker, peer, now)
        self._callers[caller] = self._by_bind[served.bind] = served
        self._loop.watch(_Descriptor(worker.pidfd), lambda _events: self._died(served))
        self._loop.watch(worker.control, lambda events: self._worker_ready(served, events))
        if peer is not None:
            self._loop.watch(_Descriptor(peer), lambda _events: self._drop(served))
        assert self._vault is not None
        try:
            with vault_end:
                self._vault.send_with_descriptors(
                    Bind(served.bind, caller.cid, caller.pid, caller.uid), [vault_end.fileno()]
                )
        except ChannelError:
            self._detach()
            return None
        return served

    def _workers_of(self, uid: int) -> int:
        """Workers that one host-local user's processes have: they must not take the machines' places."""
        return sum(not s.caller.cid and s.caller.uid == uid for s in self._by_bind.values())

    def _bound(self, served: Served, record: Bound) -> None:
        if served.state is not State.BINDING:
            return
        served.state = State.BOUND
        self._say(f"caller {_describe(served.caller)} is {record.principal}")
        waiting, served.waiting = served.waiting, []
        for sock in waiting:
            if served.bind in self._by_bind:
                self._hand_over(served, sock)
            else:
                sock.close()

    def _hand_over(self, served: Served, sock: socket.socket) -> None:
        with sock:
            try:
                served.worker.control.send_with_descriptors(control.Serve(), [sock.fileno()])
            except ChannelError:
                self._drop(served)
                return
        served.connections += 1

    # ── Workers ───────────────────────────────────────────────────────────────────────────────────

    def _worker_ready(self, served: Served, events: int) -> None:
        channel = served.worker.control
        try:
            if events & select.EPOLLOUT:
                channel.flush()
            for record in channel.receive():
                if isinstance(record, control.Retire):
                    self._retire(served)
                elif record.count > served.connections:
                    raise ChannelError("more connections closed than were given")
                else:
                    served.connections -= record.count
                    served.idle_since = time.monotonic()
        except ChannelError:
            # Its pidfd tells of its end; if it lives on without its socket, it is killed here.
            self._loop.forget(channel)
            served.worker.kill()
            return
        self._loop.watch(
            channel, lambda events: self._worker_ready(served, events), write=channel.wants_write
        )

    def _retire(self, served: Served) -> None:
        served.state = State.RETIRED
        if self._callers.get(served.caller) is served:
            del self._callers[served.caller]

    def _renew(self) -> None:
        """The certificate of every worker that the vault has bound may be an earlier channel CA's: as if it
        ended soon. (Those that it has not bound will get theirs from the CA in force then.)"""
        for served in list(self._callers.values()):
            if served.state is State.BOUND:
                self._retire(served)

    def _died(self, served: Served) -> None:
        """A worker ended that was not told to."""
        status = served.worker.process.poll()
        if served.state is State.RETIRED:
            self._drop(served)
            return
        self._say(f"worker of {_describe(served.caller)} died with status {status}")
        _, delay = self._deaths.get(served.caller, (0.0, 0.0))
        while len(self._deaths) >= DEATHS_REMEMBERED:
            del self._deaths[next(iter(self._deaths))]
        self._deaths[served.caller] = (
            time.monotonic(),
            min(max(DEATH_DELAY_S, 2 * delay), DEATH_DELAY_MAX_S),
        )
        self._drop(served)

    def _drop(self, served: Served) -> None:
        """Ends a worker and everything of its caller here; the process is reaped when it is dead."""
        if self._by_bind.pop(served.bind, None) is None:
            return
        if self._callers.get(served.caller) is served:
            del self._callers[served.caller]
        worker = served.worker
        self._loop.forget(worker.control)
        worker.control.close()
        if served.peer is not None:
            self._loop.forget(_Descriptor(served.peer))
            os.close(served.peer)
        for sock in served.waiting:
            sock.close()
        served.waiting.clear()
        worker.kill()
        self._dying[worker.pidfd] = worker
        self._loop.watch(_Descriptor(worker.pidfd), lambda _events: self._reap(worker))

    def _reap(self, worker: WorkerProcess) -> None:
        if worker.process.poll() is not None:
            del self._dying[worker.pidfd]
            self._loop.forget(_Descriptor(worker.pidfd))
            os.close(worker.pidfd)

    # ── Time ──────────────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> None:
        now = time.monotonic()
        for served in list(self._by_bind.values()):
            if served.state is State.BINDING and now - served.made > BIND_S:
                self._say(f"caller {_describe(served.caller)}: the vault did not answer")
                self._drop(served)
            elif not served.connections and not served.waiting and now - served.idle_since > WORKER_IDLE_S:
                self._drop(served)
        # A caller whose worker has lived as long as the longest delay is forgiven.
        for caller, (died, delay) in list(self._deaths.items()):
            if now > died + delay + DEATH_DELAY_MAX_S:
                del self._deaths[caller]
        self._timer = self._loop.call_after(TICK_S, self._tick)

    def close(self) -> None:
        """Ends all workers and waits for them."""
        self._timer.cancel()
        self._vault_lost = lambda: None
        self._detach()
        for worker in list(self._dying.values()):
            worker.process.wait()
            self._reap(worker)


class _Descriptor:
    """A bare descriptor for the loop."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


def _describe(caller: Caller) -> str:
    return f"cid {caller.cid}" if caller.cid else f"pid {caller.pid} of uid {caller.uid}"
