"""Receipts asked for later and the audit log: for whom, of what, and how often."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from guestlib.attest.audit import AuditedEntry, verify_page
from guestlib.attest.receipt import verify_receipt
from guestlib.errors import (
    DeniedError,
    HostdError,
    NotFoundError,
    OverloadedError,
    RefusedDriftError,
    UnavailableError,
)
from guestlib.wire.messages import AuditLine
from hostd.core.callers import Caller
from hostd.core.findings import KERNEL
from hostd.gateway.requests import encode_answer
from hostd.ipc import operations as ops
from hostd.platform.tpm import Tpm
from hostd.vault import allowance, receipts
from hostd.vault.allowance import Allowance
from hostd.vault.ledger import Entry, LedgerError
from tests.support.receipts import BLUE, NOBODY, RED, Exchange, House, embedded_tpm, exchanges
from tests.vault.support_gate import finding

SECOND = 10**9


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tpm]:
    with embedded_tpm(tmp_path_factory.mktemp("tpm")) as tpm:
        yield tpm


@pytest.fixture
def house(tpm: Tpm, tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, tpm)
    yield made
    made.close()


def redeem(house: House, caller: Caller, seq: int, now: int = 0) -> bytes:
    return house.receipts.redeem(caller, seq, now).receipt


def audit(house: House, caller: Caller, after: int | None = None, limit: int = 64) -> ops.AuditLogResult:
    # Each page a minute later: how often is another test.
    house.clock += 60 * SECOND
    return house.receipts.audit(caller, ops.GetAuditLog(after, limit), house.clock)


def verified(house: House, page: ops.AuditLogResult) -> tuple[AuditedEntry, ...]:
    lines = tuple(AuditLine(e.index, e.line, e.proof, e.withheld) for e in page.entries)
    return verify_page(page.head, lines, bundle=house.bundle())[1]


def refusal(house: House, caller: Caller, seq: int) -> HostdError:
    with pytest.raises(HostdError) as caught:
        redeem(house, caller, seq)
    return caught.value


# ── GetReceipt ────────────────────────────────────────────────────────────────────────────────────


def test_a_receipt_is_redeemed_under_the_latest_head(house: House) -> None:
    exchange = Exchange()
    at, *_ = house.batch(exchange, Exchange(BLUE))
    first = redeem(house, RED, at)
    house.batch(*exchanges(3))
    second = redeem(house, RED, at)
    for document, own in ((first, True), (second, False)):
        found = verify_receipt(
            document, bundle=house.bundle(), request=exchange.request, answer=exchange.answer
        )
        assert (found.entry.seq, found.own_quote) == (at, own)


def test_a_refusal_is_redeemed_too(house: House) -> None:
    asked = Exchange(error=DeniedError("no"))
    (at,) = house.batch(asked)
    found = verify_receipt(redeem(house, RED, at), bundle=house.bundle(), request=asked.request, answer=None)
    assert found.entry.outcome == "denied"


def test_no_receipt_where_it_could_not_be_said_that_the_answer_was_withheld(house: House) -> None:
    """The disk fails between a batch and the entry that would have withheld it."""
    (decided,) = house.batch(Exchange())
    held = house.record(Exchange())
    house.quote()
    os.close(house.ledger._fd)
    house.ledger._fd = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(LedgerError):
        house.recorder.withheld(held, house.passes, "why")
    for seq in (held[0].seq, decided):
        assert isinstance(refusal(house, RED, seq), UnavailableError)
    with pytest.raises(UnavailableError):
        audit(house, RED)


def test_what_is_not_the_callers_is_as_what_never_was(house: House) -> None:
    ledger = house.ledger
    ledger.append(Entry(seq=0, time=1, event="start", outcome="done"))
    theirs, mine, officers = house.batch(Exchange(BLUE), Exchange(), Exchange(RED))
    ledger.append(
        Entry(seq=ledger.size, time=1, event="operation", outcome="released", tenant="red", op="CreateTenant")
    )
    ledger.sync()
    (later,) = house.batch(Exchange(BLUE))
    withheld = house.record(Exchange())[0].seq
    house.recorder.withheld(house.record(Exchange()), house.passes, "why")
    house.quote()
    never = [
        0,  # hostd's own
        1,  # a pass
        theirs,
        officers + 1,  # an officer's deed on the tenant: nothing is committed to
        later,
        ledger.size - 2,  # withheld
        ledger.size - 1,  # the withheld entry itself
        ledger.size,
        ledger.size + 10**6,
        2**53 - 1,
    ]
    assert redeem(house, RED, mine)
    assert redeem(house, RED, withheld)
    refused = [refusal(house, RED, seq) for seq in never] + [refusal(house, NOBODY, mine)]
    assert {(type(e), e.message, e.ledger) for e in refused} == {(NotFoundError, "no such receipt", None)}
    assert redeem(house, BLUE, theirs)


def test_the_same_is_read_whether_it_is_theirs_or_not_there(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time tells nothing: one line is read and decoded, whatever is asked for."""
    (theirs,) = house.batch(Exchange(BLUE))
    read: list[int] = []
    stretch = house.ledger.stretch

    def counted(start: int, count: int) -> list[bytes]:
        read.append(count)
        return stretch(start, count)

    monkeypatch.setattr(house.ledger, "stretch", counted)
    for seq in (theirs, 0, 10**9):
        read.clear()
        refusal(house, RED, seq)
        assert read == [1]


