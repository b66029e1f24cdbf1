"""Receipts of a real TPM, verified offline; and every way to falsify one, refused by its step."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestlib.attest.bundle import TrustBundle
from guestlib.attest.canonical import canonical, canonical_request
from guestlib.attest.ledgerentry import parse_entry
from guestlib.attest.receipt import (
    Document,
    Place,
    ReceiptStep,
    encode_document,
    parse_document,
    verify_receipt,
)
from guestlib.errors import DeniedError, MalformedError, VerificationError
from hostd.core.entry import Entry
from tests.support.receipts import BLUE, Exchange, House, embedded_tpm, exchanges

EVERY = tuple(ReceiptStep)
STEP = ReceiptStep


@dataclass
class Scene:
    """A host that answered, and two of its receipts."""

    house: House
    bundle: TrustBundle
    exchange: Exchange
    other: Exchange
    own: bytes
    """The exchange's receipt, under its own batch's quote."""
    neighbour: bytes
    """The other's, of the same batch."""
    later: bytes
    """The exchange's, under a quote of a later batch."""
    next_pass: bytes
    """Of an entry of that batch."""

    def refused(self, document: bytes, step: ReceiptStep, bundle: TrustBundle | None = None) -> None:
        with pytest.raises(VerificationError) as caught:
            self.verify(document, bundle)
        assert caught.value.step == step

    def verify(self, document: bytes, bundle: TrustBundle | None = None) -> Any:
        request, answer = self.exchange.request, self.exchange.answer
        return verify_receipt(document, bundle=bundle or self.bundle, request=request, answer=answer)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("house")
    with embedded_tpm(directory) as tpm:
        house = House(directory, tpm)
        house.batch(*exchanges(9))
        exchange, other = Exchange(), exchanges(5)[3]
        at, beside, *_ = house.batch(exchange, other, Exchange(BLUE), *exchanges(4))
        own, neighbour = house.document(at), house.document(beside)
        following = house.batch(*exchanges(7))
        yield Scene(
            house,
            house.bundle(),
            exchange,
            other,
            own,
            neighbour,
            house.document(at),
            house.document(following[0]),
        )
        house.close()


def changed(document: bytes, **changes: Any) -> bytes:
    return encode_document(replace(parse_document(document), **changes))


# ── Good ones ─────────────────────────────────────────────────────────────────────────────────────


def test_every_step_of_a_good_receipt_is_done(scene: Scene) -> None:
    verified = scene.verify(scene.own)
    assert verified.checked == EVERY
    assert verified.own_quote
    entry = verified.entry
    assert (entry.op, entry.outcome, entry.tenant, entry.version) == ("Encrypt", "released", "red", 1)
    assert (verified.passed.event, verified.passed.requests, verified.passed.passed) == ("pass", 7, 2)
    assert verified.head.evidence == verified.passed.evidence


def test_a_receipt_under_a_later_quote(scene: Scene) -> None:
    verified = scene.verify(scene.later)
    assert verified.checked == EVERY
    assert not verified.own_quote
    assert verified.entry == scene.verify(scene.own).entry
    assert verified.head.passed == 3


def test_what_was_not_at_hand_is_not_among_the_steps(scene: Scene) -> None:
    for request, answer, left_out in (
        (None, scene.exchange.answer, {STEP.REQUEST}),
        (scene.exchange.request, None, {STEP.ANSWER}),
        (None, None, {STEP.REQUEST, STEP.ANSWER}),
    ):
        verified = verify_receipt(scene.own, bundle=scene.bundle, request=request, answer=answer)
        assert set(EVERY) - set(verified.checked) == left_out


def test_a_refusal_has_a_receipt_without_an_answer(scene: Scene) -> None:
    refusal = Exchange(error=DeniedError("no"))
    (seq,) = scene.house.batch(refusal)
    document = scene.house.document(seq)
    verified = verify_receipt(document, bundle=scene.bundle, request=refusal.request, answer=None)
    assert (verified.entry.outcome, verified.entry.code) == ("denied", "denied")
    with pytest.raises(VerificationError) as caught:
        verify_receipt(document, bundle=scene.bundle, request=refusal.request, answer=refusal.answer)
    assert caught.value.step == STEP.ANSWER


