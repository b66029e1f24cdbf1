"""The running measurer over its socket: who is heard, what is refused, and that it goes on."""

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from hostd.config import Config, Drift, Host, Hypervisor, Reaction, Users
from hostd.core.findings import Kind
from hostd.core.reacting import Step
from hostd.core.reading_kernel import KernelReading
from hostd.core.readings import GuestsReading, ImaReading, Missing, PostureReading
from hostd.ipc.channel import HEADER, Channel, encode
from hostd.ipc.measuring import (
    Answer,
    Ask,
    AskFile,
    AskSurvey,
    AskSuspend,
    Hello,
    Response,
    SurveyPart,
    Suspended,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VAULT_UID = 64999


class Running:
    """A measurer in a process of its own, and connections to it."""

    def __init__(self, config: Config) -> None:
        self.path = config.run / "measurer.sock"
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                from hostd.measurer.main import run

                run(config)
                code = 0
            finally:
                os._exit(code)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                self.connect().sock.close()
                return
            except OSError:
                time.sleep(0.01)
        raise AssertionError("the measurer did not start")

    def connect(self) -> Channel[Any]:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self.path))
        except OSError:
            sock.close()
            raise
        return Channel(sock, Response)

    def alive(self) -> bool:
        return os.waitpid(self.pid, os.WNOHANG)[0] == 0

    def stop(self) -> int:
        os.kill(self.pid, signal.SIGTERM)
        return os.waitpid(self.pid, 0)[1]


def receive(channel: Channel[Any], count: int = 1) -> list[Any]:
    records: list[Any] = []
    channel.sock.setblocking(True)
    channel.sock.settimeout(20)
    while len(records) < count:
        records += channel.receive()
    return records


def closed(channel: Channel[Any]) -> bool:
    """Whether the measurer cuts this connection off, after anything it still sends."""
    channel.sock.settimeout(5)
    try:
        while channel.sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def config_for(tmp_path: Path, **users: int) -> Config:
    return Config(
        host=Host(run_dir=str(tmp_path / "run")),
        users=Users(**users),
        hypervisor=Hypervisor(binaries=("/nonexistent/qemu",), provider="proc"),
    )


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    if os.geteuid() != 0:
        pytest.skip("frames are shown to root only")
    started = Running(config_for(tmp_path))
    yield started
    assert started.alive()
    assert started.stop() == 0


def test_asks_are_answered_in_order(running: Running) -> None:
    channel = running.connect()
    (hello,) = receive(channel)
    assert isinstance(hello, Hello)
    kinds = [Kind.GUESTS, Kind.POSTURE, Kind.IMA, Kind.FILES, Kind.PROCESS, Kind.BOOT, Kind.KERNEL]
    channel.send(*[Ask(number, kind) for number, kind in enumerate(kinds)], AskFile(9, 1))
    answers = receive(channel, 8)
    assert all(isinstance(answer, Answer) for answer in answers)
    # The kernel's and the file's come when they come.
    assert [answer.seq for answer in answers if answer.seq not in (6, 9)] == [0, 1, 2, 3, 4, 5]
    answers.sort(key=lambda answer: answer.seq)
    assert [answer.seq for answer in answers] == [0, 1, 2, 3, 4, 5, 6, 9]
    assert isinstance(answers.pop(6).reading, KernelReading | Missing)
    assert answers[0].reading == GuestsReading((), ())
    assert isinstance(answers[1].reading, PostureReading)
    assert isinstance(answers[2].reading, ImaReading | Missing)
    for answer in answers[4:]:
        assert isinstance(answer.reading, Missing)
        assert not answer.reading.absent or answer.seq == 5  # a machine without a boot event log
    assert all(answer.cost_ns > 0 for answer in answers)
    channel.close()


TEST_VM = "6695eb01-f6a4-8304-79aa-97f2502e193f"
"""The one domain of libvirt's test driver."""


def test_nothing_is_suspended_that_no_reaction_suspends(running: Running) -> None:
    channel = running.connect()
    receive(channel)
    channel.send(AskSuspend(7, TEST_VM, True))
    (outcome,) = receive(channel)
    assert outcome == Suspended(7, False, "no reaction of this configuration suspends")
    channel.close()


@pytest.mark.parametrize("vm", ["", "web", TEST_VM.upper(), TEST_VM + "\n", "../" + TEST_VM[3:]])
def test_a_machine_has_a_uuid_or_the_connection_ends(running: Running, vm: str) -> None:
    channel = running.connect()
    receive(channel)
    channel.sock.send(encode([AskSuspend(7, vm, True)]))
    assert closed(channel)
    channel.sock.close()


def test_a_machine_is_suspended_beside_other_asks(tmp_path: Path) -> None:
    pytest.importorskip("libvirt")
    if os.geteuid() != 0:
        pytest.skip("frames are shown to root only")
    reaction = Reaction((Kind.PROCESS,), (Step.SUSPEND_VM,))
    config = msgspec.structs.replace(
        config_for(tmp_path),
        hypervisor=Hypervisor(binaries=("/nonexistent/qemu",), libvirt_uri="test:///default"),
        drift=Drift(reactions=(reaction,)),
    )
    started = Running(config)
    channel = started.connect()
    receive(channel)
    channel.send(AskSuspend(1, TEST_VM, True), Ask(2, Kind.POSTURE))
    answers = {record.seq: record for record in receive(channel, 2)}
    assert answers[1] == Suspended(1, True, "the VM is suspended")
    assert isinstance(answers[2], Answer)
    note = config.run / f"measurer.suspended-{TEST_VM}"
    assert note.exists()
    channel.send(AskSuspend(3, TEST_VM, False))
    (outcome,) = receive(channel)
    assert (outcome.seq, outcome.done) == (3, True)
    assert not note.exists()
    channel.close()
    assert started.stop() == 0


