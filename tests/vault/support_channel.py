"""A channel CA's keeper with a real store and keyring, and a ledger in small."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from hostd.ipc.channel_ca import ChannelReport, RotateChannel, ShowChannel
from hostd.ipc.loop import Loop
from hostd.vault.channelkeeper import EVENT, PREPARED, ChannelKeeper
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry
from hostd.vault.store import Store
from tests.vault.support_keys import root

OFFICER = 'Host::"uid:0"'
DAY = 86_400
ROWS = ("channel_ca_key", "channel_ca_certificate")


class Desk:
    """A vault, as far as its channel CA goes; made again on the same folder it is the next start."""

    def __init__(self, folder: Path, loop: Loop, last: dict[str, Entry] | None = None) -> None:
        """`last`: the ledger's last entry of each event; empty without a ledger."""
        path = folder / "store.sqlite"
        self.store = Store(path, create=not path.exists())
        self.keyring = Keyring(self.store)
        self.entries: list[tuple[str, str, str]] = []
        self.last = dict(last or {})
        self.renewed = 0
        self.keeper = ChannelKeeper(self.record, loop, store=self.store, keyring=self.keyring, last=self.last)
        self.keeper.changed = self._changed

    def _changed(self) -> None:
        self.renewed += 1

    def record(self, event: str, *, principal: str = "", detail: str = "") -> int:
        self.entries.append((event, principal, detail))
        if event in (EVENT, PREPARED):
            seq, now = (
                1 + max((entry.seq for entry in self.last.values()), default=-1),
                int(time.time() * 1000),
            )
            self.last[event] = Entry(seq, now, event, "done", principal=principal, detail=detail)
        return len(self.entries)

    def unseal(self) -> None:
        self.keyring.unlock(root())
        self.keeper.load()

    def rotate(self, step: Literal["now", "prepare", "commit"] = "now") -> ChannelReport:
        return self.keeper.answer(RotateChannel(step), OFFICER)

    def show(self) -> ChannelReport:
        return self.keeper.answer(ShowChannel(), OFFICER)

    def close(self) -> None:
        self.keyring.lock()
        self.store.close()


def again(desk: Desk, tmp_path: Path, loop: Loop) -> Desk:
    """The next start, with the ledger as the one before left it."""
    desk.close()
    desk.__init__(tmp_path, loop, desk.last)  # type: ignore[misc]
    desk.unseal()
    return desk
