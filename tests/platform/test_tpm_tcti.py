"""Links: deadlines, garbage, a device that is none."""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import threading
import time
from pathlib import Path

import pytest
from support_tpm import Embedded

from hostd.platform.tpm_errors import TpmUnavailableError
from hostd.platform.tpm_tcti import DeviceLink, SocketLink, check_response, open_link

GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def serve(path: Path, *chunks: bytes, pause: float = 0.0) -> threading.Thread:
    """One connection that answers these chunks, whatever it is asked."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()

    def run() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(BrokenPipeError):
                connection.recv(4096)
                for chunk in chunks:
                    time.sleep(pause)
                    connection.sendall(chunk)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_command_and_its_response(host: Embedded) -> None:
    response = host.connect().exchange(GET_RANDOM, soon())
    check_response(response)
    assert len(response) == 20


def test_a_response_in_pieces(tmp_path: Path) -> None:
    whole = bytes.fromhex("80010000000c000000000000")
    thread = serve(tmp_path / "s", *(bytes([byte]) for byte in whole))
    assert SocketLink(tmp_path / "s").exchange(GET_RANDOM, soon()) == whole
    thread.join()


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ((), "closed the connection"),
        ((bytes(9),), "closed the connection"),
        ((bytes.fromhex("80010000000c00000000"),), "closed the connection"),
        ((bytes.fromhex("80010000000900000000"),), "claims a size of 9"),
        ((bytes.fromhex("80017fffffff00000000"),), "claims a size of 2147483647"),
    ],
)
def test_what_is_no_response(tmp_path: Path, chunks: tuple[bytes, ...], why: str) -> None:
    thread = serve(tmp_path / "s", *chunks)
    with pytest.raises(TpmUnavailableError, match=why):
        SocketLink(tmp_path / "s").exchange(GET_RANDOM, soon())
    thread.join()


def test_a_dripping_peer_does_not_stretch_the_deadline(tmp_path: Path) -> None:
    thread = serve(tmp_path / "s", *([b"\x80"] * 8), pause=0.6)
    start = time.monotonic()
    with pytest.raises(TpmUnavailableError):
        SocketLink(tmp_path / "s").exchange(GET_RANDOM, soon(0.3))
    assert time.monotonic() - start < 4 * 0.6
    thread.join()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(TpmUnavailableError, match="No such file"):
        SocketLink(tmp_path / "s").exchange(GET_RANDOM, soon())


def test_a_deadline_that_is_over(host: Embedded) -> None:
    with pytest.raises(TpmUnavailableError, match="deadline"):
        host.connect().exchange(GET_RANDOM, time.monotonic() - 1)


def test_a_path_too_long_for_a_socket() -> None:
    with pytest.raises(TpmUnavailableError, match="too long"):
        SocketLink(Path("/" + "x" * 107))


@pytest.mark.parametrize("size", range(10))
def test_check_response_refuses_short_ones(size: int) -> None:
    with pytest.raises(TpmUnavailableError):
        check_response(bytes.fromhex("80010000000a00000000")[:size])


def test_open_link(host: Embedded, tmp_path: Path) -> None:
    path = host.process.socket
    assert isinstance(open_link("swtpm", path), SocketLink)
    assert isinstance(open_link(f"unix:{path}"), SocketLink)
    for device in ("swtpm", str(tmp_path / "absent")):
        with pytest.raises(TpmUnavailableError):
            open_link(device)


def test_a_file_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TpmUnavailableError, match="not a character device"):
        DeviceLink(tmp_path / "file")


def test_a_device_answers_or_times_out() -> None:
    """A terminal stands in: a character device whose other end the test holds."""
    ours, theirs = pty.openpty()
    try:
        import tty

        tty.setraw(theirs)
        link = DeviceLink(Path(os.ttyname(theirs)))
        assert not link.managed
        start = time.monotonic()
        with pytest.raises(TpmUnavailableError, match="no answer"):
            link.exchange(GET_RANDOM, soon(0.2))
        assert time.monotonic() - start < 15
        assert os.read(ours, 4096) == GET_RANDOM
        os.write(ours, bytes.fromhex("80010000000a00000000"))
        assert link.exchange(GET_RANDOM, soon()) == bytes.fromhex("80010000000a00000000")
        link.close()
        link.close()
        with pytest.raises(TpmUnavailableError, match="closed"):
            link.exchange(GET_RANDOM, soon())
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_device_that_goes_away() -> None:
    ours, theirs = pty.openpty()
    link = DeviceLink(Path(os.ttyname(theirs)))
    os.close(theirs)
    os.close(ours)
    with pytest.raises(TpmUnavailableError, match="Input/output error"):
        link.exchange(GET_RANDOM, soon())
    link.close()
