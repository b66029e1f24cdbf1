"""The broker's link and the workers' channels over real sockets: who is bound, and what a worker may do."""

from __future__ import annotations

import os
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestlib.errors import DeniedError, HostdError, UnavailableError
from hostd.core.callers import Caller
from hostd.core.readings import Hypervisor, Missing, PostureReading, ProcessReading, Reading
from hostd.ipc import operations as ops
from hostd.ipc import serving
from hostd.ipc.channel import Channel, ChannelClosedError, ChannelError
from hostd.ipc.loop import Loop
from hostd.vault import channels
from hostd.vault.channels import MAX_BINDING, MAX_UNSENT_BYTES, BrokerLink, WorkerChannel
from hostd.vault.ledger import LedgerError
from hostd.vault.store import StoreError
from tests.vault.support_gate import VM_A, VM_B, A, hypervisor

UID = 1000
GONE = Missing(reason="no hypervisor", absent=True)
UNSAID = Missing(reason="busy", absent=False)
POSTURE = PostureReading("", "", 0, "", (), None, None, None, None, 0)
IDENTITY = serving.ChannelIdentity(b"chain", b"key", 1)
RANDOM = ops.GenerateRandom(length=1)


def process(found: Hypervisor) -> ProcessReading:
    return ProcessReading(found, (), (), 0)


def descriptors() -> set[str]:
    return {f"{n} {Path(f'/proc/self/fd/{n}').readlink()}" for n in os.listdir("/proc/self/fd") if _open(n)}


def _open(number: str) -> bool:
    return Path(f"/proc/self/fd/{number}").is_symlink()


