"""Channel CAs whose time is over: prepared once, or not valid any more."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from guestlib.errors import ConflictError, UnavailableError
from hostd.ipc.loop import Loop
from hostd.vault import channelkeeper
from tests.vault.support_channel import DAY, ROWS, Desk, again
from tests.vault.support_keys import root

NEXT_ROWS = ("channel_ca_next_key", "channel_ca_next_certificate")


@pytest.mark.parametrize("current", ["kept", "none"])
@pytest.mark.parametrize("step", ["now", "commit"])
def test_one_that_was_prepared_does_not_come_back(
    desk: Desk, tmp_path: Path, loop: Loop, step: Literal["now", "commit"], current: str
) -> None:
    """Its row is put back: after it was forgotten, or after it was in force and another followed it."""
    prepared = desk.rotate("prepare").next
    assert prepared is not None
    older = {name: desk.store.meta(name) or b"" for name in NEXT_ROWS}
    desk.rotate(step)
    last = desk.rotate().ca
    for name, value in older.items():
        desk.store.set_meta(name, value)
    for name in ROWS if current == "none" else ():
        desk.store.set_meta(name, b"")
    desk.store.commit()
    started = again(desk, tmp_path, loop)
    report = started.show()
    assert report.next is None
    assert len(started.keeper.pinned) == 1
    assert report.ca.digest != prepared.digest
    assert (report.ca == last) == (current == "kept")
    with pytest.raises(ConflictError, match="no channel CA is prepared"):
        started.rotate("commit")
    # One that is prepared now is not the older one.
    now = started.rotate("prepare").next
    for name, value in older.items():
        started.store.set_meta(name, value)
    started.store.commit()
    assert now not in (None, prepared)
    assert again(started, tmp_path, loop).show().next is None


Clock = Callable[[float], None]


def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    def at(when: float) -> None:
        monkeypatch.setattr("time.time", lambda: when)
        monkeypatch.setattr(
            channelkeeper, "utc_now", lambda: datetime.datetime.fromtimestamp(when, datetime.UTC)
        )

    return at


def test_one_that_is_over_issues_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the keys are locked nothing follows it; who asks for a certificate then is refused."""

    at = clock(monkeypatch)
    before = desk.show().ca
    desk.keyring.lock()
    at(before.not_after - 1)
    desk.keeper.identity()
    for late in (0, 1, DAY):
        at(before.not_after + late)
        with pytest.raises(UnavailableError, match="the channel CA is no longer valid"):
            desk.keeper.identity()
    assert (desk.show().ca, desk.show().issued) == (before, 1)
    desk.keyring.unlock(root())
    desk.keeper.renew()
    desk.keeper.identity()


def test_a_clock_that_ran_ahead_outlives_no_ca(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was years ahead for a while. The CA that was made after that is dated by the host's clock, and its
    age is told by the one that does not go back: it is renewed before guests refuse it."""
    at, now = clock(monkeypatch), time.time()
    at(now + 1000 * DAY)
    desk.keeper.renew()
    at(now)
    made = desk.rotate().ca
    assert made.not_before <= now
    at(made.not_after - 2 * DAY)
    desk.keeper.renew()
    assert desk.show().ca == made
    at(made.not_after - DAY)
    desk.keeper.renew()
    after = desk.show().ca
    assert after.not_after > made.not_after + 300 * DAY
    desk.keeper.renew()
    assert desk.show().ca == after