def test_one_of_several_pinned_keys_is_enough(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    with embedded_tpm(tmp_path_factory.mktemp("other")) as other:
        aks = (other.record.ak_public, *scene.bundle.aks)
        assert scene.verify(scene.own, replace(scene.bundle, aks=aks)).checked == EVERY
        scene.refused(scene.own, STEP.SIGNATURE, replace(scene.bundle, aks=aks[:1]))
        # What is refused of the key that signed is told, not that another did not sign.
        false = encode_document(_head(parse_document(scene.later), evidence=bytes(32)))
        for pinned in (aks, aks[::-1]):
            scene.refused(false, STEP.QUALIFYING, replace(scene.bundle, aks=pinned))


# ── Each check, alone ─────────────────────────────────────────────────────────────────────────────


def swapped(document: Document) -> Document:
    return replace(document, entry=document.passed, passed=document.entry)


FALSE: dict[str, tuple[ReceiptStep, Callable[[Document, Scene], Document]]] = {
    "entry and pass swapped": (STEP.ENTRY, lambda d, s: swapped(d)),
    "another place": (STEP.ENTRY, lambda d, s: _moved(d, index=d.entry.index + 1)),
    "not an entry": (STEP.ENTRY, lambda d, s: _moved(d, line=b"{}")),
    "not a request's entry": (STEP.ENTRY, lambda d, s: _line(d, event="withheld")),
    "an entry without commitments": (STEP.ENTRY, lambda d, s: _line(d, request=None, response=None)),
    "an entry without its request": (STEP.ENTRY, lambda d, s: _line(d, request=None)),
    "a released entry without its answer": (STEP.ENTRY, lambda d, s: _line(d, response=None)),
    "another outcome": (STEP.INCLUSION, lambda d, s: _line(d, outcome="denied")),
    "another tenant": (STEP.INCLUSION, lambda d, s: _line(d, tenant="blue")),
    "the neighbour's proof": (
        STEP.INCLUSION,
        lambda d, s: _moved(d, proof=parse_document(s.neighbour).entry.proof),
    ),
    "a proof to an older head": (
        STEP.INCLUSION,
        lambda d, s: replace(parse_document(s.own), head=parse_document(s.later).head),
    ),
    "another root": (STEP.INCLUSION, lambda d, s: _head(d, root=bytes(32))),
    "another size": (STEP.INCLUSION, lambda d, s: _head(d, size=d.head.size + 100)),
    "a shorter proof": (STEP.INCLUSION, lambda d, s: _moved(d, proof=d.entry.proof[:-1])),
    "a longer proof": (STEP.INCLUSION, lambda d, s: _moved(d, proof=(*d.entry.proof, bytes(32)))),
    "a proof from the middle": (STEP.INCLUSION, lambda d, s: _moved(d, proof=d.entry.proof[1:])),
    "another request's entry as pass": (STEP.BATCH, lambda d, s: replace(d, passed=d.entry)),
    "what is not called a pass": (STEP.BATCH, lambda d, s: _pass(d, event="operation")),
    "a later pass": (STEP.BATCH, lambda d, s: replace(d, passed=parse_document(s.next_pass).passed)),
    "a pass of fewer requests": (STEP.BATCH, lambda d, s: _pass(d, requests=0)),
    "a pass of another number": (STEP.BATCH, lambda d, s: _pass(d, passed=99)),
    "a pass without evidence": (STEP.BATCH, lambda d, s: _pass(d, evidence=None)),
    "a pass of more requests": (STEP.BATCH_INCLUSION, lambda d, s: _pass(d, requests=99)),
    "a pass of other evidence": (
        STEP.BATCH_INCLUSION,
        lambda d, s: _pass(d, evidence=base64.b64encode(bytes(32)).decode()),
    ),
    "the entry's proof for the pass": (
        STEP.BATCH_INCLUSION,
        lambda d, s: replace(d, passed=replace(d.passed, proof=d.entry.proof)),
    ),
    "another signature": (
        STEP.SIGNATURE,
        lambda d, s: _head(d, signature=parse_document(s.own).head.signature),
    ),
    "no signature": (STEP.SIGNATURE, lambda d, s: _head(d, signature=b"")),
    "a quote of another head": (
        STEP.QUALIFYING,
        lambda d, s: _head(
            d, attest=(own := parse_document(s.own).head).attest, signature=own.signature, pcrs=own.pcrs
        ),
    ),
    "another pass number in the head": (STEP.QUALIFYING, lambda d, s: _head(d, passed=d.head.passed + 1)),
    "other evidence in the head": (STEP.QUALIFYING, lambda d, s: _head(d, evidence=bytes(32))),
    "another PCR value": (STEP.PCRS, lambda d, s: _head(d, pcrs={**d.head.pcrs, 7: b"x" * 32})),
    "one PCR less": (STEP.PCRS, lambda d, s: _head(d, pcrs={i: v for i, v in d.head.pcrs.items() if i})),
    "another salt": (STEP.REQUEST, lambda d, s: replace(d, salt=bytes(16))),
}  # fmt: skip


def _moved(document: Document, **changes: Any) -> Document:
    return replace(document, entry=replace(document.entry, **changes))


def _head(document: Document, **changes: Any) -> Document:
    return replace(document, head=replace(document.head, **changes))


def _rewritten(place: Place, changes: dict[str, Any]) -> Place:
    fields = json.loads(place.line) | changes
    line = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
    return replace(place, line=line)


def _line(document: Document, **changes: Any) -> Document:
    return replace(document, entry=_rewritten(document.entry, changes))


def _pass(document: Document, **changes: Any) -> Document:
    return replace(document, passed=_rewritten(document.passed, changes))


@pytest.mark.parametrize("name", FALSE)
def test_a_false_receipt_is_refused_by_its_step(scene: Scene, name: str) -> None:
    step, falsify = FALSE[name]
    document = encode_document(falsify(parse_document(scene.later), scene))
    assert document != scene.later
    scene.refused(document, step)


def test_every_step_refuses_something() -> None:
    assert {step for step, _ in FALSE.values()} | {STEP.FORM, STEP.ANSWER} == set(STEP)


@pytest.mark.parametrize(("what", "step"), [("request", STEP.REQUEST), ("answer", STEP.ANSWER)])
def test_another_exchange_is_refused(scene: Scene, what: str, step: ReceiptStep) -> None:
    bodies = {"request": scene.exchange.request, "answer": scene.exchange.answer}
    for other in (b"", bodies[what][:-1], bodies[what] + b" ", getattr(scene.other, what)):
        with pytest.raises(VerificationError) as caught:
            verify_receipt(scene.own, bundle=scene.bundle, **(bodies | {what: other}))  # type: ignore[arg-type]
        assert caught.value.step == step


def test_two_answers_that_were_swapped_are_found_out(scene: Scene) -> None:
    """Both were released, under one pass; each goes with its own request only."""
    for document, mine, theirs in (
        (scene.own, scene.exchange, scene.other),
        (scene.neighbour, scene.other, scene.exchange),
    ):
        verify_receipt(document, bundle=scene.bundle, request=mine.request, answer=mine.answer)
        with pytest.raises(VerificationError) as caught:
            verify_receipt(document, bundle=scene.bundle, request=mine.request, answer=theirs.answer)
        assert caught.value.step == STEP.ANSWER


def test_a_bundle_that_pins_another_key_or_state_refuses(scene: Scene) -> None:
    scene.refused(scene.own, STEP.SIGNATURE, replace(scene.bundle, aks=(), ek_roots=(b"root",)))
    scene.refused(scene.own, STEP.PCRS, replace(scene.bundle, pcrs=((7, frozenset({b"x" * 32})),)))
    scene.refused(scene.own, STEP.PCRS, replace(scene.bundle, pcrs=((4, frozenset({bytes(32)})),)))


def test_the_own_quote_must_name_the_own_pass(scene: Scene) -> None:
    """A vault that quoted a batch under another pass's number would contradict its own ledger."""
    house = scene.house
    (seq,) = (one.seq for one in house.record(Exchange()))
    house.passes += 1
    house.quote()
    scene.refused(house.document(seq), STEP.QUALIFYING)


def test_a_pass_of_that_number_from_before_a_restart_is_another(scene: Scene) -> None:
    """The power went while a batch was written: its pass counts more entries than there are, and the next run
    counts its passes from one again."""
    house = scene.house
    ledger, number = house.ledger, house.passes + 1
    torn = Entry(
        seq=ledger.size, time=1, event="pass", outcome="done", passed=number, pass_entry=ledger.size,
        evidence=b"e" * 32, requests=9,
    )  # fmt: skip
    ledger.append(torn)
    (seq,) = house.batch(scene.exchange)
    document = house.document(seq)
    verified = scene.verify(document)
    assert (verified.passed.passed, verified.passed.seq) == (number, torn.seq + 1)
    line, proof = ledger.stretch(torn.seq, 1)[0], tuple(ledger.tree.inclusion(torn.seq, verified.head.size))
    scene.refused(changed(document, passed=Place(torn.seq, line, proof)), STEP.BATCH)


# ── The parser ────────────────────────────────────────────────────────────────────────────────────


def test_what_parses_encodes_to_the_same_bytes(scene: Scene) -> None:
    for document in (scene.own, scene.later, scene.neighbour):
        assert encode_document(parse_document(document)) == document


FORM: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown field": lambda d: d | {"more": 1},
    "unknown field inside": lambda d: d | {"entry": d["entry"] | {"more": 1}},
    "another format": lambda d: d | {"format": "hostd-receipt/2"},
    "no salt": lambda d: {name: value for name, value in d.items() if name != "salt"},
    "a short salt": lambda d: d | {"salt": base64.b64encode(bytes(15)).decode()},
    "a long salt": lambda d: d | {"salt": base64.b64encode(bytes(17)).decode()},
    "a salt that is no base64": lambda d: d | {"salt": "!" * 24},
    "an index that is no integer": lambda d: d | {"entry": d["entry"] | {"index": 1.0}},
    "a negative index": lambda d: d | {"entry": d["entry"] | {"index": -1}},
    "an index over 2^63": lambda d: d | {"entry": d["entry"] | {"index": 2**63}},
    "a truth for an index": lambda d: d | {"entry": d["entry"] | {"index": True}},
    "a proof that is no list": lambda d: d | {"pass": d["pass"] | {"proof": 1}},
    "a proof too long": lambda d: d | {"pass": d["pass"] | {"proof": [d["head"]["root"]] * 65}},
    "a long hash": lambda d: d | {"pass": d["pass"] | {"proof": [base64.b64encode(bytes(33)).decode()]}},
    "an empty head": lambda d: d | {"head": {}},
    "no PCRs": lambda d: d | {"head": d["head"] | {"pcrs": {}}},
    "PCR 24": lambda d: d | {"head": d["head"] | {"pcrs": {"24": base64.b64encode(bytes(32)).decode()}}},
    "PCR 07": lambda d: d | {"head": d["head"] | {"pcrs": {"07": base64.b64encode(bytes(32)).decode()}}},
    "a size of 0": lambda d: d | {"head": d["head"] | {"size": 0}},
    "a short root": lambda d: d | {"head": d["head"] | {"root": base64.b64encode(bytes(31)).decode()}},
    "a lone surrogate": lambda d: d | {"entry": d["entry"] | {"line": "\ud800"}},
    "a list": lambda d: [d],
    "null": lambda d: None,
}  # fmt: skip


