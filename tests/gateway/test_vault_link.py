"""How often the gateway looks for a vault that is not there: found soon, and not looked for in haste."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from hostd.gateway import main
from hostd.gateway.main import VaultLink
from hostd.ipc.connect import listen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hostd.gateway.broker import Broker
    from hostd.ipc.channel import Channel
    from hostd.ipc.loop import Loop
    from hostd.ipc.serving import ToBroker


class Clock:
    """A loop that only notes what is to be done when."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self._next: Callable[[], None] = lambda: None

    def call_after(self, seconds: float, call: Callable[[], None]) -> None:
        self.delays.append(seconds)
        self._next = call

    def turn(self) -> None:
        self._next()


def waited(tmp_path: Path, times: int) -> list[float]:
    clock = Clock()
    link = VaultLink(cast("Loop", clock), cast("Broker", None), tmp_path / "none.sock", os.getuid())
    link.connect()
    for _ in range(times):
        clock.turn()
    return clock.delays


def test_a_vault_that_comes_is_noticed_after_a_quarter_more_than_it_took(tmp_path: Path) -> None:
    delays = waited(tmp_path, 60)
    for number, delay in enumerate(delays):
        assert delay <= sum(delays[:number]) / 4 + main.RETRY_FIRST_S + 1e-9


def test_a_vault_that_stays_away_is_looked_for_seldom(tmp_path: Path) -> None:
    delays = waited(tmp_path, 60)
    assert delays == sorted(delays)
    assert delays[-1] == main.RETRY_LAST_S


def test_who_was_found_and_lost_is_looked_for_at_once(tmp_path: Path) -> None:
    clock, lost = Clock(), []

    class Attaching:
        def attach(self, channel: Channel[ToBroker], gone: Callable[[], None]) -> None:
            channel.close()
            lost.append(gone)

    path = tmp_path / "broker.sock"
    link = VaultLink(cast("Loop", clock), cast("Broker", Attaching()), path, os.getuid())
    link.connect()
    for _ in range(10):
        clock.turn()
    assert clock.delays[-1] > main.RETRY_FIRST_S
    with listen(path, mode=0o600):
        clock.turn()
    assert len(lost) == 1
    lost[0]()
    assert clock.delays[-1] == main.RETRY_FIRST_S
