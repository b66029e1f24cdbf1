"""Receipts: with an answer, or later, and a tenant's own part of the ledger (docs/receipts.md).

A receipt is put together from the ledger's lines, the tree and a quoted head; nothing is kept for it.
What all receipts under one head and of one pass share is encoded once. Given later (`redeem`) only to a
caller of the entry's tenant, never of an answer that was withheld or has not been decided yet; everything
else is one and the same `not_found`, after the same work.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final

import msgspec

from guestlib.attest.receipt import FORMAT
from guestlib.errors import NotFoundError, RefusedDriftError, UnavailableError
from hostd.core.entry import ArchivedError, Entry, LedgerError
from hostd.core.proofs import Proofs
from hostd.ipc import operations as ops

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hostd.core.callers import Caller
    from hostd.vault.allowance import Allowance
    from hostd.vault.gate import Gate
    from hostd.vault.heads import Head, Heads
    from hostd.vault.keyring import Keyring
    from hostd.vault.ledger import Ledger
    from hostd.vault.membership import Membership

RECEIPT_COST: Final = 5
AUDIT_COST: Final = 40
"""Units of `Allowance`, some 50 us. A receipt from anywhere in a large ledger: two tiles and two lines,
250 to 500 us. (Beside the answer it is 60 us: neighbours share the work.) A page reads up to `SCAN` lines and
makes up to 64 proofs: 2 ms."""
SCAN: Final = 1024
"""Ledger lines looked at for one page."""
MAX_AHEAD: Final = 64
"""Lines read at once while one receipt after the other of a batch is made."""
PAGE_BYTES: Final = 96 << 10
"""Of lines and proofs in one page, but for the last: what base64 and JSON make of it fits a frame."""

_ENCODE: Final = msgspec.json.Encoder(order="sorted").encode
_DECODE: Final = msgspec.json.Decoder(Entry).decode
_NONE: Final = "no such receipt"


def _lines(ledger: Ledger, seq: int, count: int) -> list[bytes]:
    """Lines from `seq` on, one at least.

    Raises:
        LedgerError: the file does not read, or is not what was recorded.
        ArchivedError: they are not there any more.
    """
    lines = ledger.stretch(seq, count)
    if not lines:
        raise LedgerError(f"{ledger.path}: entry {seq} is missing")
    return lines


class _Sheet:
    """What receipts under one head have in common, made once: a batch's are made one after the other."""

    def __init__(self, ledger: Ledger, head: Head) -> None:
        self.head = head
        self._ledger = ledger
        self._proofs = Proofs(ledger.tree.node, head.size)
        self._lines: dict[int, bytes] = {}
        self._ahead = 1
        self._pass: tuple[int, msgspec.Raw] | None = None
        self.encoded = msgspec.Raw(
            _ENCODE(
                {
                    "attest": head.attest,
                    "evidence": head.evidence_digest,
                    "pass": head.passed,
                    "pcrs": head.pcrs,
                    "root": head.root,
                    "signature": head.signature,
                    "size": head.size,
                }
            )
        )

    def line(self, seq: int) -> bytes:
        """A line under the head, and each time more of those that follow it. Raises: as `_lines`."""
        found = self._lines.get(seq)
        if found is None:
            lines = _lines(self._ledger, seq, min(self._ahead, self.head.size - seq))
            self._lines = dict(enumerate(lines, seq))
            self._ahead = min(2 * self._ahead, MAX_AHEAD)
            found = lines[0]
        return found

    def inclusion(self, seq: int) -> list[bytes]:
        return self._proofs.inclusion(seq)

    def place(self, seq: int, line: bytes) -> dict[str, Any]:
        return {"index": seq, "line": line.decode(), "proof": self.inclusion(seq)}

    def passed(self, seq: int) -> msgspec.Raw:
        """The place of a `pass` entry. Raises: as `_lines`."""
        if self._pass is None or self._pass[0] != seq:
            line = _lines(self._ledger, seq, 1)[0]
            self._pass = seq, msgspec.Raw(_ENCODE(self.place(seq, line)))
        return self._pass[1]


