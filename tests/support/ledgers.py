"""A ledger with small segments behind its officers' desk, as hostctl asks it; without a vault around it."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from guestlib.attest.bundle import TrustBundle
from hostd.ipc.loop import Loop
from hostd.vault.checkpoints import Checkpoints
from hostd.vault.heads import Head, Heads
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry, Ledger
from hostd.vault.ledgerdesk import LedgerDesk
from hostd.vault.opening import Signed
from hostd.vault.store import Store
from tests.vault.support_keys import root

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.ipc import operating as adm


MEMORY = Path("/dev/shm")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs cost a disk minutes."""
    where = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="ledger-") as name:
        yield Path(name)


class Desk:
    """`ask` is what `Context.ask` is for hostctl. The heads are signed by nobody; the checkpoints are."""

    def __init__(self, folder: Path, entries: int = 20) -> None:
        self.folder = folder
        self.store = Store(folder / "store.sqlite", create=True)
        self.keyring = Keyring(self.store)
        self.keyring.unlock(root())
        self.path = folder / "ledger.jsonl"
        self.segment = entries
        self.ledger = Ledger(self.path, segment_entries=entries)
        self.heads = Heads(folder / "head.json")
        self.loop = Loop()
        self.checkpoints = Checkpoints(
            folder / "checkpoint", self.keyring, store_id=self.store.store_id, ak_public=b"nobody"
        )
        self.desk = LedgerDesk(self.ledger, self.heads, self.checkpoints, self.loop, self._record)

    @property
    def bundle(self) -> TrustBundle:
        return TrustBundle(frozenset({"x"}), channel_cas=(b"x",), ledger=(str(self.checkpoints.key()),))

    def fill(self, upto: int, *, sign: bool = True) -> None:
        while self.ledger.size < upto:
            seq = self.ledger.size
            what = ("released", "denied")[seq % 2]
            self.ledger.append(
                Entry(
                    seq, 1000 + seq, "operation", what, tenant=("red", "blue")[seq % 3 == 0], detail=f"Ω{seq}"
                )
            )
            if seq % 3 == 2:
                self.ledger.sync()
        self.ledger.sync()
        if sign:
            self.sign()

    def sign(self) -> Signed:
        size, root_ = self.ledger.durable, self.ledger.tree.root(self.ledger.durable)
        digest = bytes(32)
        head = Head("hostd-head/1", size, root_, 1, digest, b"attest", b"signature", {"0": digest})
        self.heads.latest = head
        self.checkpoints.save(head)
        return Signed(size, root_)

    def _record(self, event: str, *, principal: str, subject: str, detail: str) -> int:
        seq = self.ledger.size
        self.ledger.append(Entry(seq, 9, event, "done", principal=principal, op=subject, detail=detail))
        self.ledger.sync()
        return seq

    def ask(self, command: adm.LedgerCommand, _result: type = object) -> object:
        said: list[object] = []
        self.desk.answer(command, 'Officer::"uid:0"', said.append)
        while not said:
            self.loop.run_once(1.0)
        return said[0]

    def restart(self) -> None:
        signed = Signed(self.ledger.durable, self.ledger.tree.root(self.ledger.durable))
        self.ledger.close()
        self.ledger = Ledger(self.path, signed, segment_entries=self.segment)
        self.desk = LedgerDesk(self.ledger, self.heads, self.checkpoints, self.loop, self._record)

    def close(self) -> None:
        self.ledger.close()
        self.store.close()
        self.keyring.lock()
        self.loop.close()
