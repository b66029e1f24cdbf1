"""Who listens, who connects: decided by the kernel's credentials."""

from __future__ import annotations

import os
import select
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostd.ipc import connect
from hostd.ipc.channel import Channel
from hostd.ipc.connect import Connector, accept, listen
from hostd.ipc.loop import Loop, Timer

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its uid: root only")


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may use; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def until(loop: Loop, true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        loop.run_once(0.05)


def test_listen_replaces_a_stale_socket_and_sets_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "role.sock"
    first = listen(path, mode=0o600)
    first.close()
    second = listen(path, mode=0o666)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert os.listdir(tmp_path) == ["role.sock"]
    assert not second.getblocking()
    assert not second.get_inheritable()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        accepted = accept(second)
        assert accepted is not None
        sock, peer = accepted
        assert peer.uid == os.geteuid()
        sock.close()
    assert accept(second) is None
    second.close()


@needs_root
def test_root_gives_the_socket_to_the_one_who_may_connect(tmp_path: Path) -> None:
    with listen(tmp_path / "a", mode=0o600, owner=NOBODY):
        found = (tmp_path / "a").stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (NOBODY, 0o600)
    with listen(tmp_path / "b", mode=0o600, owner=os.geteuid()):
        found = (tmp_path / "b").stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), 0o600)


@needs_root
def test_another_user_opens_the_mode_instead(public: Path) -> None:

    def bind() -> None:
        listen(public / "theirs", mode=0o600, owner=0)
        listen(public / "own", mode=0o600, owner=NOBODY)

    assert in_child(bind, uid=NOBODY) == 0
    assert stat.S_IMODE((public / "theirs").stat().st_mode) == 0o666
    assert stat.S_IMODE((public / "own").stat().st_mode) == 0o600


def in_child(work: Callable[[], Any], *, uid: int) -> int:
    """Runs `work` in a forked child of another uid; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(uid)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Server:
    """A forked child that listens as another uid until it is told to end."""

    def __init__(self, path: Path, uid: int) -> None:
        ready, says = os.pipe()
        waits, self._end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._end)
                listener = socket.socket(socket.AF_UNIX)
                os.setuid(uid)
                listener.bind(os.fspath(path))
                listener.listen(8)
                os.write(says, b"x")
                while waits not in select.select([listener.fileno(), waits], [], [])[0]:
                    listener.accept()[0].close()
            finally:
                os._exit(0)
        os.close(says)
        os.close(waits)
        assert os.read(ready, 1) == b"x"
        os.close(ready)

    def stop(self) -> None:
        os.close(self._end)
        os.waitpid(self.pid, 0)


@needs_root
def test_a_listener_of_another_uid_is_not_the_role(
    public: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(connect, "LAST_DELAY_S", 0.02)
    path = public / "role.sock"
    impostor = Server(path, NOBODY)
    found: list[Channel[Any]] = []
    Connector(loop, path, uid=os.geteuid(), connected=found.append, record_type=int).start()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        loop.run_once(0.05)
    assert found == []
    # The uid it does run as is accepted: the refusal was for the uid alone.
    theirs: list[Channel[Any]] = []
    Connector(loop, path, uid=NOBODY, connected=theirs.append, record_type=int).start()
    until(loop, lambda: bool(theirs))
    theirs[0].close()
    impostor.stop()
    path.unlink()
    # The right one appears, and is found without another start().
    with listen(path, mode=0o600) as real:
        until(loop, lambda: bool(found))
        accepted = accept(real)
        assert accepted is not None
        accepted[0].close()
    found[0].close()


def test_keeps_trying_until_there_is_a_listener_and_not_too_often(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []
    call_after = loop.call_after

    def quickly(seconds: float, call: Callable[[], None]) -> Timer:
        delays.append(seconds)
        return call_after(seconds / 1000, call)

    monkeypatch.setattr(loop, "call_after", quickly)
    found: list[Channel[Any]] = []
    connector = Connector(loop, tmp_path / "x", uid=os.geteuid(), connected=found.append, record_type=int)
    connector.start()
    until(loop, lambda: len(delays) >= 10)
    assert delays[:3] == [connect.FIRST_DELAY_S, 2 * connect.FIRST_DELAY_S, 4 * connect.FIRST_DELAY_S]
    assert delays[9] == connect.LAST_DELAY_S
    with listen(tmp_path / "x", mode=0o600):
        until(loop, lambda: bool(found))
    tried = len(delays)
    found[0].close()
    connector.start()
    assert delays[tried] == connect.FIRST_DELAY_S


def test_a_failed_try_leaks_no_descriptor(tmp_path: Path, loop: Loop) -> None:
    before = len(os.listdir("/proc/self/fd"))
    connector = Connector(loop, tmp_path / "none", uid=0, connected=lambda _c: None)
    for _ in range(5):
        connector._try()
    assert len(os.listdir("/proc/self/fd")) == before
