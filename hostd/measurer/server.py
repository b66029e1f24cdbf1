"""The measurer's side of the channel to the vault.

Only a peer with the vault's uid is heard (SO_PEERCRED). One connection at a time, the newest: a vault
that died and started again must not find its dead connection in the way, and nobody else may
connect. A peer that breaks the format, or has more asks open than `MAX_WAITING` allows, is cut off; the
measurer goes on.

Asks are answered in the order of asking, but for three kinds: parts of the kernel are read in a thread of
their own, VMs are suspended in another, and files are identified, as a survey is made, in slices between
other readings. While something waits the slices have a quarter of the time.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from hostd.core.findings import Kind
from hostd.ipc.channel import Channel, ChannelClosedError, ChannelError, peer_of
from hostd.ipc.measuring import (
    Answer,
    Ask,
    AskFile,
    AskSurvey,
    AskSuspend,
    AskWho,
    Hello,
    Hint,
    Request,
    SurveyPart,
    Suspended,
)
from hostd.measurer.identify import Turns
from hostd.measurer.survey import survey
from hostd.measurer.suspender import Deed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hostd.core.findings import Component
    from hostd.ipc.loop import Loop
    from hostd.measurer.apart import Apart
    from hostd.measurer.probes import Measurer
    from hostd.measurer.suspender import Suspender

MAX_WAITING: Final = 8
"""Asks open at once: so many for files, so many for parts of the kernel, so many others."""
MAX_REQUEST_BYTES: Final = 512 << 10
"""A survey's 64 prefixes of 4096 characters are the largest request."""
SUSPENDER_S: Final = 1.0
SLICE_S: Final = 0.005
"""Of identifying or surveying while nothing waits; else one step of a millisecond or so."""
SLICE_PAUSE: Final = 3
"""While asks wait, a slice is followed by so many times its own time without one."""


