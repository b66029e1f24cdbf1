"""The session alone: credit."""

from __future__ import annotations

import base64
import json

from guestlib.wire.codec import MAX_FRAME_BYTES, frame
from hostd.config import Gateway
from hostd.gateway.limits import WAITING_BYTES_PER_CONNECTION, limits_of
from hostd.gateway.session import Session

HELLO = frame(b'{"id":0,"op":"hello","args":{"versions":[1]}}')
LARGE = frame(
    json.dumps(
        {"id": 1, "op": "Encrypt", "args": {"key": "k", "plaintext": base64.b64encode(b"x" * 65000).decode()}}
    ).encode()
)


def opened() -> Session:
    session = Session(limits_of(Gateway()))
    session.feed(HELLO)
    assert session.take() is None
    session.output()
    session.unread = 0
    return session


def test_bytes_in_flight_are_bounded_and_given_back() -> None:
    session = opened()
    session.feed(LARGE * 100)
    held = []
    while (taken := session.take()) is not None:
        held.append(taken[1])
    assert 20 < len(held) < 40
    assert session.partial
    assert session.reserved < WAITING_BYTES_PER_CONNECTION + 2 * len(LARGE) + 2048
    for credit in held:
        session.answer(credit, b"x" * credit)
    assert (session.in_flight, session.reserved) == (0, 0)
    # Answers that the guest has not taken count as well.
    assert session.take() is None
    session.output()
    session.unread = 0
    assert session.take() is not None


def test_a_batch_holds_room_for_the_answer_of_each_item() -> None:
    """256 signatures of RSA-3072 answer a request of some KiB."""
    session = opened()
    item = {"message": ""}
    body = {"id": 1, "op": "SignMany", "args": {"key": "k", "items": [item] * 100}}
    session.feed(frame(json.dumps(body).encode()) * 60)
    held = []
    while (taken := session.take()) is not None:
        held.append(taken[1])
    assert min(held) > 100 * 520
    assert len(held) < 45
    body["args"] = {"key": "k", "items": [item] * 256}
    session = opened()
    session.feed(frame(json.dumps(body).encode()))
    taken = session.take()
    assert taken is not None
    assert taken[1] < 2 * MAX_FRAME_BYTES


def test_small_requests_with_large_answers_are_bounded() -> None:
    session = opened()
    session.feed(frame(b'{"id":1,"op":"GetEvidenceLog","args":{"offset":0}}') * 200)
    count = 0
    while session.take() is not None:
        count += 1
    assert 20 < count < 40


def test_refusals_that_are_not_read_are_bounded() -> None:
    session = opened()
    bad = frame(b'{"id":1,"op":"Nope"}') * 1000
    for _ in range(200):
        session.feed(bad)
        assert session.take() is None
    assert session.unread < WAITING_BYTES_PER_CONNECTION + 1024