def test_a_withheld_answer_has_no_receipt_after_a_restart_either(house: House, tpm: Tpm) -> None:
    (kept,) = house.batch(Exchange())
    batch = house.record(Exchange(), Exchange(), Exchange())
    house.recorder.withheld([batch[0], batch[2]], house.passes, "why")
    house.quote()

    def outcomes() -> list[bool]:
        found = []
        for one in batch:
            try:
                redeem(house, RED, one.seq)
                found.append(True)
            except NotFoundError:
                found.append(False)
        return found

    assert outcomes() == [False, True, False]
    again = type(house.ledger)(house.ledger.path)
    house.receipts._ledger = again
    assert outcomes() == [False, True, False]
    assert redeem(house, RED, kept)
    again.close()


def test_a_batch_that_is_withheld_before_an_earlier_one_has_no_receipts(house: House) -> None:
    """Of two under way the later may be withheld first."""
    first, second = house.record(Exchange()), house.record(Exchange(), Exchange())
    (after,) = house.batch(Exchange())
    house.recorder.withheld(second, 2, "why")
    house.recorder.withheld(first, 1, "why")
    house.quote()
    held = [one.seq for one in (*first, *second)]
    for ledger in (house.ledger, type(house.ledger)(house.ledger.path)):
        house.receipts._ledger = ledger
        for seq in held:
            assert isinstance(refusal(house, RED, seq), NotFoundError)
        assert redeem(house, RED, after)
        told = {e.index: e.withheld for e in audit(house, RED).entries}
        assert told == {seq: seq != after for seq in (*held, after)}


def test_a_batch_under_way_has_no_receipts_yet(house: House) -> None:
    """It was quoted, and its second look may still withhold it."""
    (before,) = house.batch(Exchange())
    (at,) = house.batch(Exchange())
    house.unsettled = (range(at - 1, at + 1),)
    assert isinstance(refusal(house, RED, at), NotFoundError)
    assert redeem(house, RED, before)
    assert [e.index for e in audit(house, RED).entries] == [before]
    house.unsettled = ()
    assert redeem(house, RED, at)


def test_an_answer_has_its_receipt_though_an_earlier_batch_is_under_way(house: House) -> None:
    """The audit log ends before that batch: a page says of each entry whether it was withheld."""
    (first,) = house.batch(Exchange())
    (second,) = house.batch(Exchange())
    (third,) = house.batch(Exchange())
    house.unsettled = (range(first - 1, first + 1), range(third - 1, third + 1))
    assert redeem(house, RED, second)
    for seq in (first, third):
        assert isinstance(refusal(house, RED, seq), NotFoundError)
    assert audit(house, RED).entries == ()
    house.unsettled = house.unsettled[1:]
    assert redeem(house, RED, first)
    assert [e.index for e in audit(house, RED).entries] == [first, second]


def test_what_no_quote_covers_has_no_receipt_yet(house: House) -> None:
    house.batch(Exchange())
    (one,) = house.record(Exchange())
    assert isinstance(refusal(house, RED, one.seq), NotFoundError)
    house.quote()
    assert redeem(house, RED, one.seq)


def test_before_the_first_batch_there_is_none(house: House) -> None:
    assert isinstance(refusal(house, RED, 0), NotFoundError)
    house.quote()  # as set-up does
    assert isinstance(refusal(house, RED, 0), NotFoundError)
    house.batch(Exchange())
    house.unsettled = (range(2),)
    assert isinstance(refusal(house, RED, 1), NotFoundError)
    assert audit(house, RED).entries == ()


def test_a_head_beyond_what_is_on_the_disk_gives_no_receipt(house: House) -> None:
    """It was quoted while the disk failed."""
    (at,) = house.batch(Exchange())
    assert house.heads.latest is not None
    house.heads.latest = msgspec.structs.replace(house.heads.latest, size=at + 9)
    assert isinstance(refusal(house, RED, at + 4), UnavailableError)


