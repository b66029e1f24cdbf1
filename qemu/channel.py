"""The caller's end of the lab's agent (``qemu.agent``): commands, input, output, time limits.

A ``Channel`` speaks over any ``Transport``: the unix socket QEMU offers for L1's port, or, for a
guest, a connection the L1 agent made to the guest's own port (``Channel.connect``).
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from qemu import agent
from qemu.errors import ChannelClosedError, CommandFailedError, CommandTimeoutError, LabError, Result

MAX_OUTPUT: Final = 256 << 20  # bytes kept of one command's output: a bound, not a target
SEND_CHUNK: Final = 1 << 18  # bytes of input in one frame
KILL_GRACE: Final = 10.0  # seconds a killed command may take to be reported as ended


class Transport(Protocol):
    """A byte stream in both directions."""

    def send(self, data: bytes) -> None:
        """Write all of ``data``; ``OSError`` or ``ChannelClosedError`` when the other end is gone."""

    def recv(self) -> bytes:
        """Some bytes, at least one; empty at the end of the stream."""

    def close(self) -> None:
        """End both directions; a ``recv`` under way returns."""


class SocketTransport:
    """A connected socket as a transport."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def send(self, data: bytes) -> None:
        """See ``Transport``."""
        self._socket.sendall(data)

    def recv(self) -> bytes:
        """See ``Transport``."""
        try:
            return self._socket.recv(1 << 18)
        except OSError:
            return b""

    def close(self) -> None:
        """See ``Transport``."""
        with suppress(OSError):  # the other end closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Command:
    """A command under way in the machine (or a connected socket, which has no exit status).

    Threads may use it at once. Output is kept until asked for, up to ``MAX_OUTPUT``.
    """

    def __init__(self, channel: Channel, ident: int, argv: Sequence[str]) -> None:
        self.argv = tuple(argv)
        self._channel = channel
        self._ident = ident
        self._changed = threading.Condition()
        self._output = {agent.STDOUT: bytearray(), agent.STDERR: bytearray()}
        self._status: int | None = None
        self._lost = ""

    def write(self, data: bytes) -> None:
        """Give the command input; it does not wait for the command to read it."""
        for start in range(0, len(data), SEND_CHUNK):
            self._channel.send(agent.STDIN, self._ident, data[start : start + SEND_CHUNK])

    def end_input(self) -> None:
        """Close the command's standard input."""
        self._channel.send(agent.STDIN, self._ident, b"")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the command's process group; no error if it has ended."""
        self._channel.send(agent.KILL, self._ident, bytes([number]))

    @property
    def stdout(self) -> bytes:
        """All standard output so far."""
        with self._changed:
            return bytes(self._output[agent.STDOUT])

    @property
    def ended(self) -> bool:
        """Whether the command has ended (or was lost with its machine)."""
        return self._status is not None or bool(self._lost)

    def read_some(self) -> bytes:
        """The next output not yet read; waits for it; empty at the end. Drops what it returns."""
        with self._changed:
            self._changed.wait_for(lambda: self._output[agent.STDOUT] or self.ended)
            data = bytes(self._output[agent.STDOUT])
            self._output[agent.STDOUT].clear()
            return data

    def wait_for(self, marker: bytes, timeout: float) -> bytes:
        """Wait until standard output contains ``marker``; return all of it so far."""
        return self._wait_output(lambda out: marker in out, repr(marker), timeout)

    def wait_for_line(self, number: int, timeout: float) -> bytes:
        """Wait for the whole line ``number``, from 0, of standard output; return it without its end."""
        said = self._wait_output(lambda out: out.count(b"\n") > number, f"line {number}", timeout)
        return said.split(b"\n")[number]

    def _wait_output(self, ready: Callable[[bytearray], bool], what: str, timeout: float) -> bytes:
        out = self._output[agent.STDOUT]
        with self._changed:
            self._changed.wait_for(lambda: ready(out) or self.ended, timeout)
            if ready(out):
                return bytes(out)
            how = "ended" if self.ended else f"went on for {timeout:g} s"
            said = self._said()
        raise CommandTimeoutError(f"{shlex.join(self.argv)!r} {how} without saying {what}: {said}")

    def wait(self, timeout: float, *, check: bool = True) -> Result:
        """Wait for the end. A command out of time is killed and reported as ``CommandTimeoutError``."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended, timeout):
                said = self._said()
                self.kill()
                self._changed.wait_for(lambda: self.ended, KILL_GRACE)
                raise CommandTimeoutError(f"{shlex.join(self.argv)!r} took over {timeout:g} s: {said}")
            if self._status is None:
                raise ChannelClosedError(f"{shlex.join(self.argv)!r} was lost: {self._lost}")
            out, err = (bytes(self._output[kind]) for kind in (agent.STDOUT, agent.STDERR))
            result = Result(self.argv, self._status, out, err)
        if check and result.rc != 0:
            raise CommandFailedError(result)
        return result

    def _said(self) -> str:
        return bytes(b"".join(self._output.values())).decode(errors="replace")[-2000:] or "(nothing)"

    def _on_output(self, kind: int, body: bytes) -> None:
        with self._changed:
            if len(self._output[kind]) + len(body) > MAX_OUTPUT:
                raise LabError(f"{shlex.join(self.argv)!r} wrote more than {MAX_OUTPUT} bytes")
            self._output[kind] += body
            self._changed.notify_all()

    def _on_end(self, status: int | None, lost: str = "") -> None:
        with self._changed:
            self._status, self._lost = status, lost
            self._changed.notify_all()


class _Relay:
    """A connection made by one machine's agent, as the transport of another's channel."""

    def __init__(self, connection: Command) -> None:
        self.send = connection.write
        self.recv = connection.read_some
        self._connection = connection

    def close(self) -> None:
        """See ``Transport``."""
        with suppress(ChannelClosedError):  # the machine in between is gone, and the connection with it
            self._connection.kill()


class Channel:
    """Runs commands through one agent. Any number at once, from any thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._ids = itertools.count(1)
        self._commands: dict[int, Command] = {}
        self._lock = threading.Lock()
        self._greeting = os.urandom(16)
        self._greeted = threading.Event()
        self._closed = ""
        self._reader = threading.Thread(target=self._read, name="lab-channel", daemon=True)
        self._reader.start()
        self.send(agent.HELLO, 0, self._greeting)

    def greeted(self, timeout: float) -> bool:
        """Wait for the agent's first answer; False when the time is over."""
        return self._greeted.wait(timeout) and not self._closed

    @property
    def alive(self) -> bool:
        """Whether the other end is still there, as far as anyone has noticed."""
        return not self._closed

    def start(self, argv: Sequence[str] | str) -> Command:
        """Start a command: a list is an argv, a string is a line for ``/bin/sh``."""
        items = ["/bin/sh", "-c", argv] if isinstance(argv, str) else list(argv)
        if not items or any("\0" in item for item in items):
            raise ValueError("a command needs at least one word, and no word may hold a NUL")
        return self._open(agent.RUN, items, "\0".join(items))

    def run(
        self,
        argv: Sequence[str] | str,
        timeout: float = 60.0,
        *,
        check: bool = True,
        stdin: bytes | BinaryIO = b"",
    ) -> Result:
        """Run a command to its end; see ``Command.wait`` for what it raises."""
        deadline = time.monotonic() + timeout
        command = self.start(argv)
        if isinstance(stdin, bytes):
            command.write(stdin)
        else:
            while data := stdin.read(SEND_CHUNK):
                command.write(data)
        command.end_input()
        return command.wait(max(0.0, deadline - time.monotonic()), check=check)

    def put(self, local: Path | bytes, remote: str, *, mode: int = 0o644) -> None:
        """Write a file of the machine, from a local file or from bytes; its folder must exist."""
        script = 'umask 077 && cat >"$1" && chmod "$2" "$1"'
        argv = ["/bin/sh", "-c", script, "put", remote, f"{mode:o}"]
        if isinstance(local, bytes):
            self.run(argv, 120, stdin=local)
        else:
            with local.open("rb") as source:
                self.run(argv, 300, stdin=source)

    def get(self, remote: str) -> bytes:
        """Read a file of the machine, whole. Works for files of /proc and /sys too."""
        return self.run(["cat", "--", remote], 120).stdout

    def connect(self, path: str) -> Transport:
        """Connect to a unix socket of the machine; an error shows as the end of the stream."""
        return _Relay(self._open(agent.CONNECT, ["connect", path], path))

    def close(self) -> None:
        """End the channel; commands still under way in the machine are not killed."""
        self._transport.close()
        if threading.current_thread() is not self._reader:
            self._reader.join(5.0)

    def send(self, kind: int, ident: int, body: bytes) -> None:
        """Send one frame (for ``Command``)."""
        with self._lock:
            if self._closed:
                raise ChannelClosedError(f"no agent to talk to: {self._closed}")
            try:
                self._transport.send(agent.HEADER.pack(kind, ident, len(body)) + body)
            except OSError as error:
                raise ChannelClosedError(f"the agent went away: {error}") from error

    def _open(self, kind: int, argv: Sequence[str], body: str) -> Command:
        ident = next(self._ids)
        command = self._commands[ident] = Command(self, ident, argv)
        self.send(kind, ident, body.encode())
        return command

    def _read(self) -> None:
        buffer = bytearray()
        reason = "the machine or its agent ended"
        try:
            while data := self._transport.recv():
                buffer += data
                while len(buffer) >= agent.HEADER.size:
                    kind, ident, length = agent.HEADER.unpack_from(buffer)
                    end = agent.HEADER.size + length
                    if len(buffer) < end:
                        break
                    self._dispatch(kind, ident, bytes(buffer[agent.HEADER.size : end]))
                    del buffer[:end]
        except (LabError, KeyError, ValueError) as error:
            reason = f"protocol error: {error!r}"
        self._closed = reason
        for command in list(self._commands.values()):
            command._on_end(None, reason)
        self._greeted.set()

    def _dispatch(self, kind: int, ident: int, body: bytes) -> None:
        if kind == agent.HELLO and body == self._greeting:
            self._greeted.set()
        elif kind in (agent.STDOUT, agent.STDERR):
            command = self._commands.get(ident)
            if command is not None:  # else: output of what an ended command left behind
                command._on_output(kind, body)
        elif kind == agent.EXIT:
            self._commands.pop(ident)._on_end(agent.STATUS.unpack(body)[0])
        else:
            raise ValueError(f"frame of kind {kind}")
