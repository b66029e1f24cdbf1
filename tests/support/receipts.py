"""A vault in small that gives receipts: its ledger, store and keys on the disk, and a real embedded TPM.

What the gate and the measurer do is left out: batches are recorded as if their readings had been good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from guestlib.attest.binding import pass_qualifying
from guestlib.attest.bundle import TrustBundle
from guestlib.errors import HostdError
from hostd.core.callers import Caller
from hostd.core.findings import BOOT, IMA, Status
from hostd.ipc import operations as ops
from hostd.ipc.canonical import answer_bytes, request_bytes
from hostd.platform import swtpm
from hostd.platform.tpm import Tpm, open_tpm
from hostd.platform.tpm_provision import provision
from hostd.platform.tpm_tcti import SocketLink
from hostd.vault.allowance import Allowance
from hostd.vault.done import Done
from hostd.vault.heads import Head, Heads
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Ledger
from hostd.vault.membership import Membership
from hostd.vault.receipts import Receipts
from hostd.vault.recording import Executed, Job, Recorder
from hostd.vault.store import Store
from hostd.vault.tpmlink import Quoted
from hostd.vault.waiting import Pass, Stamp, Waiting
from tests.platform.support_tpm import NOW
from tests.vault.support_gate import make_gate
from tests.vault.support_keys import root, tenant_with_user

PCRS = (0, 7, 10)
RED, BLUE, NOBODY = Caller(uid=1), Caller(uid=2), Caller(uid=3)
TENANTS = {RED: "red", BLUE: "blue"}
WALL = 1_767_225_600_000
NONE = cast("Any", None)
ENCRYPT = ops.Encrypt("alias/db", b"card number", {"table": "users"})
SEALED = ops.EncryptResult(b"HDC1 sealed", "key-" + 32 * "7", 1)


@dataclass(frozen=True)
class Exchange:
    """A request and its answer, as their parties have them."""

    caller: Caller = RED
    operation: ops.GatedOperation = ENCRYPT
    result: Any = SEALED
    error: HostdError | None = None

    @property
    def request(self) -> bytes:
        return request_bytes(self.operation)

    @property
    def answer(self) -> bytes:
        return answer_bytes(self.result)


class House:
    """Records batches and has their heads quoted."""

    def __init__(self, directory: Path, tpm: Tpm) -> None:
        self.tpm = tpm
        self.store = Store(directory / "store.sqlite", create=True)
        tenant_with_user(self.store, "red", 1)
        tenant_with_user(self.store, "blue", 2)
        self.store.commit()
        self.keyring = Keyring(self.store)
        self.keyring.unlock(root())
        membership = Membership(self.store, self.keyring)
        self.ledger = Ledger(directory / "ledger.jsonl")
        self.heads = Heads(directory / "head.json")
        self.recorder = Recorder(self.ledger, self.keyring, membership)
        self.gate = make_gate()
        self.unsettled: tuple[range, ...] = ()
        self.passes = 0
        self.clock = 0
        """Nanoseconds, for who asks for receipts."""
        self.receipts = Receipts(
            ledger=self.ledger,
            heads=self.heads,
            keyring=self.keyring,
            membership=membership,
            gate=self.gate,
            allowance=Allowance(),
            unsettled=lambda: self.unsettled,
        )

    def close(self) -> None:
        self.ledger.close()
        self.keyring.lock()
        self.store.close()

    def record(self, *exchanges: Exchange) -> list[Executed]:
        """A batch, durable and not quoted."""
        self.passes += 1
        at = self.passes * 1_000_000
        stamps = ((BOOT, Stamp(2 * self.passes, at, at + 9, Status.VERIFIED)),)
        stamps += ((IMA, Stamp(2 * self.passes + 1, at + 5, at + 50, Status.VERIFIED)),)
        batch = [_executed(one) for one in exchanges]
        self.recorder.record(Pass(self.passes, at, at + 50, stamps), self.evidence, batch, WALL + self.passes)
        self.ledger.sync()
        return batch

    @property
    def evidence(self) -> bytes:
        """Of the last pass."""
        return self.passes.to_bytes(32, "big")

    def quote(self) -> Head:
        """The TPM signs the ledger as it is."""
        size, tree_root = self.ledger.size, self.ledger.tree.root()
        qualifying = pass_qualifying(self.passes, self.evidence, size, tree_root)
        quoted = Quoted(*self.tpm.quote_with_pcrs(qualifying, PCRS))
        return self.heads.note(
            size=size, root=tree_root, passed=self.passes, evidence_digest=self.evidence, quoted=quoted
        )

    def batch(self, *exchanges: Exchange) -> list[int]:
        """A batch with its quote; the entries."""
        executed = self.record(*exchanges)
        self.quote()
        return [one.seq for one in executed]

    def document(self, seq: int) -> bytes:
        """Under the latest head."""
        assert self.heads.latest is not None
        return self.receipts.document(seq, self.heads.latest)

    def bundle(self) -> TrustBundle:
        """What this host satisfies."""
        pcrs = tuple((i, frozenset({v})) for i, v in sorted(self.tpm.read_pcrs((0, 7)).items()))
        return TrustBundle(require=frozenset({"ima"}), aks=(self.tpm.record.ak_public,), pcrs=pcrs)


def _executed(one: Exchange) -> Executed:
    name = type(one.operation).__name__
    job = Job(name, mutates=False, shreds=False, run=NONE, answer=NONE, refuse=NONE, operation=one.operation)
    done = None
    if one.error is None:
        key, version = getattr(one.result, "key", ""), getattr(one.result, "version", 0)
        done = Done(one.result, TENANTS[one.caller], key, version)
    return Executed(Waiting(one.caller, 0, 1, job), done, one.error)


@contextmanager
def embedded_tpm(directory: Path) -> Iterator[Tpm]:
    """A swtpm of its own, provisioned."""
    swtpm.manufacture(directory / "tpm", now=NOW)
    process = swtpm.start(directory / "tpm", directory / "tpm.sock")
    connect = partial(SocketLink, process.socket)
    try:
        tpm = open_tpm(connect, provision(connect, command_s=20.0), command_s=20.0)
        try:
            yield tpm
        finally:
            tpm.close()
    finally:
        process.stop()


def exchanges(count: int, caller: Caller = RED) -> list[Exchange]:
    """Requests that differ."""
    return [
        Exchange(caller, ops.GenerateRandom(16 + i), ops.RandomResult(bytes([i]) * (16 + i)))
        for i in range(count)
    ]
