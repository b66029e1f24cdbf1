"""hostctl's end of the operators' socket: a vault that is silent, and one that hangs up, are told apart."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestlib.errors import TransportError
from hostd.admin.link import Link
from hostd.config import Config, Host
from hostd.ipc import operating as adm


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Config, socket.socket]]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "admin.sock"))
        listener.listen()
        yield Config(host=Host(run_dir=str(tmp_path))), listener


def test_a_vault_that_does_not_answer_in_time(served: tuple[Config, socket.socket]) -> None:
    config, _ = served
    link = Link(config, timeout_s=0.2)
    with pytest.raises(TransportError, match="did not answer in time"):
        link.ask(adm.Status(), adm.StatusReport)
    link.close()


def test_a_vault_that_hangs_up(served: tuple[Config, socket.socket]) -> None:
    config, listener = served
    hanging_up = threading.Thread(target=lambda: listener.accept()[0].close())
    hanging_up.start()
    link = Link(config, timeout_s=5.0)
    with pytest.raises(TransportError, match="closed the connection"):
        link.ask(adm.Status(), adm.StatusReport)
    link.close()
    hanging_up.join()
