"""One frame into one request, or a refusal that repeats nothing of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from hostd.gateway.requests import Hello, RequestError, encode_answer, parse_request
from hostd.ipc import operations as ops

GOOD = {"id": 7, "op": "Encrypt", "args": {"key": "alias/a", "plaintext": "aGk=", "aad": {"env": "prod"}}}


def text(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def args(**changes: object) -> bytes:
    return text(args={**GOOD["args"], **changes})  # type: ignore[dict-item]


def test_a_request() -> None:
    request = parse_request(text())
    assert request.id == 7
    assert request.operation == ops.Encrypt("alias/a", b"hi", {"env": "prod"})
    assert request.receipt == "reference"
    assert request.deadline_ms == 0


def test_hello() -> None:
    request = parse_request(b'{"id":0,"op":"hello","args":{"versions":[1,2],"client":"x"}}')
    assert request.operation == Hello((1, 2), "x")


@pytest.mark.parametrize("name", sorted(ops.BY_NAME))
def test_every_operation_refuses_an_op_inside_its_arguments(name: str) -> None:
    body = json.dumps({"id": 1, "op": name, "args": {"op": name, "key": "k"}}).encode()
    with pytest.raises(RequestError, match="unknown field") as caught:
        parse_request(body)
    assert caught.value.id == 1


@pytest.mark.parametrize(
    "body",
    [
        text(op="Export"),
        text(op="_Op"),
        text(op=""),
        text(op=7),
        text(op=None),
        text(extra=1),
        text(args=[]),
        text(args=None),
        text(receipt="whole"),
        text(receipt=None),
        text(deadline_ms=-1),
        text(deadline_ms=600_001),
        text(deadline_ms=1.0),
        text(deadline_ms=True),
        args(key=1),
        args(key=""),
        args(key="k" * 129),
        args(plaintext="a b"),
        args(plaintext="aGk"),
        args(plaintext=None),
        args(plaintext=[1]),
        args(secretname=1),
        args(aad={"a": 1}),
        args(aad={"": "x"}),
        args(aad={str(n): "x" for n in range(17)}),
        args(aad=[]),
        args(plaintext="A" * (4 * 21846)),
        text(args={}),
        text(op="GenerateRandom", args={"length": 1.0}),
        text(op="GenerateRandom", args={"length": True}),
        text(op="GenerateRandom", args={"length": "1"}),
        text(op="CreateKey", args={"token": "x" * 7}),
        text(op="CreateKey", args={"token": "xxxxxxxx\n"}),
        text(op="hello", args={"versions": []}),
        text(op="hello", args={"versions": [True]}),
    ],
)
def test_refused_with_its_id(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body)
    assert caught.value.id == 7
    for secret in ("secretname", "Export", "k" * 20, "AAAA"):
        assert secret not in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"{",
        b"{}",
        text(id=-1),
        text(id=2**53),
        text(id=1.0),
        text(id=True),
        text(id="7"),
        text(id=None),
        text() + b"x",
        text() + text(),
        b"\xef\xbb\xbf" + text(),
        text()[:-1],
        text().replace(b"alias", b"\xff"),
        text().replace(b"alias", b"\\ud800"),
        b"[" * 100_000,
        b'{"id":7,"op":"Encrypt","args":' + b"[" * 100_000,
        b'{"id":7,"op":NaN}',
        text().replace(b"7", b"07"),
        b'{"id":7,"op":"Health",}',
        text().decode().encode("utf-16"),
    ],
)
def test_refused_without_an_id(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body)
    assert caught.value.id is None


@pytest.mark.parametrize("depth", [3, 30, 300, 900, 990])
def test_nested_bombs_are_refused(depth: int) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        bomb = opening * depth + b"1" + closing * depth
        for body in (
            b'{"id":7,"op":"Encrypt","args":{"key":' + bomb + b"}}",
            b'{"id":7,"op":"Encrypt","args":{"aad":' + bomb + b"}}",
            b'{"id":7,"args":' + bomb + b',"op":"Health"}',
        ):
            with pytest.raises(RequestError):
                parse_request(body)


def test_no_depth_gets_past_the_refusal() -> None:
    # The parser and the check that follows it have their limits at different depths.
    for depth in range(850, 1000):
        with pytest.raises(RequestError):
            parse_request(b'{"id":7,"op":"Encrypt","args":{"key":' + b"[" * depth + b"]" * depth + b"}}")


def test_a_forged_place_is_not_repeated() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(args(**{"x` - at `$.secretname": 1}))
    assert "secretname" not in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":7,"id":7,"op":"Health"}',
        b'{"id":7,"op":"Health","op":"Health"}',
        b'{"id":7,"op":"Health","args":{},"args":{}}',
        b'{"id":7,"op":"Health","args":[[[{}]]],"args":{}}',
        b'{"id":7,"op":"GenerateRandom","args":{"length":1,"length":2}}',
        b'{"id":7,"op":"GenerateRandom","args":{"length" :1,"length" :1}}',
        b'{"id":7,"op":"GenerateRandom","args":{"length":1,"l\\u0065ngth":2}}',
        b'{"id":7,"op":"GenerateRandom","args":{"length":1,"length":2},"receipt":"\\u006eone"}',
        b'{"id":7,"op":"Encrypt","args":{"key":"a","plaintext":"","aad":{"x":"1","x":"2"}}}',
        b'{"id":7,"op":"Encrypt","args":{"key":"\\":","plaintext":"","aad":{"x":"\\"1\\\\","x":"\\\\"}}}',
    ],
)
def test_a_name_given_twice_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="twice") as caught:
        parse_request(body)
    assert caught.value.id is None


@pytest.mark.parametrize(
    "key", ['":', '": "a":', "\\", '\\"', '"', '\n":', "{}", "a\\u0062", "\u2028", "\x00", '","key":"b']
)
def test_quotes_and_escapes_in_values_are_no_names(key: str) -> None:
    for ascii_only in (True, False):
        body = json.dumps({"id": 1, "op": "DescribeKey", "args": {"key": key}}, ensure_ascii=ascii_only)
        assert parse_request(body.encode()).operation == ops.DescribeKey(key)
        spaced = json.dumps(
            {"id": 1, "op": "DescribeKey", "args": {"key": key}}, indent=3, separators=(" , ", " : ")
        )
        assert parse_request(spaced.encode()).operation == ops.DescribeKey(key)


@seed(1)
@settings(max_examples=300, deadline=None, database=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=8), max_size=4),
    st.booleans(),
    st.sampled_from(["x", '"', "\\", ":", "\\u0022", " "]),
)
def test_any_object_reads_as_itself_and_twice_is_refused(
    aad: dict[str, str], ascii_only: bool, name: str
) -> None:
    aad[name] = "v"
    body = json.dumps(
        {"id": 1, "op": "Encrypt", "args": {"key": "k", "plaintext": "", "aad": aad}}, ensure_ascii=ascii_only
    ).encode("utf-8", "surrogatepass")
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return
    operation = parse_request(body).operation
    assert isinstance(operation, ops.Encrypt)
    assert operation.aad == aad
    again = json.dumps({name: "w"}, ensure_ascii=ascii_only)[1:-1].encode()
    with pytest.raises(RequestError):
        parse_request(body[:-3] + b", " + again + body[-3:])


@seed(2)
@settings(max_examples=500, deadline=None, database=None)
@given(st.data())
def test_mutations_end_in_a_request_or_a_refusal(data: st.DataObject) -> None:
    body = bytearray(text())
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_request(bytes(body))
    except RequestError:
        return


def test_an_answer_that_does_not_fit_becomes_an_error() -> None:
    answer = json.loads(encode_answer(3, {"data": b"x" * 200_000}, None)[4:])
    assert answer == {"id": 3, "error": {"code": "internal", "message": "the answer does not fit a frame"}}