def test_a_salt_goes_to_no_caller_whose_host_has_drifted(house: House) -> None:
    (at,) = house.batch(Exchange())
    house.gate.latch(KERNEL, (finding(KERNEL),))
    assert isinstance(refusal(house, RED, at), RefusedDriftError)
    assert audit(house, RED).entries  # no salt in it


def test_locked_keys_give_no_receipt(house: House) -> None:
    (at,) = house.batch(Exchange())
    house.keyring.lock()
    assert isinstance(refusal(house, RED, at), UnavailableError)
    with pytest.raises(UnavailableError):
        audit(house, RED)


def test_a_tenant_whose_keys_are_locked_gets_no_salt_and_is_recorded_all_the_same(house: House) -> None:
    mine, theirs = house.batch(Exchange(), Exchange(BLUE))
    house.keyring.lock_tenants(frozenset({"red"}))
    assert isinstance(refusal(house, RED, mine), UnavailableError)
    assert redeem(house, BLUE, theirs)
    during = Exchange(operation=ops.GenerateRandom(8), result=ops.RandomResult(bytes(8)))
    (at,) = house.batch(during)
    house.keyring.lock_tenants(frozenset())
    document = redeem(house, RED, at)
    verify_receipt(document, bundle=house.bundle(), request=during.request, answer=during.answer)


def test_a_line_that_was_edited_has_no_receipt(house: House) -> None:
    (at,) = house.batch(Exchange())
    path = house.ledger.path
    data = path.read_bytes()
    assert data.count(b'"released"') == 1
    path.write_bytes(data.replace(b'"released"', b'"deleased"'))
    assert isinstance(refusal(house, RED, at), UnavailableError)
    with pytest.raises(UnavailableError):
        audit(house, RED)


# ── How often ─────────────────────────────────────────────────────────────────────────────────────


