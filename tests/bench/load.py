"""A client process under load: `python -m tests.bench.load SOCKET CA KEY CONNECTIONS DEPTH SECONDS BYTES`.

Opens the connections, says `ready`, waits for a line on standard input, then keeps `DEPTH` Encrypt
requests in flight on each connection for `SECONDS`. Prints one JSON object: answered, failed by
code, and the latencies in milliseconds.
"""

from __future__ import annotations

import collections
import json
import sys
import threading
import time
from pathlib import Path

from guestlib.client import Client, Handle
from guestlib.errors import HostdError
from guestlib.trust import Trust


class Connection(threading.Thread):
    def __init__(self, client: Client, key: str, depth: int, size: int) -> None:
        super().__init__()
        self.client = client
        self.args = {"key": key, "plaintext": b"\xa5" * size}
        self.depth = depth
        self.until = 0.0
        self.latencies: list[float] = []
        self.failed: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        flying = collections.deque(self._sent() for _ in range(self.depth))
        while flying:
            started, handle = flying.popleft()
            try:
                handle.result()
                self.latencies.append((time.perf_counter() - started) * 1e3)
            except HostdError as error:
                self.failed[error.code] += 1
            if time.monotonic() < self.until:
                flying.append(self._sent())

    def _sent(self) -> tuple[float, Handle]:
        return time.perf_counter(), self.client.submit("Encrypt", self.args, receipt="reference")


def main() -> None:
    socket, ca, key, connections, depth, seconds, size = sys.argv[1:]
    trust = Trust.channel_ca(Path(ca).read_text())
    threads = []
    for _ in range(int(connections)):
        client = Client(trust, f"unix:{socket}")
        client.health()
        threads.append(Connection(client, key, int(depth), int(size)))
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.monotonic()
    for thread in threads:
        thread.until = started + float(seconds)
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - started
    failed: collections.Counter[str] = sum((t.failed for t in threads), collections.Counter())
    latencies = sorted(latency for t in threads for latency in t.latencies)
    print(json.dumps({"seconds": took, "failed": failed, "latencies": latencies}))
    for thread in threads:
        thread.client.close()


if __name__ == "__main__":
    main()