@pytest.mark.parametrize("name", FORM)
def test_what_is_no_receipt_is_refused(scene: Scene, name: str) -> None:
    fields = FORM[name](json.loads(scene.own))
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    scene.refused(text.encode("utf-8", "surrogatepass"), STEP.FORM)


def test_other_spellings_are_refused(scene: Scene) -> None:
    text = scene.own.decode()
    for other in (
        " " + text,
        text + "\n",
        text.replace('"format":', '"format": '),
        text.replace('"salt"', '"\\u0073alt"'),
        text[:-1] + ',"salt":"AAAAAAAAAAAAAAAAAAAAAA=="}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "{}",
        "",
        text + " " * (128 << 10),
    ):
        scene.refused(other.encode(), STEP.FORM)


def test_a_receipt_over_its_bound_is_not_read(scene: Scene) -> None:
    with pytest.raises(VerificationError, match="over 131072 bytes"):
        scene.verify(scene.own.ljust((128 << 10) + 1))
    with pytest.raises(MalformedError, match="over 32768 bytes"):
        parse_entry(b" " * ((32 << 10) + 1))


def test_truncations_and_trailing_bytes_are_refused(scene: Scene) -> None:
    for end in range(0, len(scene.own), 7):
        scene.refused(scene.own[:end], STEP.FORM)
    scene.refused(scene.own + b"}", STEP.FORM)


