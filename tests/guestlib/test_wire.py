"""Frames and the client's session: no I/O."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from guestlib.errors import DeniedError, HostdError, InternalError, MalformedError, TransportError
from guestlib.wire import messages
from guestlib.wire.codec import (
    MAX_FRAME_BYTES,
    FrameError,
    FrameReader,
    decode_message,
    encode_message,
    frame,
)
from guestlib.wire.session import TRANSITIONS, ClientSession, Event, Phase

HELLO = {"id": 0, "ok": {"version": 1, "server": "hostd", "limits": {"in_flight": 256, "idle_seconds": 1.5}}}


@seed(3)
@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(1, 30), max_size=30))
def test_any_cut_of_the_stream_gives_the_same_frames(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(frame, bodies))
    reader = FrameReader()
    taken: list[bytes] = []
    for size in [*cuts, len(stream)]:
        reader.feed(stream[:size])
        stream = stream[size:]
        while (body := reader.take()) is not None:
            taken.append(body)
    assert taken == bodies
    assert reader.pending_bytes == 0


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1])
def test_a_bad_length_breaks_the_stream_for_good(length: int) -> None:
    reader = FrameReader()
    reader.feed(struct.pack(">I", length) + frame(b"{}"))
    for _ in range(2):
        with pytest.raises(FrameError):
            reader.take()
    assert reader.pending_bytes == 0


def test_the_limit_itself_fits() -> None:
    reader = FrameReader()
    reader.feed(frame(b"x" * MAX_FRAME_BYTES))
    assert reader.take() == b"x" * MAX_FRAME_BYTES
    with pytest.raises(FrameError):
        frame(b"x" * (MAX_FRAME_BYTES + 1))


@pytest.mark.parametrize("value", ["\ud800", float("nan"), float("inf"), "x" * MAX_FRAME_BYTES, object()])
def test_what_cannot_be_encoded_is_the_callers_mistake(value: object) -> None:
    with pytest.raises(MalformedError):
        encode_message({"id": 1, "v": value})


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"1", b"{", b'{"a":1,"a":1}', b'{"a":{"b":1,"b":1}}', b'{"a":NaN}', b"\xff", b"[" * 99999],
)
def test_what_is_no_message(body: bytes) -> None:
    with pytest.raises(TransportError):
        decode_message(body)


def opened() -> ClientSession:
    session = ClientSession()
    session.send_hello("test")
    assert session.receive(encode_message(HELLO)) == []
    return session


def answer(session: ClientSession, message: dict[str, Any]) -> Any:
    (result,) = session.receive(encode_message(message))
    return result.outcome


def test_the_table_is_complete() -> None:
    for phase in Phase:
        for event in Event:
            session = ClientSession()
            session.phase = phase
            if (phase, event) in TRANSITIONS:
                session._move(event)
                assert session.phase is TRANSITIONS[phase, event]
            else:
                with pytest.raises(TransportError):
                    session._move(event)
                assert session.phase is Phase.CLOSED


def test_a_request_and_its_answer() -> None:
    session = opened()
    assert session.hello is not None
    assert session.hello.limits["idle_seconds"] == 1.5
    number, data = session.send_request(
        "Encrypt", {"key": "k", "plaintext": b"hi", "aad": None}, receipt="none", deadline_ms=9
    )
    assert json.loads(data[4:]) == {
        "id": number,
        "op": "Encrypt",
        "args": {"key": "k", "plaintext": "aGk="},
        "receipt": "none",
        "deadline_ms": 9,
    }
    ok = {"ciphertext": "AAA=", "key": "key-1", "version": 2, "from_the_future": [1]}
    outcome = answer(session, {"id": number, "ok": ok, "receipt": {"ledger": 4, "pass": 5}})
    assert outcome == messages.Encrypted(messages.Receipt(4, 5), b"\0\0", "key-1", 2)
    assert session.in_flight == 0


def test_errors_become_classes() -> None:
    session = opened()
    for code, cls in (("denied", DeniedError), ("from_the_future", InternalError)):
        number, _ = session.send_request("Health", {}, receipt="reference", deadline_ms=0)
        error = answer(session, {"id": number, "error": {"code": code, "message": "m", "ledger": 3}})
        assert type(error) is cls
        assert error.ledger == 3


@pytest.mark.parametrize(
    "message",
    [
        {"id": 99, "ok": {}},
        {"id": "1", "ok": {}},
        {"id": True, "ok": {}},
        {"id": None, "ok": {}},
        {"ok": {}},
        {"id": 1},
        {"id": 1, "ok": []},
        {"id": 1, "ok": {"random": "?"}},
        {"id": 1, "ok": {"random": 7}},
        {"id": 1, "ok": {}},
        {"id": 1, "error": {}},
        {"id": 1, "error": "x"},
        {"id": 1, "error": {"code": "denied"}},
        {"id": 1, "ok": {"random": ""}, "receipt": {"ledger": -1, "pass": 1}},
        {"id": 1, "ok": {"random": ""}, "receipt": 1},
    ],
)
def test_nonsense_ends_the_session(message: dict[str, Any]) -> None:
    session = opened()
    session.send_request("GenerateRandom", {"length": 1}, receipt="reference", deadline_ms=0)
    with pytest.raises(TransportError):
        session.receive(encode_message(message))
    assert session.phase is Phase.CLOSED


def test_the_hosts_last_word() -> None:
    session = opened()
    with pytest.raises(MalformedError, match="broken frame"):
        session.receive(
            encode_message({"id": None, "error": {"code": "malformed", "message": "broken frame"}})
        )
    assert session.phase is Phase.CLOSED


@pytest.mark.parametrize(
    "hello",
    [
        {"version": 2, "server": "hostd", "limits": {}},
        {"version": 1, "server": "x", "limits": {}},
        {"version": 1},
    ],
)
def test_a_strange_hello(hello: dict[str, Any]) -> None:
    session = ClientSession()
    session.send_hello("t")
    with pytest.raises(TransportError):
        session.receive(encode_message({"id": 0, "ok": hello}))


def test_requests_before_hello_are_a_mistake() -> None:
    with pytest.raises(TransportError):
        ClientSession().send_request("Health", {}, receipt="reference", deadline_ms=0)


@seed(4)
@settings(max_examples=300, deadline=None, database=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_answers_or_typed_errors(data: bytes) -> None:
    session = opened()
    try:
        session.receive(data)
        session.receive(frame(data or b"x"))
    except HostdError:
        return


def test_secrets_are_not_shown() -> None:
    assert "hunter2" not in repr(messages.Decrypted(None, b"hunter2", "k", 1))
    assert "hunter2" not in repr(messages.DataKey(None, b"", "k", 1, b"hunter2"))
    assert "hunter2" not in repr(messages.Random(None, b"hunter2"))
