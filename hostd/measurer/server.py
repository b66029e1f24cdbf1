"""The measurer's side of the channel to the vault.

Only a peer with the vault's uid is heard (SO_PEERCRED). One connection at a time, the newest: a vault
that died and started again must not find its dead connection in the way, and nobody else may
connect. Asks are answered in the order of asking; a survey goes on between them. A peer that breaks
the format, or has more than `MAX_WAITING` asks open, is cut off; the measurer goes on.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from hostd.ipc.channel import Channel, ChannelClosedError, ChannelError, peer_of
from hostd.ipc.measuring import Answer, Ask, AskFile, AskSurvey, AskWho, Hello, Request, SurveyPart
from hostd.measurer.survey import survey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hostd.ipc.loop import Loop
    from hostd.measurer.probes import Measurer

MAX_WAITING: Final = 8
MAX_REQUEST_BYTES: Final = 512 << 10
"""A survey's 64 prefixes of 4096 characters are the largest request."""
SURVEY_SLICE_S: Final = 0.005


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
        self, loop: Loop, listener: socket.socket, measurer: Measurer, *, vault_uid: int, epoch: bytes
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._measurer = measurer
        self._vault_uid = vault_uid
        self._epoch = epoch
        self._channel: Channel[Request] | None = None
        self._waiting: deque[Ask | AskFile | AskWho] = deque()
        self._survey: tuple[int, Iterator[dict[str, bytes] | None]] | None = None
        self._scheduled = False
        loop.watch(listener, self._accept)

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
        self._channel = Channel(sock, Request, max_record=MAX_REQUEST_BYTES)
        self._send(Hello(self._epoch))

    def _drop(self, why: str) -> None:
        if self._channel is not None:
            _say(f"connection to the vault closed: {why}")
            self._loop.forget(self._channel)
            self._channel.close()
            self._channel = None
        self._waiting.clear()
        self._survey = None

    def _send(self, record: Hello | Answer | SurveyPart) -> None:
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
        for request in requests:
            if isinstance(request, AskSurvey):
                if self._survey is not None:
                    raise ChannelError("a second survey was asked for while one runs")
                self._survey = (request.seq, survey(request.prefixes))
            elif len(self._waiting) >= MAX_WAITING:
                raise ChannelError(f"over {MAX_WAITING} asks are open")
            else:
                self._waiting.append(request)

    def _schedule(self) -> None:
        # A survey waits for a vault that is slow to take its parts; `_ready` goes on with it.
        surveying = self._survey is not None and self._channel is not None and not self._channel.wants_write
        if not self._scheduled and (self._waiting or surveying):
            self._scheduled = True
            self._loop.call_after(0.0, self._work)

    def _work(self) -> None:
        """One answer, or one slice of the survey; then the loop looks at the socket again."""
        self._scheduled = False
        if self._waiting:
            request = self._waiting.popleft()
            started = time.monotonic_ns()
            reading = self._measurer.answer(request)
            self._send(Answer(request.seq, reading, time.monotonic_ns() - started))
        elif self._survey is not None:
            self._survey_slice(*self._survey)
        self._schedule()

    def _survey_slice(self, seq: int, steps: Iterator[dict[str, bytes] | None]) -> None:
        until = time.monotonic() + SURVEY_SLICE_S
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