class Receipts:
    """Makes documents from the ledger."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        heads: Heads,
        keyring: Keyring,
        membership: Membership,
        gate: Gate,
        allowance: Allowance,
        unsettled: Callable[[], Sequence[range]],
    ) -> None:
        self._ledger = ledger
        self._heads = heads
        self._keyring = keyring
        self._membership = membership
        self._gate = gate
        self._allowance = allowance
        self._unsettled = unsettled
        self._last: _Sheet | None = None

    # ── Documents ─────────────────────────────────────────────────────────────────────────────────

    def document(self, seq: int, head: Head) -> bytes:
        """The receipt of an entry of a batch under a head that covers it.

        Raises:
            LedgerError: the file is not what was written.
            UnavailableError: the keys are locked.
        """
        sheet = self._sheet(head)
        line = sheet.line(seq)
        return self._document(_DECODE(line), line, sheet)

    def _sheet(self, head: Head) -> _Sheet:
        if self._last is None or self._last.head is not head:
            self._last = _Sheet(self._ledger, head)
        return self._last

    def _document(self, entry: Entry, line: bytes, sheet: _Sheet) -> bytes:
        return _ENCODE(
            {
                "entry": sheet.place(entry.seq, line),
                "format": FORMAT,
                "head": sheet.encoded,
                "pass": sheet.passed(entry.pass_entry),
                "salt": self._keyring.salt(entry.tenant, entry.seq),
            }
        )

    # ── Asked for later ───────────────────────────────────────────────────────────────────────────

    def redeem(self, caller: Caller, seq: int, now: int) -> ops.ReceiptResult:
        """The receipt of an answer that the caller's tenant got, under the latest quoted head.

        Raises:
            NotFoundError: no such receipt, for whatever reason.
            RefusedDriftError: the caller's own machine or the host has drifted: a salt does not go there.
            UnavailableError: the keys are locked, or the tenant's are.
            OverloadedError: too many of these of late.
        """
        self._allowance.take(caller.principal, RECEIPT_COST, now)
        if self._gate.latched_for(caller) is not None:
            raise RefusedDriftError("a measurement that this caller rests on has drifted")
        tenant = self._tenant(caller)
        self._keyring.check_open(tenant)
        head = self._head()
        # Beyond the end another entry is read, so that it takes the same time as one that is not theirs.
        try:
            line = _lines(self._ledger, min(seq, head.size - 1), 1)[0]
        except ArchivedError:
            raise NotFoundError(_NONE) from None
        entry = _DECODE(line)
        theirs = entry.seq == seq and entry.tenant == tenant and entry.event == "operation"
        undecided = any(seq in entries for entries in self._unsettled())
        if not theirs or not entry.request or undecided or self._withheld(seq):
            raise NotFoundError(_NONE)
        return ops.ReceiptResult(self._document(entry, line, self._sheet(head)))

    def audit(self, caller: Caller, asked: ops.GetAuditLog, now: int) -> ops.AuditLogResult:
        """A page of the entries of the caller's tenant, with proofs to the latest quoted head.

        Raises:
            NotFoundError, UnavailableError, OverloadedError: as `redeem`.
        """
        self._allowance.take(caller.principal, AUDIT_COST, now)
        tenant = self._tenant(caller)
        head, unsettled = self._head(), self._unsettled()
        end = min(head.size, unsettled[0].start) if unsettled else head.size
        sheet = self._sheet(head)
        start = max(self._ledger.first, 0 if asked.after is None else asked.after + 1)
        needle = b'"tenant":' + msgspec.json.encode(tenant)
        entries: list[ops.AuditEntry] = []
        size, last = 0, start - 1
        for last, line in enumerate(self._ledger.stretch(start, min(SCAN, max(0, end - start))), start):
            if needle not in line or _DECODE(line).tenant != tenant:
                continue
            proof = tuple(sheet.inclusion(last))
            entries.append(ops.AuditEntry(last, line.decode(), proof, withheld=self._withheld(last)))
            size += len(line) + 48 * len(proof)
            if len(entries) >= asked.limit or size >= PAGE_BYTES:
                break
        more = last + 1 < end
        return ops.AuditLogResult(bytes(sheet.encoded), tuple(entries), last if more else None)

    def _tenant(self, caller: Caller) -> str:
        tenant = self._membership.tenant_of(caller.principal)
        if tenant is None:
            raise NotFoundError(_NONE)
        return tenant

    def _head(self) -> Head:
        """The latest quoted head."""
        if self._ledger.failed is not None:
            raise UnavailableError("the ledger may not say any more what was withheld")
        head = self._heads.latest
        if head is None or not head.size:
            raise NotFoundError(_NONE)
        return head

    def _withheld(self, seq: int) -> bool:
        runs = self._ledger.withheld
        at = bisect_right(runs, seq, key=lambda run: run[0]) - 1
        return at >= 0 and seq <= runs[at][1]
