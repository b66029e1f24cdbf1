"""Which batch is signed, which is read, and when the quote follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from guestlib.attest.binding import pass_qualifying
from hostd.config import Gate
from hostd.core.findings import BOOT, Component
from hostd.platform.tpm_errors import TpmError
from hostd.vault.attesting import OVERDUE, Attesting, Signing
from hostd.vault.tpmlink import PcrsRead, Quoted

if TYPE_CHECKING:
    from collections.abc import Callable

GOOD, CHANGED = {0: bytes(32)}, {0: b"\xff" * 32}
EVERY_S = 10.0


class SimulatedTpm:
    """Keeps what it is asked until the test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, Callable[[Any], None]]] = []

    def quote(self, qualifying: bytes, told: Callable[[Any], None], *, priority: object = None) -> None:
        self.asked.append(("quote", qualifying, told))

    def check(self, told: Callable[[Any], None]) -> None:
        self.asked.append(("check", b"", told))

    def settle(self, done: Callable[[], bool]) -> None:
        while not done():
            _kind, _qualifying, told = self.asked.pop()
            told(Quoted(cast("Any", object()), GOOD))

    def differing(self, pcrs: dict[int, bytes]) -> list[tuple[int, bytes, bytes]]:
        return [(0, GOOD[0], pcrs[0])] if pcrs != GOOD else []

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.asked]


class SimulatedLedger:
    def __init__(self) -> None:
        self.size = self.durable = 0


class Bench:
    def __init__(self, settings: Gate) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.tpm, self.ledger = SimulatedTpm(), SimulatedLedger()
        self.noted: list[int] = []
        self.found: list[Component] = []
        self.told: list[str] = []
        self.attesting = Attesting(
            cast("Any", self.tpm),
            cast("Any", self),
            cast("Any", self),
            cast("Any", self.ledger),
            settings,
            found=lambda component, _findings: self.found.append(component),
            shut=lambda why: self.told.append(f"shut: {why}"),
            now=lambda: self.now,
        )

    def call_after(self, seconds: float, call: Callable[[], None]) -> None:
        self.timers.append((self.now + seconds, call))

    def note(self, *, size: int, root: bytes, quoted: object, **_: object) -> None:
        assert isinstance(quoted, Quoted)
        assert root == size.to_bytes(32)
        self.noted.append(size)

    def batch(self, *, unwritten: int = 0) -> Signing:
        """The next batch: an entry, the TPM is asked for it, and it is written."""
        self.ledger.size += 1
        signing = Signing(self.ledger.size, bytes(32), self.ledger.size, self.ledger.size.to_bytes(32))
        self.attesting.attest(signing, lambda result: self.told.append(type(result).__name__))
        self.ledger.durable = self.ledger.size - unwritten
        return signing

    def answer(self, pcrs: dict[int, bytes] | None = None, *, error: bool = False) -> str:
        """The TPM answers the oldest question."""
        kind, _, told = self.tpm.asked.pop(0)
        values = GOOD if pcrs is None else pcrs
        if error:
            told(TpmError("no"))
        elif kind == "quote":
            told(Quoted(cast("Any", object()), values))
        else:
            told(PcrsRead(values))
        return kind

    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = [call for when, call in self.timers if when <= self.now]
        self.timers = [(when, call) for when, call in self.timers if when > self.now]
        for call in due:
            call()


@pytest.fixture
def quoting() -> Bench:
    return Bench(Gate())


@pytest.fixture
def reading() -> Bench:
    return Bench(Gate(tpm="read", quote_every_s=EVERY_S))


def test_every_batch_has_its_quote(quoting: Bench) -> None:
    for number in range(3):
        signing = quoting.batch()
        ((kind, qualifying, _),) = quoting.tpm.asked
        assert kind == "quote"
        assert qualifying == pass_qualifying(signing.passed, signing.digest, signing.size, signing.root)
        quoting.answer()
        assert quoting.told == ["Quoted"] * (number + 1)
    assert quoting.timers == []


def test_every_batch_is_read_and_one_quote_follows_for_all(reading: Bench) -> None:
    for _ in range(3):
        last = reading.batch()
        assert reading.answer() == "check"
        reading.wait(1.0)
    assert reading.told == ["PcrsRead"] * 3
    assert reading.noted == []
    reading.wait(EVERY_S)
    ((kind, qualifying, _),) = reading.tpm.asked
    assert (kind, qualifying) == ("quote", last.qualifying)
    reading.answer()
    assert reading.noted == [3]
    reading.wait(10 * EVERY_S)
    assert reading.tpm.asked == [], "nothing is signed twice"
    reading.batch()
    assert reading.answer() == "check"
    reading.wait(EVERY_S)
    reading.answer()
    assert reading.noted == [3, 4]


