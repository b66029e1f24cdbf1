"""The lab's agent: runs commands for whoever holds the other end of a virtio-serial port.

It is one file of standard-library Python because it also runs as the first process of a guest's
initramfs, where every import costs start-up time. It runs inside L1 and L2, as root, and obeys
every frame: the port is the lab's own, reachable only from the machine outside.

A frame is ``kind (u8) | id (u32) | length (u32) | body``, big-endian. The caller picks ids.

====== ======== ====================================================================
 kind   sent by  body
====== ======== ====================================================================
HELLO   both     a nonce; the answer repeats it
RUN     caller   argv, its items parted by NUL
CONNECT caller   path of a unix socket to connect to; the stream is STDIN and STDOUT
STDIN   caller   bytes; an empty body ends the input
KILL    caller   signal number (u8), for the command's whole process group
STDOUT  agent    bytes
STDERR  agent    bytes
EXIT    agent    exit status (i32), minus the signal number after a signal; ends the id
====== ======== ====================================================================
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Final

HEADER: Final = struct.Struct("!BII")
STATUS: Final = struct.Struct("!i")
HELLO, RUN, CONNECT, STDIN, KILL, STDOUT, STDERR, EXIT = range(1, 9)

MAX_BODY: Final = 1 << 20  # bytes; both sides cut longer data into several frames
CHUNK: Final = 1 << 16  # bytes read from a command at once
DRAIN: Final = 2.0  # seconds to wait for output of a command's own left-behind children
CANNOT_START: Final = 127  # what a shell reports for a command it cannot find
PORT: Final = "/dev/virtio-ports/org.hostd.lab"


class Port:
    """The virtio-serial port: whole frames in, whole frames out."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._lock = Lock()

    def read_exactly(self, length: int) -> bytes:
        """Read ``length`` bytes. A port nobody has opened outside reads as empty: wait for them."""
        parts = bytearray()
        while len(parts) < length:
            part = os.read(self._fd, length - len(parts))
            if not part:
                time.sleep(0.05)
            parts += part
        return bytes(parts)

    def send(self, kind: int, ident: int, body: bytes) -> None:
        """Write one frame; frames of different threads do not mix."""
        frame = memoryview(HEADER.pack(kind, ident, len(body)) + body)
        with self._lock:
            while frame:
                frame = frame[os.write(self._fd, frame) :]


class Job:
    """One command or one connected socket."""

    def __init__(self, port: Port, ident: int) -> None:
        self.port = port
        self.ident = ident
        self.input: SimpleQueue[bytes] = SimpleQueue()

    def pump_out(self, fd: int, kind: int) -> None:
        """Send all that can be read from ``fd``."""
        while True:
            try:
                data = os.read(fd, CHUNK)
            except OSError:
                data = b""
            if not data:
                return
            self.port.send(kind, self.ident, data)

    def write_in(self, fd: int) -> None:
        """Write the queued input to ``fd`` until its end or until nobody reads it."""
        while body := self.input.get():
            view = memoryview(body)
            try:
                while view:
                    view = view[os.write(fd, view) :]
            except OSError:
                return

    def finish(self, status: int) -> None:
        """Report the end; stop the input thread if it still waits."""
        self.input.put(b"")
        self.port.send(EXIT, self.ident, STATUS.pack(status))

    def refuse(self, error: OSError) -> None:
        """Report that the job could not start."""
        self.port.send(STDERR, self.ident, f"lab agent: {error}\n".encode())
        self.finish(CANNOT_START)

    def kill(self, signal: int) -> None:
        """Signal the job; nothing to do for one that never started."""


class Command(Job):
    """A process, its three streams and its end."""

    process: subprocess.Popen[bytes] | None = None

    def start(self, argv: list[str]) -> None:
        """Start ``argv`` in a session of its own, or report why not."""
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
            )
        except OSError as error:
            self.refuse(error)
            return
        Thread(target=self._feed, daemon=True).start()
        Thread(target=self._wait, daemon=True).start()

    def kill(self, signal: int) -> None:
        """Signal the command's whole session group."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):  # it ended by itself in the meantime
                os.killpg(self.process.pid, signal)

    def _feed(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            self.write_in(pipe.fileno())

    def _wait(self) -> None:
        assert self.process is not None
        out, err = self.process.stdout, self.process.stderr
        assert out is not None
        assert err is not None
        pumps = [
            Thread(target=self.pump_out, args=(pipe.fileno(), kind), daemon=True)
            for pipe, kind in ((out, STDOUT), (err, STDERR))
        ]
        for pump in pumps:
            pump.start()
        status = self.process.wait()
        for pump in pumps:
            pump.join(DRAIN)
        self.finish(status)
        if not any(pump.is_alive() for pump in pumps):
            out.close()
            err.close()


class Connection(Job):
    """A unix socket of this machine, handed through to the caller."""

    def start(self, path: str) -> None:
        """Connect, or report why not."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            self.refuse(error)
            return
        Thread(target=self.write_in, args=(self._socket.fileno(),), daemon=True).start()
        Thread(target=self._relay, daemon=True).start()

    def kill(self, signal: int) -> None:
        """Any signal closes the connection."""
        with suppress(OSError):  # it ended by itself in the meantime
            self._socket.shutdown(socket.SHUT_RDWR)

    def _relay(self) -> None:
        self.pump_out(self._socket.fileno(), STDOUT)
        self.finish(0)
        self._socket.close()


def serve(port: Port) -> None:
    """Obey frames for ever. A broken frame is a bug of the lab: crash, and say so."""
    jobs: dict[int, Command | Connection] = {}
    while True:
        kind, ident, length = HEADER.unpack(port.read_exactly(HEADER.size))
        if length > MAX_BODY:
            raise ValueError(f"frame of {length} bytes")
        body = port.read_exactly(length)
        if kind == HELLO:
            port.send(HELLO, ident, body)
        elif kind == RUN:
            command = jobs[ident] = Command(port, ident)
            command.start(body.decode().split("\0"))
        elif kind == CONNECT:
            connection = jobs[ident] = Connection(port, ident)
            connection.start(body.decode())
        elif kind == STDIN:
            jobs[ident].input.put(body)
        elif kind == KILL:
            jobs[ident].kill(body[0])
        else:
            raise ValueError(f"frame of kind {kind}")


def main() -> None:
    """Wait for the port (its driver may load later than this starts), then serve."""
    path = sys.argv[1] if len(sys.argv) > 1 else PORT
    for _ in range(600):
        if os.path.exists(path):
            break
        time.sleep(0.05)
    serve(Port(path))


if __name__ == "__main__":
    main()