def run_until(loop: Loop, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        loop.run_once(0.01)


class SimulatedDesk:
    """The vault, as far as the channels need it."""

    def __init__(self) -> None:
        self.reading: Reading | None = GONE
        """The answer to every `who`; None: the test answers."""
        self.asked: list[tuple[int, int, Callable[[Reading], None]]] = []
        self.calls: list[serving.Call] = []
        self.gone: list[Caller] = []
        self.identities = 0
        self.locked = False

    def who(self, cid: int, pid: int, told: Callable[[Reading], None]) -> None:
        self.asked.append((cid, pid, told))
        if self.reading is not None:
            told(self.reading)

    def identity(self) -> serving.ChannelIdentity:
        if self.locked:
            raise UnavailableError("the channel CA is not available")
        self.identities += 1
        return IDENTITY

    def on_call(self, _channel: WorkerChannel, call: serving.Call, _arrived: int) -> None:
        self.calls.append(call)

    def on_gone(self, caller: Caller) -> None:
        self.gone.append(caller)

    def kick(self) -> None:
        pass


class Broker:
    """The gateway's end of the broker's link."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self.loop = loop
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        self.channel: Channel[serving.Bound | serving.Unbound] = Channel(sock, serving.ToBroker)

    def bind(self, bind: serving.Bind, fd: int) -> None:
        self.channel.send_with_descriptors(bind, [fd])

    def hear(self) -> serving.Bound | serving.Unbound:
        heard: list[serving.Bound | serving.Unbound] = []

        def something() -> bool:
            heard.extend(self.channel.receive())
            return bool(heard)

        run_until(self.loop, something)
        (record,) = heard
        return record

    def ask(self, bind: serving.Bind) -> serving.Bound | serving.Unbound:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.bind(bind, theirs.fileno())
            return self.hear()

    def dropped(self) -> bool:
        try:
            assert self.channel.receive() == []
        except ChannelClosedError:
            return True
        return False


@pytest.fixture
def desk() -> SimulatedDesk:
    return SimulatedDesk()


@pytest.fixture
def link(desk: SimulatedDesk, loop: Loop, tmp_path: Path) -> Iterator[BrokerLink]:
    made = BrokerLink(desk, loop, tmp_path / "b", gateway_uid=os.geteuid())
    yield made
    for channel in list(made.channels):
        channel.close()
    made._drop_broker()
    loop.forget(made._listener)
    made._listener.close()


@pytest.fixture
def broker(link: BrokerLink, loop: Loop, tmp_path: Path) -> Iterator[Broker]:
    made = Broker(loop, tmp_path / "b")
    run_until(loop, lambda: link._broker is not None)
    yield made
    made.channel.close()


# ── Binding ───────────────────────────────────────────────────────────────────────────────────────


def _pipe() -> tuple[int, Callable[[], None]]:
    reader, writer = os.pipe()

    def close() -> None:
        os.close(reader)
        os.close(writer)

    return reader, close


def _file() -> tuple[int, Callable[[], None]]:
    fd = os.open("/dev/null", os.O_RDWR)
    return fd, lambda: os.close(fd)


def _datagram() -> tuple[int, Callable[[], None]]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    return sock.fileno(), sock.close


def _packets() -> tuple[int, Callable[[], None]]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return sock.fileno(), sock.close


def _inet() -> tuple[int, Callable[[], None]]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    return sock.fileno(), sock.close


@pytest.mark.parametrize("make", [_pipe, _file, _datagram, _packets, _inet])
def test_a_descriptor_of_the_wrong_kind_is_refused_and_closed(
    broker: Broker, link: BrokerLink, make: Callable[[], tuple[int, Callable[[], None]]]
) -> None:
    before = descriptors()
    fd, close = make()
    broker.bind(serving.Bind(1, 0, 5, UID), fd)
    close()
    answer = broker.hear()
    assert isinstance(answer, serving.Unbound)
    assert answer.bind == 1
    assert not link.channels
    assert descriptors() == before
    # The link is as good as before.
    assert isinstance(broker.ask(serving.Bind(2, 0, 5, UID)), serving.Bound)


def test_the_broker_is_told_of_another_channel_ca_after_what_was_bound(
    broker: Broker, link: BrokerLink, loop: Loop
) -> None:
    link.renew()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        broker.bind(serving.Bind(1, 0, 5, UID), theirs.fileno())
        heard: list[object] = []
        run_until(loop, lambda: len(heard) >= 2 or bool(heard.extend(broker.channel.receive())))
        link.renew()
        run_until(loop, lambda: len(heard) >= 3 or bool(heard.extend(broker.channel.receive())))
    assert heard == [serving.Renew(), serving.Bound(1, f'Host::"uid:{UID}"'), serving.Renew()]


def test_a_bind_without_a_descriptor_ends_the_link(
    broker: Broker, link: BrokerLink, desk: SimulatedDesk
) -> None:
    broker.channel.send(serving.Bind(1, 0, 5, UID))
    run_until(broker.loop, broker.dropped)
    assert not desk.asked
    assert not link.channels


def test_callers_asked_about_at_once_are_bounded(broker: Broker, desk: SimulatedDesk) -> None:
    desk.reading = None
    before = descriptors()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for number in range(MAX_BINDING):
            broker.bind(serving.Bind(number, 0, 5, UID), theirs.fileno())
            run_until(broker.loop, lambda expected=number + 1: len(desk.asked) == expected)  # type: ignore[misc]
        broker.bind(serving.Bind(MAX_BINDING, 0, 5, UID), theirs.fileno())
        answer = broker.hear()
        assert isinstance(answer, serving.Unbound)
        assert answer.bind == MAX_BINDING
        assert len(desk.asked) == MAX_BINDING
        # Each answer makes room for one more.
        for _, _, told in desk.asked:
            told(UNSAID)
        run_until(broker.loop, lambda: len(broker.channel.receive()) == MAX_BINDING)
        desk.reading = GONE
        broker.bind(serving.Bind(100, 0, 5, UID), theirs.fileno())
        assert isinstance(broker.hear(), serving.Bound)
    assert len(descriptors() - before) == 1


def test_channels_are_bounded(broker: Broker, link: BrokerLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_CHANNELS", 1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        broker.bind(serving.Bind(1, 0, 5, UID), theirs.fileno())
        assert isinstance(broker.hear(), serving.Bound)
        broker.bind(serving.Bind(2, 0, 5, UID), theirs.fileno())
        assert isinstance(broker.hear(), serving.Unbound)
    assert len(link.channels) == 1


def test_a_peer_that_is_certainly_no_hypervisor_is_its_user(
    broker: Broker, link: BrokerLink, desk: SimulatedDesk
) -> None:
    assert broker.ask(serving.Bind(1, 0, 5, UID)) == serving.Bound(1, f'Host::"uid:{UID}"')
    assert [(cid, pid) for cid, pid, _ in desk.asked] == [(0, 5)]


@pytest.mark.parametrize("reading", [UNSAID, POSTURE], ids=["unsaid", "another kind"])
def test_a_peer_of_whom_nothing_can_be_said_is_nobody(
    broker: Broker, link: BrokerLink, desk: SimulatedDesk, reading: Reading
) -> None:
    desk.reading = reading
    before = descriptors()
    assert isinstance(broker.ask(serving.Bind(1, 0, 5, UID)), serving.Unbound)
    assert not link.channels
    assert descriptors() == before


@pytest.mark.parametrize("reading", [GONE, UNSAID, POSTURE], ids=["absent", "unsaid", "another kind"])
def test_a_cid_that_is_no_known_vm_is_nobody(
    broker: Broker, link: BrokerLink, desk: SimulatedDesk, reading: Reading
) -> None:
    desk.reading = reading
    # The vsock peer has no uid; one in the record must not help it.
    assert isinstance(broker.ask(serving.Bind(1, 7, 5, UID)), serving.Unbound)
    assert [(cid, pid) for cid, pid, _ in desk.asked] == [(7, 0)]
    assert not link.channels


def test_a_hypervisor_is_its_vm(broker: Broker, link: BrokerLink, desk: SimulatedDesk) -> None:
    found = hypervisor(VM_A)
    desk.reading = process(found)
    assert broker.ask(serving.Bind(1, found.cid)) == serving.Bound(1, f'VM::"{VM_A}"')
    assert broker.ask(serving.Bind(2, 0, found.pid, found.uid)) == serving.Bound(2, f'VM::"{VM_A}"')


def test_a_hypervisor_of_another_uid_than_the_peer_is_nobody(
    broker: Broker, link: BrokerLink, desk: SimulatedDesk
) -> None:
    found = hypervisor(VM_A)
    desk.reading = process(found)
    before = descriptors()
    answer = broker.ask(serving.Bind(1, 0, found.pid, found.uid + 1))
    assert isinstance(answer, serving.Unbound)
    assert not link.channels
    assert descriptors() == before


@pytest.mark.parametrize("cid", [0, 7])
def test_a_hypervisor_without_a_name_is_nobody(
    broker: Broker, link: BrokerLink, desk: SimulatedDesk, cid: int
) -> None:
    desk.reading = process(hypervisor("", pid=5))
    assert isinstance(broker.ask(serving.Bind(1, cid, 5, UID)), serving.Unbound)
    assert not link.channels


def test_a_broker_of_another_user_is_not_heard(desk: SimulatedDesk, loop: Loop, tmp_path: Path) -> None:
    link = BrokerLink(desk, loop, tmp_path / "b", gateway_uid=os.geteuid() + 1)
    broker = Broker(loop, tmp_path / "b")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        broker.bind(serving.Bind(1, 0, 5, UID), theirs.fileno())
    run_until(loop, broker.dropped)
    assert not desk.asked
    assert not link.channels
    broker.channel.close()
    loop.forget(link._listener)
    link._listener.close()


def test_an_answer_for_a_broker_that_was_replaced_binds_nobody(
    broker: Broker, link: BrokerLink, desk: SimulatedDesk, tmp_path: Path
) -> None:
    before = descriptors()
    desk.reading = None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        broker.bind(serving.Bind(1, 0, 5, UID), theirs.fileno())
        run_until(broker.loop, lambda: bool(desk.asked))
    newer = Broker(broker.loop, tmp_path / "b")
    run_until(broker.loop, broker.dropped)
    desk.asked[0][2](GONE)
    assert not link.channels
    assert len(descriptors()) == len(before) + 1  # both ends of the newer link, one of the older
    desk.reading = GONE
    assert isinstance(newer.ask(serving.Bind(1, 0, 5, UID)), serving.Bound)
    newer.channel.close()


def test_channels_end_with_their_process_or_binding(
    broker: Broker, link: BrokerLink, desk: SimulatedDesk
) -> None:
    first, second = hypervisor(VM_A), hypervisor(VM_B)
    workers = []
    for number, reading in enumerate([process(first), process(second), GONE]):
        desk.reading = reading
        ours, theirs = socket.socketpair()
        broker.bind(serving.Bind(number, 0, 5, UID), theirs.fileno())
        assert isinstance(broker.hear(), serving.Bound)
        theirs.close()
        workers.append(ours)
    # The same pid and VM, started at another time: another process.
    link.close_gone((first, hypervisor(VM_B, start_time=2)))
    assert {c.caller.principal for c in link.channels} == {f'VM::"{VM_A}"', f'Host::"uid:{UID}"'}
    link.close_bound_to(f'Host::"uid:{UID}"')
    assert {c.caller.principal for c in link.channels} == {f'VM::"{VM_A}"'}
    for worker in workers:
        worker.close()


# ── Workers ───────────────────────────────────────────────────────────────────────────────────────


class Worker:
    """The gateway's end of a worker's channel, and the vault's."""

    def __init__(self, desk: SimulatedDesk, loop: Loop) -> None:
        ours, theirs = socket.socketpair()
        self.loop = loop
        self.channel: Channel[serving.Reply | serving.Fault | serving.ChannelIdentity] = Channel(
            ours, serving.ToWorker
        )
        self.vault = WorkerChannel(desk, loop, theirs, A)

    def hear(self) -> list[serving.Reply | serving.Fault | serving.ChannelIdentity]:
        heard: list[serving.Reply | serving.Fault | serving.ChannelIdentity] = []

        def something() -> bool:
            self.vault.flush()
            heard.extend(self.channel.receive())
            return bool(heard)

        run_until(self.loop, something)
        return heard

    def open(self) -> None:
        self.channel.send(serving.OpenChannel())
        assert self.hear() == [IDENTITY]


@pytest.fixture
def worker(desk: SimulatedDesk, loop: Loop) -> Iterator[Worker]:
    made = Worker(desk, loop)
    yield made
    made.vault.close()
    made.channel.close()


def test_a_call_before_the_channel_is_open_ends_it(worker: Worker, desk: SimulatedDesk) -> None:
    worker.channel.send(serving.Call(1, RANDOM), serving.OpenChannel(), serving.Call(2, RANDOM))
    run_until(worker.loop, lambda: worker.vault.closed)
    assert not desk.calls
    assert not desk.identities
    assert desk.gone == [A]


def test_a_channel_is_opened_once(worker: Worker, desk: SimulatedDesk) -> None:
    worker.open()
    worker.channel.send(serving.OpenChannel())
    run_until(worker.loop, lambda: worker.vault.closed)
    assert desk.identities == 1


def test_what_comes_after_the_end_is_not_executed(worker: Worker, desk: SimulatedDesk) -> None:
    worker.open()
    worker.channel.send(
        serving.Call(1, RANDOM), serving.OpenChannel(), serving.Call(2, RANDOM), serving.OpenChannel()
    )
    run_until(worker.loop, lambda: worker.vault.closed)
    assert [call.seq for call in desk.calls] == [1]
    assert desk.identities == 1


def test_what_comes_after_being_cut_off_is_not_executed(
    worker: Worker, desk: SimulatedDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.open()

    def on_call(channel: WorkerChannel, call: serving.Call, _arrived: int) -> None:
        desk.calls.append(call)
        channel.close()

    monkeypatch.setattr(desk, "on_call", on_call)
    worker.channel.send(serving.Call(1, RANDOM), serving.Call(2, RANDOM))
    run_until(worker.loop, lambda: worker.vault.closed)
    worker.loop.run_once(0)
    assert [call.seq for call in desk.calls] == [1]


def test_without_an_identity_there_is_no_channel(worker: Worker, desk: SimulatedDesk) -> None:
    desk.locked = True
    worker.channel.send(serving.OpenChannel(), serving.Call(1, RANDOM))
    run_until(worker.loop, lambda: worker.vault.closed)
    assert not desk.calls


def test_answers_that_wait_are_bounded(worker: Worker, desk: SimulatedDesk) -> None:
    worker.open()
    result = ops.DecryptResult(plaintext=bytes(1 << 20), key="k", version=1)
    tracemalloc.start()
    try:
        for seq in range(200):
            worker.vault.answer(seq, result, None)
        held, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert worker.vault.closed
    assert held < 2 * MAX_UNSENT_BYTES
    assert desk.gone == [A]


def test_answers_that_are_sent_do_not_count(worker: Worker) -> None:
    worker.open()
    result = ops.DecryptResult(plaintext=bytes(1 << 20), key="k", version=1)
    for seq in range(20):
        worker.vault.answer(seq, result, None)
        (reply,) = worker.hear()
        assert isinstance(reply, serving.Reply)
        assert reply.seq == seq
    assert not worker.vault.closed


def test_a_worker_that_does_not_read_is_cut_off(worker: Worker) -> None:
    worker.open()
    result = ops.DecryptResult(plaintext=bytes(1 << 20), key="k", version=1)
    for seq in range(20):
        worker.vault.answer(seq, result, None)
        worker.vault.flush()
    assert worker.vault.closed


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError(f"VM {VM_B} at /var/lib/hostd/store.sqlite: PCR 7 is 00ff"),
        LedgerError("/var/lib/hostd/ledger.jsonl: No space left on device"),
        StoreError("/var/lib/hostd/store.sqlite: disk I/O error"),
    ],
)
def test_why_the_host_cannot_answer_does_not_reach_a_guest(worker: Worker, error: HostdError) -> None:
    worker.open()
    error.ledger = 3
    worker.vault.refuse(7, error)
    assert worker.hear() == [serving.Fault(7, "unavailable", "the host cannot answer now", 3)]


def test_other_refusals_say_why(worker: Worker) -> None:
    worker.open()
    worker.vault.refuse(7, DeniedError("this caller belongs to no tenant"))
    worker.vault.refuse(8, DeniedError("x" * 1000))
    first, second = worker.hear()
    assert first == serving.Fault(7, "denied", "this caller belongs to no tenant", None)
    assert isinstance(second, serving.Fault)
    assert second.message == "x" * 512


def test_a_refusal_names_its_entry_only_to_whom_it_is_to_be_named(worker: Worker) -> None:
    worker.open()
    error = DeniedError("no", ledger=5)
    worker.vault.refuse(7, error, named=False)
    worker.vault.refuse(8, error)
    assert worker.hear() == [serving.Fault(7, "denied", "no", None), serving.Fault(8, "denied", "no", 5)]


def test_what_does_not_decode_ends_the_channel(worker: Worker, desk: SimulatedDesk) -> None:
    worker.open()
    with pytest.raises(ChannelError):  # noqa: PT012
        worker.channel.send(serving.Bind(1, 0, 5, UID))
        run_until(worker.loop, lambda: worker.vault.closed)
        worker.channel.receive()
    assert not desk.calls