def test_what_comes_while_a_quote_is_made_has_the_next(reading: Bench) -> None:
    reading.batch()
    reading.answer()
    reading.wait(EVERY_S)
    reading.batch()
    assert reading.tpm.kinds == ["quote", "check"]
    reading.answer()
    reading.answer()
    assert reading.noted == [1]
    reading.wait(EVERY_S)
    assert reading.answer() == "quote"
    assert reading.noted == [1, 2]


def test_an_orderly_end_makes_the_quote_that_would_have_followed(reading: Bench, quoting: Bench) -> None:
    for _ in range(2):
        reading.batch()
        reading.answer()
    reading.attesting.finish()
    assert reading.noted == [2]
    reading.attesting.finish()
    assert reading.tpm.asked == []
    reading.batch(unwritten=1)
    reading.answer()
    reading.attesting.finish()
    assert reading.noted == [2]
    quoting.batch()
    quoting.answer()
    quoting.attesting.finish()
    assert quoting.tpm.asked == []


def test_a_tpm_that_no_longer_signs(reading: Bench) -> None:
    """Batches are answered for a while, and then only with quotes of their own."""
    reading.batch()
    reading.answer()
    reading.wait(EVERY_S)
    assert reading.answer(error=True) == "quote"
    reading.batch()
    assert reading.answer() == "check"
    reading.wait((OVERDUE - 1) * EVERY_S)
    assert reading.answer(error=True) == "quote"
    for _ in range(2):
        reading.batch()
        assert reading.answer(error=True) == "quote"
    assert reading.told[-2:] == ["TpmError"] * 2
    reading.batch()
    assert reading.answer() == "quote"
    assert reading.told[-1] == "Quoted"
    reading.batch()
    assert reading.answer() == "check"


def test_a_quote_that_was_overtaken_takes_no_head_back(reading: Bench) -> None:
    """It waits behind others' evidence, and meanwhile a batch is signed itself."""
    reading.batch()
    reading.answer()
    reading.wait(EVERY_S)
    late = reading.tpm.asked.pop(0)
    reading.wait(EVERY_S)
    reading.batch()
    assert reading.answer() == "quote"
    assert reading.told[-1] == "Quoted"
    assert reading.noted == [2]
    reading.tpm.asked.append(late)
    assert reading.answer(CHANGED) == "quote"
    assert reading.noted == [2]
    assert reading.found == [BOOT], "what it says of the PCRs counts"
    reading.batch()
    assert reading.answer() == "check"
    reading.wait(EVERY_S)
    reading.answer()
    assert reading.noted == [2, 3]


def test_a_quote_counts_though_its_batch_was_abandoned(reading: Bench) -> None:
    """Overdue: the batch is signed itself, and with it all before it."""
    reading.batch()
    reading.answer()
    reading.wait(OVERDUE * EVERY_S)
    del reading.tpm.asked[:]  # the quote that should have followed hangs
    signing = reading.batch()
    assert reading.answer() == "quote"
    assert reading.noted == [signing.size], "whoever asked for the batch has nothing to note any more"
    reading.wait(EVERY_S)
    assert reading.tpm.asked == []


def test_an_overdue_quote_of_what_was_cut_off_again_is_no_head(reading: Bench) -> None:
    reading.batch()
    reading.answer()
    reading.wait(OVERDUE * EVERY_S)
    del reading.tpm.asked[:]
    reading.batch(unwritten=1)
    assert reading.answer() == "quote"
    assert reading.noted == []


def test_entries_that_were_cut_off_again_are_not_signed(reading: Bench) -> None:
    """The next vault would miss them."""
    reading.batch(unwritten=1)
    reading.answer()
    reading.wait(EVERY_S)
    assert reading.tpm.asked == []


def test_a_pcr_that_changed_is_found_by_the_quote_that_follows(reading: Bench) -> None:
    reading.batch()
    reading.answer()
    reading.wait(EVERY_S)
    reading.answer(CHANGED)
    assert reading.found == [BOOT]