def test_a_flood_of_one_caller_is_bounded_and_nobody_elses(house: House) -> None:
    mine, theirs = house.batch(Exchange(), Exchange(BLUE))
    given = 0
    for _ in range(3 * allowance.BURST):
        try:
            redeem(house, RED, mine, now=SECOND)
            given += 1
        except OverloadedError:
            continue
    assert given == allowance.BURST // receipts.RECEIPT_COST
    assert redeem(house, BLUE, theirs, now=SECOND)
    # A second later there is as much as a second brings.
    for _ in range(allowance.PER_SECOND // receipts.RECEIPT_COST):
        redeem(house, RED, mine, now=2 * SECOND)
    with pytest.raises(OverloadedError):
        redeem(house, RED, mine, now=2 * SECOND)


def test_a_guess_costs_as_much_as_a_receipt(house: House) -> None:
    house.batch(Exchange(BLUE))
    for number in range(allowance.BURST // receipts.RECEIPT_COST):
        with pytest.raises(NotFoundError):
            redeem(house, RED, number)
    with pytest.raises(OverloadedError):
        redeem(house, RED, 1)


def test_a_page_of_the_audit_log_costs_more(house: House) -> None:
    house.batch(Exchange())
    for _ in range(allowance.BURST // receipts.AUDIT_COST):
        house.receipts.audit(RED, ops.GetAuditLog(), 0)
    with pytest.raises(OverloadedError):
        house.receipts.audit(RED, ops.GetAuditLog(), 0)


def test_all_callers_together_have_a_tenth_of_the_vault(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: hashes of tiles, and lines, that questions from all over the ledger have read."""
    seqs = [one.seq for _ in range(6) for one in house.record(*exchanges(200))]
    house.batch(Exchange())
    work = [0]
    read, stretch = house.ledger.tree._read, house.ledger.stretch

    def counted(level: int, first: int, count: int) -> list[bytes]:
        work[0] += count
        return read(level, first, count)

    def counted_lines(start: int, count: int) -> list[bytes]:
        found = stretch(start, count)
        work[0] += len(found)
        return found

    monkeypatch.setattr(house.ledger.tree, "_read", counted)
    monkeypatch.setattr(house.ledger, "stretch", counted_lines)

    def dearest(ask: Callable[[int], object]) -> int:
        """Of one question, where nothing is in memory that others left."""
        found = []
        for seq in seqs[:: len(seqs) // 50]:
            house.ledger.tree._tiles.clear()
            house.receipts._last = None
            work[0] = 0
            ask(seq)
            found.append(work[0])
        return max(found)

    def page(seq: int) -> object:
        return audit(house, RED, seq)

    def receipt(seq: int) -> object:
        house.clock += 60 * SECOND
        return redeem(house, RED, seq, house.clock)

    # At 0.4 us for each hash: 2,000 units are at most a tenth of a second.
    for ask, cost in ((receipt, receipts.RECEIPT_COST), (page, receipts.AUDIT_COST)):
        assert dearest(ask) * allowance.ALL_PER_SECOND / cost * 0.4e-6 < 0.15


def test_all_callers_together_are_bounded() -> None:
    bounded = Allowance()
    given = 0
    for caller in range(100):
        for _ in range(allowance.BURST):
            try:
                bounded.take(str(caller), 1, 0)
                given += 1
            except OverloadedError:
                break
    assert given == allowance.ALL_BURST


def test_as_many_callers_are_remembered_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "MAX_CALLERS", 3)
    bounded = Allowance()
    for caller in "abc":
        bounded.take(caller, allowance.PER_SECOND, 0)
    with pytest.raises(OverloadedError):
        bounded.take("d", 1, 0)
    # Once they have rested they are forgotten, which changes nothing for them.
    bounded.take("d", 1, 2 * SECOND)
    assert set(bounded._callers) == {"d"}


def test_a_clock_that_stands_gives_nothing() -> None:
    bounded = Allowance()
    bounded.take("a", allowance.BURST, 5)
    for now in (5, 4, 0):
        with pytest.raises(OverloadedError):
            bounded.take("a", 1, now)


# ── GetAuditLog ───────────────────────────────────────────────────────────────────────────────────


def test_a_tenant_sees_its_own_entries_and_no_others(house: House) -> None:
    red, blue = [], []
    for _ in range(5):
        entries = house.batch(Exchange(), Exchange(BLUE), *exchanges(2), Exchange(error=DeniedError("no")))
        red += [seq for i, seq in enumerate(entries) if i != 1]
        blue.append(entries[1])
    for caller, own in ((RED, red), (BLUE, blue)):
        page = audit(house, caller)
        assert [e.index for e in page.entries] == own
        assert page.next is None
        found = verified(house, page)
        assert {one.entry.tenant for one in found} == {"red" if caller is RED else "blue"}
        assert {one.entry.principal for one in found} == {caller.principal}
    with pytest.raises(NotFoundError):
        audit(house, NOBODY)


def test_a_name_inside_another_name_is_another_tenant(house: House) -> None:
    """A line that holds the words is not therefore the tenant's."""
    house.batch(Exchange())
    fake = Entry(
        seq=house.ledger.size, time=1, event="drift", outcome="done", detail='"tenant":"red"', tenant="blue"
    )
    house.ledger.append(fake)
    tricky = Entry(seq=house.ledger.size, time=1, event="x", outcome="done", tenant="redder")
    house.ledger.append(tricky)
    house.ledger.sync()
    house.quote()
    assert len(audit(house, RED).entries) == 1


def test_pages_cover_everything_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "SCAN", 7)
    own = []
    for _ in range(6):
        own += house.batch(*exchanges(4), *exchanges(3, BLUE))[:4]
    for limit in (1, 3, 64):
        found: list[int] = []
        after: int | None = None
        while True:
            page = audit(house, RED, after, limit)
            assert len(page.entries) <= limit
            verified(house, page)
            found += [e.index for e in page.entries]
            if page.next is None:
                break
            assert after is None or page.next > after
            after = page.next
        assert found == own


def test_a_page_is_bounded_in_bytes(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "PAGE_BYTES", 2000)
    house.batch(*exchanges(20))
    page = audit(house, RED)
    assert 0 < len(page.entries) < 10
    assert page.next == page.entries[-1].index


def test_what_was_withheld_is_told(house: House) -> None:
    one, other = house.record(Exchange(), Exchange())
    house.recorder.withheld([other], house.passes, "why")
    house.quote()
    assert [(e.index, e.withheld) for e in audit(house, RED).entries] == [(one.seq, False), (other.seq, True)]


def test_after_the_end_there_is_nothing(house: House) -> None:
    (at,) = house.batch(Exchange())
    for after in (at, at + 1, 2**53 - 1):
        page = audit(house, RED, after)
        assert (page.entries, page.next) == ((), None)


def test_the_documents_fit_what_carries_them(house: House) -> None:
    """The largest entries there can be, in a receipt and in a page."""
    caller = cast("Any", RED)
    big = "\x00" * 4000
    batch = house.record(Exchange(caller))
    entry = Entry(
        seq=house.ledger.size, time=1, event="operation", outcome="released", tenant="red", detail=big,
        request=bytes(32), response=bytes(32), passed=1, pass_entry=batch[0].seq - 1,
    )  # fmt: skip
    house.ledger.append(entry)
    house.ledger.sync()
    house.quote()
    assert len(redeem(house, RED, entry.seq)) < 128 << 10
    page = audit(house, RED)
    assert b'"error"' not in encode_answer(1, page, None)[:40]