def test_another_uid_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (tmp_path / "run").mkdir(mode=0o755)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    started = Running(config_for(tmp_path, vault=VAULT_UID))
    try:
        info = started.path.lstat()
        assert stat.S_ISSOCK(info.st_mode)
        assert stat.S_IMODE(info.st_mode) == 0o600
        assert info.st_uid == VAULT_UID
        # Root may open the socket, and is not the vault.
        channel = started.connect()
        assert closed(channel)
        channel.close()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgroups([])
                os.setresgid(VAULT_UID, VAULT_UID, VAULT_UID)
                os.setresuid(VAULT_UID, VAULT_UID, VAULT_UID)
                channel = started.connect()
                code = 0 if isinstance(receive(channel)[0], Hello) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert started.alive()
    finally:
        started.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        HEADER.pack(1 << 30),
        HEADER.pack(5) + b"abcde",
        HEADER.pack(0),
        encode([["ask", 1, "guests", "", 0, "more"]]),
        encode([["ask", -1, "guests", "", 0]]),
        encode([["ask", 1, "unheard-of", "", 0]]),
        encode([["ask", 1, "process", "x" * 37, 0]]),
        encode([["hello", b"0" * 16]]),
        encode([["survey", 1, ["x" * 5000]]]),
        encode([{"ask": 1}]),
        # Not canonical: the integer 1 in two bytes.
        HEADER.pack(6) + b"\x93\xa4file"[:6],
        encode([Ask(0, Kind.GUESTS)] * 9),
        encode([Ask(n, Kind.KERNEL) for n in range(9)]),
        encode([AskFile(n, 1) for n in range(9)]),
        encode([AskSurvey(0, ("/nonexistent",)), AskSurvey(1, ("/nonexistent",))]),
    ],
    ids=range(16),
)
def test_garbage_closes_the_connection_only(running: Running, data: bytes) -> None:
    channel = running.connect()
    receive(channel)
    channel.sock.sendall(data)
    assert closed(channel)
    channel.close()
    again = running.connect()
    assert isinstance(receive(again)[0], Hello)
    again.close()


def test_descriptors_are_refused(running: Running) -> None:
    channel = running.connect()
    receive(channel)
    socket.send_fds(channel.sock, [encode([Ask(0, Kind.GUESTS)])], [0, 1])
    assert closed(channel)
    channel.close()


def test_half_a_record_waits_for_the_rest(running: Running) -> None:
    channel = running.connect()
    receive(channel)
    data = encode([Ask(5, Kind.POSTURE)])
    for byte in data:
        channel.sock.setblocking(True)
        channel.sock.sendall(struct.pack("B", byte))
    (answer,) = receive(channel)
    assert answer.seq == 5
    channel.close()


def test_newest_connection_is_served(running: Running) -> None:
    first = running.connect()
    (hello,) = receive(first)
    second = running.connect()
    (again,) = receive(second)
    assert again == hello
    assert closed(first)
    second.send(Ask(1, Kind.GUESTS))
    assert receive(second)[0].seq == 1
    first.close()
    second.close()


def test_survey_goes_on_between_asks(running: Running, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(1100):
        path = tree / f"d{number % 7}" / f"lib{number}.so.1"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(number).encode())
    (tree / "big.bin").write_bytes(bytes(40 << 20))
    (tree / "text.txt").write_text("no code")
    channel = running.connect()
    receive(channel)
    channel.send(AskSurvey(1, (str(tree), str(tree / "d1"))), Ask(2, Kind.GUESTS), Ask(3, Kind.GUESTS))
    files: dict[str, bytes] = {}
    order: list[int] = []
    while True:
        for record in receive(channel):
            order.append(record.seq)
            if isinstance(record, SurveyPart):
                assert not set(record.files) & set(files)
                files |= record.files
        if order[-1] == 1 and record.done:
            break
    assert order[:2] == [2, 3]
    assert len(files) == 1101
    import hashlib

    assert files[str(tree / "d0" / "lib7.so.1")] == hashlib.sha256(b"7").digest()
    channel.close()


def test_stale_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    from hostd.measurer.server import listen

    path = tmp_path / "run" / "measurer.sock"
    first = listen(path, os.geteuid())
    first.close()
    second = listen(path, os.geteuid())
    second.close()
    path.unlink()
    path.write_text("not a socket")
    with pytest.raises(OSError, match="in use"):
        listen(path, os.geteuid())
    assert path.read_text() == "not a socket"


def test_every_reading_fits_its_bounds() -> None:
    """What the measurer sends must decode at the vault, whatever a process is called."""
    from hostd.measurer.commandline import parse_command_line

    said = parse_command_line(b"q\0-name\0guest=" + b"\xff" * 9000 + b"\0")
    assert len(said.name) <= 256
    msgspec.msgpack.encode(said.name)
