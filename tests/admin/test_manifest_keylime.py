"""Keylime's runtime policies: what becomes of them, and that nothing else gets through."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestlib.errors import MalformedError
from hostd.admin.manifest_keylime import parse_policy

A, B = "aa" * 32, "bb" * 32
POLICY: dict[str, Any] = {
    "meta": {"version": 1, "generator": 3, "timestamp": "2023-10-01 10:00:00"},
    "release": 0,
    "digests": {
        "/usr/bin/q": [B, A.upper()],
        "/usr/bin/old": ["cc" * 20],
        "/usr/bin/both": [A, "dd" * 64],
        "boot_aggregate": [A],
        "/odd": ["ee" * 24],
    },
    "excludes": ["/tmp/.*"],
    "keyrings": {".ima": ["a1"]},
    "ima": {"ignored_keyrings": [], "log_hash_alg": "sha1", "dm_policy": None},
    "ima-buf": {},
    "verification-keys": "",
}


def test_a_policy() -> None:
    found = parse_policy(json.dumps(POLICY).encode())
    assert found.files == {"/usr/bin/q": (A, B), "/usr/bin/both": (A,)}
    assert found.ima == {
        "/usr/bin/old": ("sha1:" + "cc" * 20,),
        "/usr/bin/both": ("sha512:" + "dd" * 64,),
        "boot_aggregate": ("sha256:" + A,),
    }
    assert found.left_out == (
        "exclude '/tmp/.*'",
        "/odd: a digest of 48 digits",
        "keyrings: IMA signatures are not used",
    )


def test_in_an_envelope() -> None:
    payload = base64.b64encode(json.dumps(POLICY).encode()).decode()
    envelope = {"payload": payload, "payloadType": "application/vnd.keylime+json", "signatures": []}
    assert parse_policy(json.dumps(envelope).encode()) == parse_policy(json.dumps(POLICY).encode())


@pytest.mark.parametrize(
    "policy",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        json.dumps({"digests": {"/a": ["xyz"]}}).encode(),
        json.dumps({"digests": {"/a": A}}).encode(),
        json.dumps({"payload": "*", "payloadType": "x"}).encode(),
        json.dumps({"payload": "", "payloadType": "x"}).encode(),
    ],
)
def test_what_is_no_policy(policy: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_policy(policy)


def test_mutations() -> None:
    data = json.dumps(POLICY).encode()
    rng = random.Random(5)
    for _ in range(2000):
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        with contextlib.suppress(MalformedError):
            parse_policy(bytes(changed))
    for length in range(len(data)):
        with pytest.raises(MalformedError):
            parse_policy(data[:length])


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        parse_policy(data)
