"""A worker driven by hand: what it refuses from a broker or a vault that breaks the rules."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import TYPE_CHECKING

import msgspec
import pytest

from hostd.config import Gateway
from hostd.gateway import control
from hostd.gateway.limits import limits_of
from hostd.gateway.process import WorkerProcess, spawn
from hostd.ipc.channel import Channel
from hostd.ipc.serving import ChannelIdentity, Fault, FromWorker, OpenChannel, Receipt, Reply
from hostd.platform.confine import compile_filter
from tests.gateway.support_vault import ChannelCa, readable

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[WorkerProcess, Channel[FromWorker]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    worker, end = spawn(limits_of(Gateway(connections_per_caller=2)), compile_filter())
    vault: Channel[FromWorker] = Channel(end, FromWorker)
    yield worker, vault
    worker.process.kill()
    worker.process.wait()
    os.close(worker.pidfd)
    worker.control.close()
    vault.close()


def opened(vault: Channel[FromWorker], identity: ChannelIdentity | None = None) -> None:
    assert readable(vault.sock, 10)
    assert vault.receive() == [OpenChannel()]
    vault.send(identity or ChannelCa().issue())


def ends(worker: WorkerProcess) -> bool:
    return bool(select.select([worker.pidfd], [], [], 5)[0])


def hand_over(worker: WorkerProcess) -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        worker.control.send_with_descriptors(control.Serve(), [theirs.fileno()])
    return ours


def test_it_keeps_to_the_bound_itself(pair: Pair) -> None:
    worker, vault = pair
    guests = [hand_over(worker) for _ in range(3)]  # the first come before it is ready
    opened(vault)
    assert readable(guests[2], 5)
    assert guests[2].recv(1) == b""
    assert not readable(guests[0], 0.2)
    assert readable(worker.control.sock, 5)
    assert worker.control.receive() == [control.Closed(1)]
    for guest in guests:
        guest.close()


@pytest.mark.parametrize(
    "record",
    [
        Reply(1, msgspec.msgpack.encode({}), Receipt(1, 1)),
        Fault(1, "denied", "no", None),
        ChannelCa().issue(),
    ],
)
def test_an_answer_to_nothing_ends_it(pair: Pair, record: object) -> None:
    worker, vault = pair
    opened(vault)
    time.sleep(0.2)
    vault.send(record)
    assert ends(worker)


def test_a_second_start_ends_it(pair: Pair) -> None:
    worker, vault = pair
    opened(vault)
    worker.control.send(control.Start(limits_of(Gateway()), compile_filter()))
    assert ends(worker)


def test_a_connection_without_its_descriptor_ends_it(pair: Pair) -> None:
    worker, vault = pair
    opened(vault)
    worker.control.send(control.Serve())
    assert ends(worker)


def test_an_ended_certificate_ends_it(pair: Pair) -> None:
    worker, vault = pair
    opened(vault, msgspec.structs.replace(ChannelCa().issue(), not_after=int(time.time()) - 1))
    assert ends(worker)


def test_more_than_the_identity_ends_it(pair: Pair) -> None:
    worker, vault = pair
    assert readable(vault.sock, 10)
    vault.receive()
    vault.send(ChannelCa().issue(), Fault(1, "denied", "no", None))
    assert ends(worker)


@pytest.mark.parametrize("end", ["control", "vault"])
def test_it_ends_with_either_end(pair: Pair, end: str) -> None:
    worker, vault = pair
    opened(vault)
    time.sleep(0.3)
    (worker.control if end == "control" else vault).sock.shutdown(socket.SHUT_RDWR)
    assert ends(worker)


def test_a_filter_that_does_not_load_ends_it() -> None:
    worker, end = spawn(limits_of(Gateway()), b"\xff" * 16)
    vault: Channel[FromWorker] = Channel(end, FromWorker)
    opened(vault)
    guest = hand_over(worker)
    assert ends(worker)
    assert worker.process.wait() != 0
    for thing in (guest, vault, worker.control):
        thing.close()
    os.close(worker.pidfd)
