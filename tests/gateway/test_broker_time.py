"""The broker's own deadlines, with a loop that the test turns. Workers are real."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest

from hostd.config import Gateway
from hostd.gateway import broker as module
from hostd.gateway.broker import Broker
from hostd.gateway.listeners import Caller
from hostd.ipc.channel import Channel
from hostd.ipc.loop import Loop
from hostd.ipc.serving import Bind, Bound, FromBroker, OpenChannel, ToBroker
from hostd.platform.confine import compile_filter
from tests.gateway.support_vault import ChannelCa, readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GUEST = Caller(cid=7, pid=0, uid=0)


class Stage:
    def __init__(self) -> None:
        self.loop = Loop()
        self.said: list[str] = []
        self.broker = Broker(self.loop, Gateway(), compile_filter(), self.said.append)
        ours, theirs = socket.socketpair()
        self.vault: Channel[FromBroker] = Channel(theirs, FromBroker)
        self.lost = 0
        self.broker.attach(Channel(ours, ToBroker), self._lost)

    def _lost(self) -> None:
        self.lost += 1

    def turn(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said
            self.loop.run_once(0.05)

    def knock(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.broker.knock(theirs, GUEST)
        return ours

    def close(self) -> None:
        self.broker.close()
        self.vault.close()
        self.loop.close()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(module, "TICK_S", 0.1)
    monkeypatch.setattr(module, "BIND_S", 0.5)
    monkeypatch.setattr(module, "WORKER_IDLE_S", 0.5)
    stage = Stage()
    yield stage
    stage.close()


def test_a_vault_that_does_not_answer(stage: Stage) -> None:
    guest = stage.knock()
    assert stage.vault.receive() == [Bind(1, cid=7)]
    assert not readable(guest, 0)
    stage.turn(lambda: readable(guest, 0))
    assert guest.recv(1) == b""
    assert any("did not answer" in text for text in stage.said)
    guest.close()


def test_an_idle_worker_is_ended_and_a_used_one_is_not(stage: Stage) -> None:
    guest = stage.knock()
    stage.vault.receive()
    descriptor = stage.vault.take_descriptor()
    assert descriptor is not None
    channel: Channel[OpenChannel] = Channel(socket.socket(fileno=descriptor), OpenChannel)
    stage.vault.send(Bound(1, 'VM::"x"'))
    stage.turn(lambda: readable(channel.sock, 0))
    channel.receive()
    channel.send(ChannelCa().issue())
    until = time.monotonic() + 1.5
    stage.turn(lambda: time.monotonic() > until)
    assert not readable(guest, 0)
    guest.close()
    stage.turn(lambda: readable(channel.sock, 0))  # the worker's end
    channel.close()


def test_the_vault_goes(stage: Stage) -> None:
    guest = stage.knock()
    stage.vault.sock.shutdown(socket.SHUT_RDWR)
    stage.turn(lambda: stage.lost)
    assert guest.recv(1) == b""
    late = stage.knock()
    assert late.recv(1) == b""
    guest.close()
    late.close()
