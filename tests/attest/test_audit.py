"""Pages of the audit log, with a real TPM: each check alone, and whatever bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestlib.attest.audit import AuditStep, parse_head, verify_page
from guestlib.attest.bundle import TrustBundle
from guestlib.attest.canonical import canonical
from guestlib.errors import MalformedError, VerificationError
from guestlib.wire.messages import AuditLine
from hostd.ipc import operations as ops
from tests.support.receipts import BLUE, RED, Exchange, House, embedded_tpm, exchanges

Page = tuple[bytes, tuple[AuditLine, ...], TrustBundle]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    directory = tmp_path_factory.mktemp("house")
    with embedded_tpm(directory) as tpm:
        house = House(directory, tpm)
        house.batch(*exchanges(3), Exchange(BLUE))
        batch = house.record(*exchanges(2))
        house.recorder.withheld(batch[1:], house.passes, "why")
        house.quote()
        found = house.receipts.audit(RED, ops.GetAuditLog(), 0)
        lines = tuple(AuditLine(e.index, e.line, e.proof, e.withheld) for e in found.entries)
        yield found.head, lines, house.bundle()
        house.close()


def refused(head: bytes, lines: tuple[AuditLine, ...], bundle: TrustBundle, step: AuditStep) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_page(head, lines, bundle=bundle)
    assert caught.value.step == step


def test_a_good_page(page: Page) -> None:
    head, lines, bundle = page
    signed, found = verify_page(head, lines, bundle=bundle)
    assert [one.entry.seq for one in found] == [line.index for line in lines]
    assert [one.withheld for one in found] == [False] * 4 + [True]
    assert signed.size == 9
    assert verify_page(head, (), bundle=bundle)[1] == ()


def test_each_check_alone(page: Page) -> None:
    head, lines, bundle = page
    one, other, *_ = lines
    refused(head + b" ", lines, bundle, AuditStep.FORM)
    refused(b"{}", lines, bundle, AuditStep.FORM)
    signed = parse_head(head)
    for changes in ({"root": bytes(32)}, {"size": 1}, {"evidence": bytes(32)}, {"pcrs": {0: bytes(32)}}):
        refused(canonical(replace(signed, **changes).fields), lines, bundle, AuditStep.HEAD)  # type: ignore[arg-type]
    refused(head, lines, replace(bundle, pcrs=((7, frozenset({b"x" * 32})),)), AuditStep.HEAD)
    refused(head, (replace(one, index=one.index + 1),), bundle, AuditStep.ENTRY)
    for line in ("", "{}", "\ud800", "[]", one.line + "}"):
        refused(head, (replace(one, line=line),), bundle, AuditStep.ENTRY)
    refused(head, (replace(one, line=one.line.replace("released", "denied")),), bundle, AuditStep.INCLUSION)
    refused(head, (replace(one, proof=other.proof),), bundle, AuditStep.INCLUSION)
    refused(head, (replace(one, proof=()),), bundle, AuditStep.INCLUSION)
    refused(head, (other, replace(one, proof=(*one.proof, bytes(32)))), bundle, AuditStep.INCLUSION)


def test_every_byte_of_the_head_counts(page: Page) -> None:
    head, lines, bundle = page
    for at in range(len(head)):
        data = bytearray(head)
        data[at] ^= 1
        with pytest.raises(VerificationError):
            verify_page(bytes(data), lines, bundle=bundle)


def test_seeded_mutations_raise_nothing_else(page: Page) -> None:
    head, lines, bundle = page
    chance = Random(7)
    for _ in range(1000):
        one = chance.choice(lines)
        text = list(one.line)
        for _ in range(chance.randint(1, 3)):
            text[chance.randrange(len(text))] = chance.choice('"{}[],\\9\x00\ud800e.')
        if "".join(text) != one.line:
            with pytest.raises(VerificationError):
                verify_page(head, (replace(one, line="".join(text)),), bundle=bundle)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_head_raises_the_typed_error_alone(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_head(data)