def listen(path: Path, uid: int) -> socket.socket:
    """The listening socket at `path`, for `uid` alone. A stale socket of an earlier run is replaced.

    Raises:
        OSError: it cannot be made, or something that is no socket is in the way.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        pass
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
        if os.geteuid() == 0:
            os.chown(path, uid, -1, follow_symlinks=False)
        sock.listen(4)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


class Server:
    """Serves one vault at a time from `loop`."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        measurer: Measurer,
        kernel: Apart,
        suspender: Suspender,
        *,
        vault_uid: int,
        epoch: bytes,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._measurer = measurer
        self._vault_uid = vault_uid
        self._epoch = epoch
        self._channel: Channel[Request] | None = None
        self._waiting: deque[tuple[Ask | AskWho, int]] = deque()
        """With the time (monotonic, ns) when each had been received."""
        self._kernel = kernel
        self._kernel_asked: set[tuple[int, int]] = set()
        self._suspender = suspender
        self._deeds: set[tuple[int, int]] = set()
        self._turns = Turns(measurer.registry)
        self._files_asked: dict[int, int] = {}
        self._connections = 0
        self._slice_after = 0.0
        self._survey: tuple[int, Iterator[dict[str, bytes] | None]] | None = None
        self._scheduled = False
        loop.watch(listener, self._accept)
        loop.watch(kernel, self._on_kernel)
        loop.watch(suspender, self._on_suspender)
        loop.every(SUSPENDER_S, suspender.expire)

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            # The peer is gone already, or this process is out of descriptors: the peer will try again.
            return
        peer = peer_of(sock)
        if peer.uid != self._vault_uid:
            _say(f"refused a connection of pid {peer.pid}, uid {peer.uid}: not the vault's uid")
            sock.close()
            return
        self._drop("the vault connected anew")
        self._connections += 1
        self._channel = Channel(sock, Request, max_record=MAX_REQUEST_BYTES)
        self._send(Hello(self._epoch))

    def _drop(self, why: str) -> None:
        if self._channel is not None:
            _say(f"connection to the vault closed: {why}")
            self._loop.forget(self._channel)
            self._channel.close()
            self._channel = None
        self._waiting.clear()
        self._turns.clear()
        self._files_asked.clear()
        self._kernel_asked.clear()
        self._deeds.clear()
        self._survey = None

    def hint(self, component: Component) -> None:
        """Tells the vault that something may have happened. A vault that does not keep up is not told."""
        if self._channel is not None and not self._channel.wants_write:
            self._send(Hint(component.kind, component.vm))

    def _send(self, record: Hello | Answer | SurveyPart | Hint | Suspended) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(record)
        except ChannelError as error:
            self._drop(str(error))
        else:
            self._watch()

    def _watch(self) -> None:
        if self._channel is not None:
            self._loop.watch(self._channel, self._ready, write=self._channel.wants_write)

    def _ready(self, _events: int) -> None:
        if self._channel is None:
            return
        try:
            self._channel.flush()
            requests = self._channel.receive()
            if self._channel.take_descriptor() is not None:
                raise ChannelError("a descriptor was sent along")
            self._take(requests)
        except ChannelClosedError as error:
            self._drop(str(error))
            return
        except ChannelError as error:
            self._drop(f"refused: {error}")
            return
        self._watch()
        self._schedule()

    def _take(self, requests: list[Request]) -> None:
        taken = time.monotonic_ns()
        for request in requests:
            if isinstance(request, AskSurvey):
                if self._survey is not None:
                    raise ChannelError("a second survey was asked for while one runs")
                self._survey = (request.seq, survey(request.prefixes))
            elif isinstance(request, AskFile):
                self._bound(len(self._files_asked))
                self._files_asked[request.seq] = time.monotonic_ns()
                self._turns.ask(request.seq, request.file)
            elif isinstance(request, AskSuspend):
                self._bound(len(self._deeds))
                ticket = self._connections, request.seq
                self._deeds.add(ticket)
                self._suspender.ask(Deed(ticket, request.vm, request.on))
            elif isinstance(request, Ask) and request.kind is Kind.KERNEL:
                self._bound(len(self._kernel_asked))
                ticket = self._connections, request.seq
                self._kernel_asked.add(ticket)
                self._kernel.ask(ticket, request.part)
            else:
                self._bound(len(self._waiting))
                self._waiting.append((request, taken))

    def _bound(self, waiting: int) -> None:
        if waiting >= MAX_WAITING:
            raise ChannelError(f"over {MAX_WAITING} asks are open")

    def _on_kernel(self, _events: int) -> None:
        for ticket, reading, cost_ns in self._kernel.answers():
            # Not if it was asked for by a connection that is gone.
            if ticket in self._kernel_asked:
                self._kernel_asked.discard(ticket)
                self._send(Answer(ticket[1], reading, cost_ns))

    def _on_suspender(self, _events: int) -> None:
        for outcome in self._suspender.outcomes():
            if outcome.ticket in self._deeds:
                self._deeds.discard(outcome.ticket)
                self._send(Suspended(outcome.ticket[1], outcome.done, outcome.detail))

    # ── Work ──────────────────────────────────────────────────────────────────────────────────────

    def _schedule(self) -> None:
        if not self._scheduled and (self._waiting or self._slices_left):
            self._scheduled = True
            self._loop.call_after(0.0, self._work)

    @property
    def _slices_left(self) -> bool:
        return not self._turns.idle or self._surveying

    @property
    def _surveying(self) -> bool:
        # A survey waits for a vault that is slow to take its parts; `_ready` goes on with it.
        return self._survey is not None and self._channel is not None and not self._channel.wants_write

    def _work(self) -> None:
        """One answer and perhaps one slice; then the loop looks at the socket again."""
        self._scheduled = False
        if self._waiting:
            request, taken = self._waiting.popleft()
            started = time.monotonic_ns()
            reading = self._measurer.answer(request, taken)
            cost_ns = time.monotonic_ns() - started
            self._send(Answer(request.seq, reading, cost_ns, self._measurer.freeze))
        began = time.monotonic()
        if self._slices_left and (not self._waiting or began >= self._slice_after):
            self._slice(began if self._waiting else began + SLICE_S)
            now = time.monotonic()
            self._slice_after = now + SLICE_PAUSE * (now - began)
        self._schedule()

    def _slice(self, until: float) -> None:
        """Steps until `until`; at least one of each kind."""
        if not self._turns.idle:
            self._identify(until)
        if self._survey is not None and self._surveying:
            self._survey_slice(*self._survey, until)

    def _identify(self, until: float) -> None:
        while not self._turns.idle:
            answer = self._turns.step()
            if answer is not None:
                seq, reading = answer
                cost_ns = time.monotonic_ns() - self._files_asked.pop(seq)
                self._send(Answer(seq, reading, cost_ns))
                return
            if time.monotonic() >= until:
                return

    def _survey_slice(self, seq: int, steps: Iterator[dict[str, bytes] | None], until: float) -> None:
        for part in steps:
            if part is not None:
                self._send(SurveyPart(seq, part, done=False))
                return
            if time.monotonic() >= until:
                return
        self._survey = None
        self._send(SurveyPart(seq, {}, done=True))


def _say(text: str) -> None:
    print(f"hostd measurer: {text}", file=sys.stderr, flush=True)
