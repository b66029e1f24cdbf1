"""What a guest may say on its connection, against a real broker and worker."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.conftest import GatewayProcess, Guest, frame
from tests.gateway.support_vault import SimulatedVault, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

RANDOM = {"op": "GenerateRandom", "args": {"length": 2}}
HOLD = {"op": "DescribeKey", "args": {"key": "hold"}}


def code(answer: dict[str, Any]) -> str:
    return str(answer["error"]["code"])


def test_result_receipt_and_none(guest: Guest) -> None:
    assert guest.ask({"id": 5, **RANDOM}) == {
        "id": 5,
        "ok": {"random": "Wlo="},
        "receipt": {"ledger": 1, "pass": 3},
    }
    assert "receipt" not in guest.ask({"id": 6, **RANDOM, "receipt": "none"})


def test_a_fault_keeps_code_message_and_ledger(guest: Guest) -> None:
    answer = guest.ask({"id": 5, "op": "DescribeKey", "args": {"key": "missing"}})
    assert answer == {"id": 5, "error": {"code": "not_found", "message": "no such key", "ledger": 7}}


def test_malformed_with_an_id_is_answered_and_the_connection_goes_on(
    guest: Guest, vault: SimulatedVault
) -> None:
    for bad in (
        {"op": "Nope"},
        {"op": "Encrypt"},
        {"op": "Health", "x": 1},
        {"op": "Health", "args": {"op": "Health"}},
    ):
        answer = guest.ask({"id": 9, **bad})
        assert (answer["id"], code(answer)) == (9, "malformed")
    assert vault.calls == 0
    assert "ok" in guest.ask({"id": 10, **RANDOM})


@pytest.mark.parametrize(
    "data",
    [
        frame(b"{"),
        frame(b"[]"),
        frame({"op": "Health"}),
        struct.pack(">I", 0),
        struct.pack(">I", (256 << 10) + 1),
        struct.pack(">I", 2**32 - 1),
        frame(b'{"id":1,"op":"Health","id":1}'),
    ],
)
def test_without_an_id_one_error_and_the_end(guest: Guest, data: bytes) -> None:
    guest.tls.sendall(data + frame({"id": 1, **RANDOM}))
    answer = guest.receive()
    assert (answer["id"], code(answer)) == (None, "malformed")
    assert guest.closed()


def test_the_largest_frame_is_taken(guest: Guest) -> None:
    body = json.dumps({"id": 1, **RANDOM}).encode()
    assert guest.ask(body + b" " * ((256 << 10) - len(body)))["id"] == 1


def test_hello_comes_first(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    for first in (
        {"id": 4, **RANDOM},
        {"id": 4, "op": "Nope"},
        {"id": 4, "op": "hello", "args": {"versions": [9]}},
    ):
        with Guest(gateway.path, vault.ca.pem, hello=False) as guest:
            guest.send(first, {"id": 5, "op": "hello", "args": {"versions": [1]}})
            answer = guest.receive()
            assert (answer["id"], code(answer)) == (4, "malformed")
            assert guest.closed()
    assert vault.calls == 0


def test_hello_comes_once(guest: Guest) -> None:
    assert code(guest.ask({"id": 1, "op": "hello", "args": {"versions": [1]}})) == "malformed"
    assert "ok" in guest.ask({"id": 2, **RANDOM})


def test_byte_by_byte_and_all_at_once(guest: Guest) -> None:
    requests = b"".join(frame({"id": n, **RANDOM}) for n in range(4))
    for byte in requests:
        guest.tls.sendall(bytes([byte]))
    assert [guest.receive()["id"] for _ in range(4)] == [0, 1, 2, 3]


def test_truncated_at_every_byte_nothing_is_done(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    request = frame({"id": 1, **RANDOM})
    for end in range(len(request)):
        with Guest(gateway.path, vault.ca.pem) as guest:
            guest.tls.sendall(request[:end])
    with Guest(gateway.path, vault.ca.pem) as guest:
        assert "ok" in guest.ask({"id": 1, **RANDOM})
    assert vault.calls == 1


def test_a_thousand_in_the_pipe_in_any_order(guest: Guest, vault: SimulatedVault) -> None:
    vault.shuffle = True
    guest.send(*({"id": n, **RANDOM} for n in range(1000)))
    ids = [guest.receive()["id"] for _ in range(1000)]
    assert sorted(ids) == list(range(1000))
    assert ids != sorted(ids)


def test_over_the_bound_in_flight_the_host_stops_reading(
    start: Callable[..., GatewayProcess], vault: SimulatedVault
) -> None:
    with Guest(start(in_flight_per_connection=8).path, vault.ca.pem) as guest:
        guest.send(*({"id": n, **HOLD} for n in range(20)))
        wait_for(lambda: len(vault.held) == 8)
        time.sleep(0.3)
        assert vault.calls == 8
        vault.release()
        wait_for(lambda: vault.calls == 16)
        vault.release()
        wait_for(lambda: vault.calls == 20)
        vault.release()
        assert sorted(guest.receive()["id"] for _ in range(20)) == list(range(20))


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.0\r\n\r\n", b"\x00" * 64, b"\x16\x03\x01\xff\xff" + b"\x01" * 300]
)
def test_garbage_before_tls_closes(gateway: GatewayProcess, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(8)
        sock.connect(str(gateway.path))
        sock.sendall(data)
        try:
            while sock.recv(100):  # an alert may come first
                pass
        except ConnectionResetError:
            return


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_12_is_refused(gateway: GatewayProcess) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(gateway.path))
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            context.wrap_socket(sock, server_hostname="hostd.channel")


def test_a_silent_guest_is_closed(start: Callable[..., GatewayProcess], vault: SimulatedVault) -> None:
    path = start(handshake_s=0.5, idle_s=60.0, frame_s=0.5).path
    with socket.socket(socket.AF_UNIX) as sock:  # no handshake
        sock.settimeout(8)
        sock.connect(str(path))
        assert sock.recv(1) == b""
    with Guest(path, vault.ca.pem, hello=False) as guest:  # no hello
        assert guest.closed()
    with Guest(path, vault.ca.pem) as guest:  # half a frame
        guest.tls.sendall(frame({"id": 1, **RANDOM})[:9])
        assert guest.closed()


def test_an_idle_guest_is_closed_but_not_while_something_is_in_flight(
    start: Callable[..., GatewayProcess], vault: SimulatedVault
) -> None:
    with Guest(start(idle_s=1.0).path, vault.ca.pem) as guest:
        guest.send({"id": 1, **HOLD})
        time.sleep(1.6)
        vault.release()
        assert guest.receive()["id"] == 1
        assert guest.closed()


def test_a_guest_that_does_not_read_is_closed(
    start: Callable[..., GatewayProcess], vault: SimulatedVault
) -> None:
    with Guest(start(frame_s=1.0).path, vault.ca.pem) as guest:
        guest.tls.settimeout(15)
        data = frame({"id": 1, "op": "Encrypt", "args": {"key": "k", "plaintext": "A" * 80_000}})
        with pytest.raises((ConnectionError, ssl.SSLError, TimeoutError)) as caught:
            guest.tls.sendall(data * 1000)
        assert not isinstance(caught.value, TimeoutError)
    assert vault.calls < 400


def test_large_answers_reach_a_guest_that_reads_late(guest: Guest) -> None:
    request = {"id": 1, "op": "Encrypt", "args": {"key": "k", "plaintext": "A" * 80_000}}
    guest.send(*[request] * 8)
    time.sleep(0.5)
    for _ in range(8):
        assert len(guest.receive()["ok"]["ciphertext"]) > 80_000


def rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_bad_frames_and_connections_leave_nothing_behind(
    gateway: GatewayProcess, vault: SimulatedVault
) -> None:
    bad = frame({"id": 1, "op": "Encrypt", "args": {"key": "k" * 200, "plaintext": "?"}})

    def storm(frames: int, connections: int) -> None:
        with Guest(gateway.path, vault.ca.pem) as guest:
            for _ in range(frames // 100):
                guest.tls.sendall(bad * 100)
                for _ in range(100):
                    assert code(guest.receive()) == "malformed"
        for _ in range(connections):
            with Guest(gateway.path, vault.ca.pem) as guest:
                guest.tls.sendall(frame(b"{"))

    storm(500, 20)
    with Guest(gateway.path, vault.ca.pem) as stay:
        (worker,) = gateway.workers()
        before = rss(worker), descriptors(worker), descriptors(gateway.process.pid)
        storm(10_000, 200)
        assert "ok" in stay.ask({"id": 1, **RANDOM})
        wait_for(lambda: descriptors(worker) <= before[1])
        assert descriptors(gateway.process.pid) <= before[2]
        assert rss(worker) < before[0] + 4096
        assert gateway.workers() == [worker]