def test_every_byte_counts(scene: Scene) -> None:
    """Whatever byte is another, some step refuses: nothing in a receipt is beside the point."""
    request, answer = scene.exchange.request, scene.exchange.answer
    steps = set()
    for at in range(len(scene.later)):
        for flip in (0x01, 0x20):
            data = bytearray(scene.later)
            data[at] ^= flip
            with pytest.raises(VerificationError) as caught:
                verify_receipt(bytes(data), bundle=scene.bundle, request=request, answer=answer)
            steps.add(caught.value.step)
    assert steps >= {STEP.FORM, STEP.ENTRY, STEP.INCLUSION, STEP.BATCH, STEP.BATCH_INCLUSION}
    assert steps >= {STEP.SIGNATURE, STEP.QUALIFYING, STEP.PCRS, STEP.REQUEST}


def test_seeded_mutations_raise_nothing_else(scene: Scene) -> None:
    chance = Random(20261121)
    pieces = [b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"\xff", b"9" * 20, b"1e9", b"null", b"\\ud800"]
    for _ in range(3000):
        data = bytearray(chance.choice((scene.own, scene.later)))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + chance.randint(1, 40)]
                case 2:
                    data[at:at] = chance.choice(pieces)
                case _:
                    data[at:at] = data[at : at + chance.randint(1, 200)]
        if bytes(data) in (scene.own, scene.later):
            continue
        with pytest.raises(VerificationError):
            scene.verify(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_whatever_bytes_raise_the_typed_error_alone(data: bytes) -> None:
    for parse in (parse_document, parse_entry):
        try:
            parse(data)
        except MalformedError:
            continue


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
INNER = LEAF | st.lists(LEAF, max_size=4) | st.dictionaries(st.text(max_size=8), LEAF, max_size=4)
JSON = LEAF | st.lists(INNER, max_size=4) | st.dictionaries(st.text(max_size=8), INNER, max_size=4)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_fields_raise_the_typed_error_alone(scene: Scene, data: st.DataObject) -> None:
    fields = json.loads(scene.own)
    part = data.draw(st.sampled_from([fields, fields["entry"], fields["head"], fields["head"]["pcrs"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    try:
        parse_document(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    except MalformedError:
        return


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(["seq", "time", "event", "outcome", "request"], JSON))
)
def test_whatever_entry_raises_the_typed_error_alone(fields: dict[str, Any]) -> None:
    try:
        parse_entry(json.dumps(fields).encode())
    except MalformedError:
        return


GOOD_LINE = b'{"seq":1,"time":2,"event":"operation","outcome":"released"%b}'


@pytest.mark.parametrize(
    "more",
    [
        b',"seq":1',
        b',"passed":1.0',
        b',"passed":-1',
        b',"request":"' + base64.b64encode(bytes(31)) + b'"',
        b',"request":"' + base64.b64encode(bytes(33)) + b'"',
        b',"request":""',
        b',"evidence":null',
        b',"tenant":1',
    ],
)
def test_a_line_that_says_it_wrongly_is_no_entry(more: bytes) -> None:
    assert parse_entry(GOOD_LINE % b',"unknown":[1.5]').seq == 1
    with pytest.raises(MalformedError):
        parse_entry(GOOD_LINE % more)


def test_the_client_computes_the_same_bytes(scene: Scene) -> None:
    args = {"key": "alias/db", "plaintext": b"card number", "aad": {"table": "users"}}
    assert canonical_request("Encrypt", args) == scene.exchange.request
    ok = {"version": 1, "ciphertext": b"HDC1 sealed", "key": "key-" + 32 * "7"}
    assert canonical(ok) == scene.exchange.answer
