"""The officers' commands about the ledger. They work while the gate is closed, and none stops the vault's
loop for long: pages are bounded, and verifying goes in slices between which requests are served.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, get_args

from guestlib.errors import ConflictError, HostdError, NotFoundError, UnavailableError
from hostd.core.entry import ArchivedError
from hostd.ipc import operating as adm

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.ledgercheck import Fault
    from hostd.ipc.loop import Loop
    from hostd.vault.checkpoints import Checkpoints
    from hostd.vault.heads import Heads
    from hostd.vault.ledger import Ledger

    Answer = Callable[[object], None]

SLICE_S: Final = 0.005
"""Of the loop's time, before others get their turn."""
PAUSE_S: Final = 0.001
SWEEP_PAUSE_S: Final = 0.1
"""Between slices of what nobody waits for."""
BLOCK: Final = 256


class LedgerDesk:
    """Answers `operating.LedgerCommand`."""

    def __init__(
        self,
        ledger: Ledger,
        heads: Heads,
        checkpoints: Checkpoints,
        loop: Loop,
        record: Callable[..., int],
    ) -> None:
        self._ledger = ledger
        self._heads = heads
        self._checkpoints = checkpoints
        self._loop = loop
        self._record = record

    COMMANDS: Final = get_args(adm.LedgerCommand)

    def answer(self, command: adm.LedgerCommand, officer: str, answer: Answer) -> None:
        """Answers now or later. Raises: HostdError, the refusal."""
        match command:
            case adm.ListLedger():
                answer(self._page(command))
            case adm.VerifyLedger():
                self._verify(answer)
            case adm.ProveLedger():
                answer(self._proof(command.index))
            case adm.LedgerConsistency():
                answer(self._consistency(command))
            case adm.LedgerCheckpoint():
                note = self._checkpoints.note(self._heads.latest)
                answer(adm.Checkpoint(note, str(self._checkpoints.key())))
            case adm.ListSegments():
                starts = tuple(segment.first for segment in self._ledger.closed)
                answer(adm.SegmentList(starts, self._ledger.open_first))
            case adm.DropSegments():
                self._drop(command, officer)
                answer(adm.Nothing())

    def _page(self, command: adm.ListLedger) -> adm.LedgerPage:
        ledger = self._ledger
        start = command.start
        if command.order == "last":
            start = max(ledger.first, ledger.durable - command.count)
        lines: list[bytes] = []
        size = 0
        while len(lines) < command.count and size < adm.MAX_PAGE_BYTES:
            some = ledger.stretch(start + len(lines), min(BLOCK, command.count - len(lines)))
            if not some:
                break
            lines += some
            size += sum(map(len, some))
        root = ledger.tree.root(ledger.durable)
        return adm.LedgerPage(start, tuple(lines), ledger.first, ledger.durable, root.hex())

    def _verify(self, answer: Answer) -> None:
        def told(problem: str) -> None:
            size, root = self._ledger.durable, self._ledger.tree.root(self._ledger.durable)
            answer(adm.LedgerVerified(self._ledger.first, size, root.hex(), problem))

        self._audit(told, PAUSE_S)

    def sweep(self, shut: Callable[[str], None]) -> None:
        """Once after the start, beside the work: the segments that opening did not read. `shut` is told why
        the gate has to close, if it has to."""

        def told(problem: str) -> None:
            if problem:
                shut(f"the ledger is not what was recorded: {problem}")

        self._audit(told, SWEEP_PAUSE_S)

    def _audit(self, told: Callable[[str], None], pause_s: float) -> None:
        """Every line against what was recorded, in slices; `told` of the first that differs, or nothing."""
        check = self._ledger.audit()

        def slice_() -> None:
            nonlocal check
            end = time.monotonic() + SLICE_S
            try:
                next(check)
                while time.monotonic() < end:
                    next(check)
            except StopIteration as done:
                fault: Fault | None = done.value
                told("" if fault is None else f"{self._ledger.place(fault.at)}: {fault.what}")
            except ArchivedError:
                # What was being compared has gone meanwhile, as an officer wished: from what is left, then.
                check = self._ledger.audit()
                self._loop.call_after(pause_s, slice_)
            except HostdError as error:
                told(error.message)
            else:
                self._loop.call_after(pause_s, slice_)

        slice_()

    def _proof(self, index: int) -> adm.LedgerProof:
        head = self._heads.latest
        note = self._checkpoints.note(head)
        assert head is not None
        if index >= self._ledger.durable:
            raise NotFoundError(f"there is no entry {index}")
        if index >= head.size:
            raise UnavailableError(f"entry {index} is not under a signed head yet: the next batch does it")
        (line,) = self._ledger.stretch(index, 1)
        proof = tuple(self._ledger.tree.inclusion(index, head.size))
        return adm.LedgerProof(index, line, head.size, head.root, proof, note)

    def _consistency(self, command: adm.LedgerConsistency) -> adm.ConsistencyProof:
        tree, old = self._ledger.tree, command.old
        new = command.new or self._ledger.durable
        if not 0 < old <= new <= self._ledger.durable:
            raise NotFoundError(
                f"no two sizes of this ledger: {old} and {new}; it has {self._ledger.durable} entries"
            )
        proof = tuple(tree.consistency(old, new))
        return adm.ConsistencyProof(old, tree.root(old), new, tree.root(new), proof)

    def _drop(self, command: adm.DropSegments, officer: str) -> None:
        """The officer shows that he has them: by the root of all entries before `end`."""
        ledger = self._ledger
        ends = [segment.first for segment in ledger.closed[1:]] + [ledger.open_first]
        if command.end not in ends or not ledger.closed:
            raise ConflictError(f"no closed segment ends before entry {command.end}")
        if ledger.tree.root(command.end) != command.root:
            raise ConflictError(f"the archive is not of this ledger's first {command.end} entries")
        still = sorted(seq for seq in ledger.drifting if seq < command.end)
        if still:
            raise ConflictError(f"entry {still[0]} is of a drift that is not cleared: it stays")
        self._record(
            "archive", principal=officer, subject=str(command.end), detail=f"root {command.root.hex()}"
        )
        ledger.drop(command.end)
