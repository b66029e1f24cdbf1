"""Promise: no bytes on the guests' socket get more than a typed error or a close, and none cost memory."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guestlib.errors import BY_CODE
from tests.e2e.harness import Host, Settings, adopted, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
GROWTH_BYTES = 12 << 20
"""Allocators keep what they once had; thousands of frames of this size would be far more."""
ROUNDS = 2000
HELLO = {"id": 0, "op": "hello", "args": {"versions": [1], "client": "test"}}


@pytest.fixture(scope="module")
def shared(binary: Path) -> Iterator[Host]:
    with adopted(binary, Settings(gateway="handshake_s = 1.0\nframe_s = 1.0\n")) as host:
        yield host


class Raw:
    """A TLS connection that says whatever it is told to."""

    def __init__(self, host: Host, *, hello: bool = True) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(host.guest_socket))
        self.tls = host.trust().context().wrap_socket(sock, server_hostname="hostd.channel")
        if hello:
            self.send(HELLO)
            assert "ok" in self.receive()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.tls.close()

    def send(self, message: object) -> None:
        self.frame(json.dumps(message).encode())

    def frame(self, body: bytes) -> None:
        self.tls.sendall(struct.pack(">I", len(body)) + body)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.tls.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def receive(self) -> dict[str, Any]:
        try:
            (length,) = struct.unpack(">I", self._exactly(4))
            body = self._exactly(length)
        except OSError as error:
            raise EOFError from error
        for trace in (b"Traceback", b'File \\"', b".py", b"hostd/", b"msgspec"):
            assert trace not in body, body
        return json.loads(body)

    def ended(self) -> bool:
        try:
            self.receive()
        except EOFError:
            return True
        return False


BODIES: dict[str, bytes] = {
    "not JSON": b"\x00\x01\x02",
    "cut": b'{"id": 1, "op": "Health", "args": {',
    "not UTF-8": b'{"id": 1, "op": "\xff\xfe"}',
    "array": b"[]",
    "number": b"7",
    "no id": b'{"op": "Health"}',
    "id of text": b'{"id": "1", "op": "Health"}',
    "id negative": b'{"id": -1, "op": "Health"}',
    "id huge": b'{"id": 99999999999999999999, "op": "Health"}',
    "twice": b'{"id": 1, "id": 2, "op": "Health"}',
    "unknown operation": b'{"id": 1, "op": "ExportKey"}',
    "operation of an officer": b'{"id": 1, "op": "clear-drift", "args": {}}',
    "unknown field": b'{"id": 1, "op": "Health", "sudo": true}',
    "args of a list": b'{"id": 1, "op": "Health", "args": []}',
    "wrong type": b'{"id": 1, "op": "Encrypt", "args": {"key": 7, "plaintext": "eA=="}}',
    "bad base64": b'{"id": 1, "op": "Encrypt", "args": {"key": "alias/x", "plaintext": "!"}}',
    "too long": b'{"id": 1, "op": "GenerateRandom", "args": {"length": 1000000000}}',
    "a float": b'{"id": 1, "op": "GenerateRandom", "args": {"length": 1e3}}',
    "NaN": b'{"id": 1, "op": "GenerateRandom", "args": {"length": NaN}}',
    "deep": b'{"id": 1, "op": "Health", "args": ' + b"[" * 50_000,
    "deadline": b'{"id": 1, "op": "Health", "deadline_ms": 600001}',
    "second hello": json.dumps(HELLO).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_body(shared: Host, name: str) -> None:
    with Raw(shared) as raw:
        raw.frame(BODIES[name])
        answer = raw.receive()
        assert answer["error"]["code"] == "malformed", answer
        if answer["id"] is None:
            assert raw.ended()
        else:
            raw.send({"id": 9, "op": "Health"})
            assert raw.receive()["ok"]["gate"] == "open"


@pytest.mark.parametrize("length", [0, 262_145, 0xFFFFFFFF])
def test_length(shared: Host, length: int) -> None:
    with Raw(shared) as raw:
        raw.tls.sendall(struct.pack(">I", length) + b"x")
        answer = raw.receive()
        assert (answer["id"], answer["error"]["code"]) == (None, "malformed")
        assert raw.ended()


def test_before_hello(shared: Host) -> None:
    with Raw(shared, hello=False) as raw:
        raw.send({"id": 1, "op": "Health"})
        assert raw.receive()["error"]["code"] == "malformed"
        assert raw.ended()


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", os.urandom(600), b"\0" * 70_000]
)
def test_no_tls(shared: Host, first: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(shared.guest_socket))
        sock.sendall(first)
        rest = b""
        while part := _received(sock):
            rest += part
        assert len(rest) < 100  # an alert at most


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except ConnectionError:
        return b""


def test_old_tls_is_refused(shared: Host) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(shared.guest_socket))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(sock)


@pytest.mark.parametrize("started", [b"", b"\x16\x03\x01"])
def test_silence_is_closed(shared: Host, started: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(shared.guest_socket))
        sock.sendall(started)
        began = time.monotonic()
        assert _received(sock) == b""
        assert 0.5 < time.monotonic() - began < 8


def test_slow_frame_is_closed(shared: Host) -> None:
    with Raw(shared) as raw:
        began = time.monotonic()
        with pytest.raises((OSError, EOFError)):  # noqa: PT012
            for byte in struct.pack(">I", 200) + b" " * 196:
                raw.tls.sendall(bytes([byte]))
                time.sleep(0.05)  # the attack's pace
        assert time.monotonic() - began < 10


def test_unread_answers_do_not_grow(shared: Host) -> None:
    """A guest that asks and never reads: the host stops reading, and closes."""
    with Raw(shared) as raw:
        raw.tls.settimeout(0.5)
        request = json.dumps({"id": 1, "op": "ListKeys"}).encode()
        data = (struct.pack(">I", len(request)) + request) * 1000
        with pytest.raises(OSError):  # noqa: PT011, PT012 - it times out or is closed
            for _ in range(1000):
                raw.tls.sendall(data)


def sizes(host: Host) -> dict[str, tuple[int, int]]:
    """Role → (RSS, descriptors)."""
    pids = {"gateway": host.pid("gateway"), "vault": host.pid("vault"), "worker": host.workers()[0]}
    found = {}
    for role, pid in pids.items():
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found[role] = pages * os.sysconf("SC_PAGESIZE"), len(os.listdir(f"/proc/{pid}/fd"))
    return found


def test_thousands_of_bad_frames_cost_nothing(shared: Host) -> None:
    seeded = random.Random(7)
    good = b'{"id": 1, "op": "GenerateRandom", "args": {"length": 16}, "receipt": "none"}'

    def storm(rounds: int) -> None:
        raw = Raw(shared)
        for number in range(rounds):
            body = bytearray(seeded.choice(list(BODIES.values()))[:4096] if number % 2 else good)
            for _ in range(seeded.randint(0, 3)):
                body[seeded.randrange(len(body))] = seeded.randrange(256)
            try:
                raw.frame(bytes(body))
                answer = raw.receive()
                code = answer.get("error", {}).get("code", "malformed")
                assert code in BY_CODE, answer
                assert code != "internal", answer
                closed = answer["id"] is None
            except (EOFError, OSError):
                closed = True
            if closed:
                raw.tls.close()
                raw = Raw(shared)
        raw.tls.close()

    pids = shared.pids()
    with Raw(shared):  # keeps the worker
        storm(300)
        before = sizes(shared)
        storm(ROUNDS)
        until(
            lambda: all(n <= before[r][1] for r, (_, n) in sizes(shared).items()), "descriptors are back", 10
        )
        after = sizes(shared)
    print({role: f"{(after[role][0] - before[role][0]) >> 10} KiB more" for role in after})
    for role, (rss, _) in after.items():
        assert rss - before[role][0] < GROWTH_BYTES, (role, before, after)
    assert shared.pids() == pids, "a role died"
    assert "Traceback" not in shared.log()
