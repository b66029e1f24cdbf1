"""A client process under load:
`python -m tests.bench.load SOCKET CA KEY CONNECTIONS DEPTH SECONDS BYTES RECEIPT`.

Opens the connections, says `ready`, waits for a line on standard input, then keeps `DEPTH` Encrypt requests
in flight on each connection for `SECONDS`: everything an answer frees is asked again in one send. Requests
are made once and answers only counted and timed, so that the client costs little beside what it measures.
Prints one JSON object: seconds, refused by code, and the latencies in milliseconds.
"""

from __future__ import annotations

import base64
import collections
import json
import selectors
import socket
import ssl
import sys
import time
from pathlib import Path

from guestlib.wire.codec import HEADER, encode_message

RECEIVE_BYTES = 1 << 18


class Connection:
    """One TLS connection and what is in flight on it."""

    def __init__(self, path: str, context: ssl.SSLContext, body: bytes) -> None:
        plain = socket.socket(socket.AF_UNIX)
        plain.connect(path)
        self.tls = context.wrap_socket(plain, server_hostname="hostd.channel")
        self.tls.sendall(encode_message({"id": 0, "op": "hello", "args": {"versions": [1]}}))
        self._received = b""
        while not self._bodies(self.tls.recv(RECEIVE_BYTES)):
            pass
        self.tls.setblocking(False)
        self._body = body
        self._next = 1
        self._asked: dict[int, float] = {}
        self._unsent = b""
        self.latencies: list[float] = []
        self.failed: collections.Counter[str] = collections.Counter()

    @property
    def in_flight(self) -> int:
        return len(self._asked)

    def ask(self, count: int) -> None:
        """Sends so many requests at once."""
        now, frames = time.perf_counter(), []
        for number in range(self._next, self._next + count):
            body = b'{"id":%d%b' % (number, self._body)
            frames.append(HEADER.pack(len(body)) + body)
            self._asked[number] = now
        self._next += count
        self._unsent += b"".join(frames)
        self.send()

    def send(self) -> None:
        while self._unsent:
            try:
                sent = self.tls.send(self._unsent)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return
            self._unsent = self._unsent[sent:]

    def receive(self) -> int:
        """Takes what has come; how many answers that was."""
        answered = 0
        while True:
            try:
                data = self.tls.recv(RECEIVE_BYTES)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return answered
            if not data:
                raise SystemExit("the host closed the connection")
            now = time.perf_counter()
            for body in self._bodies(data):
                end = body.index(b",")
                asked = self._asked.pop(int(body[6:end]))
                if body.startswith(b'"ok"', end + 1):
                    self.latencies.append((now - asked) * 1e3)
                else:
                    self.failed[json.loads(body)["error"]["code"]] += 1
                answered += 1

    def _bodies(self, data: bytes) -> list[bytes]:
        buffer, bodies, start = self._received + data, [], 0
        while len(buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, start)
            if len(buffer) - start - HEADER.size < length:
                break
            bodies.append(buffer[start + HEADER.size : start + HEADER.size + length])
            start += HEADER.size + length
        self._received = buffer[start:]
        return bodies


def main() -> None:
    path, ca, key, count, depth, seconds, size, receipt = sys.argv[1:]
    context = ssl.create_default_context(cadata=Path(ca).read_text())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    request = {
        "op": "Encrypt",
        "args": {"key": key, "plaintext": base64.b64encode(b"\xa5" * int(size)).decode()},
        "receipt": receipt,
    }
    body = b"," + json.dumps(request, separators=(",", ":")).encode()[1:]
    connections = [Connection(path, context, body) for _ in range(int(count))]
    print("ready", flush=True)
    sys.stdin.readline()
    selector = selectors.DefaultSelector()
    began = time.perf_counter()
    for connection in connections:
        selector.register(connection.tls, selectors.EVENT_READ, connection)
        connection.ask(int(depth))
    until = began + float(seconds)
    while any(connection.in_flight for connection in connections):
        for found, _ in selector.select(1.0):
            connection = found.data
            answered = connection.receive()
            if answered and time.perf_counter() < until:
                connection.ask(answered)
            else:
                connection.send()
    took = time.perf_counter() - began
    failed = sum((connection.failed for connection in connections), collections.Counter[str]())
    latencies = sorted(latency for connection in connections for latency in connection.latencies)
    print(json.dumps({"seconds": took, "failed": failed, "latencies": latencies}))


if __name__ == "__main__":
    main()
