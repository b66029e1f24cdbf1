"""Reference documents: one form only, and what a baseline holds."""

from __future__ import annotations

import json
import random

import pytest

from guestlib.attest.imalog import parse_entries
from hostd.core.reference import (
    MalformedReferenceError,
    Reference,
    build_baseline,
    encode_reference,
    parse_reference,
    reference_digest,
)
from tests.support.imalog import entry
from tests.support.readings import identity, posture

A, B = b"\xaa" * 32, b"\xbb" * 32


def baseline(**changes: object) -> Reference:
    values: dict[str, object] = {
        "version": 1,
        "created": 1_700_000_000,
        "host": "h",
        "posture": posture(),
        "files": [identity(1, "/usr/bin/q (deleted)", A)],
        "survey": {"/usr/bin/q": B, "/usr/bin/z": A},
        "log": parse_entries(entry("/usr/bin/i", b"x") + entry("/usr/bin/v", violation=True)),
    }
    return build_baseline(**{**values, **changes})  # type: ignore[arg-type]


def test_baseline() -> None:
    reference = baseline()
    assert reference.expected("/usr/bin/q") == (A.hex(), B.hex())
    assert reference.expected("/usr/bin/q (deleted)") == (A.hex(), B.hex())
    assert reference.expected("/usr/bin/none") == ()
    assert list(reference.ima) == ["/usr/bin/i"]
    assert reference.measured("/usr/bin/z") == ("sha256:" + A.hex(),)
    assert len(reference.measured("/usr/bin/i")) == 1
    assert reference.measured("/usr/bin/v") == ()


def test_log_entries_that_the_survey_has_are_not_repeated() -> None:
    import hashlib

    reference = baseline(
        survey={"/usr/bin/i": hashlib.sha256(b"x").digest()}, log=parse_entries(entry("/usr/bin/i", b"x"))
    )
    assert reference.ima == {}


def test_round_trip_and_digest() -> None:
    reference = baseline()
    data = encode_reference(reference)
    assert parse_reference(data) == reference
    assert reference_digest(reference) == reference_digest(baseline())
    assert reference_digest(reference) != reference_digest(baseline(version=2))
    # The order in which a host was read does not show.
    again = baseline(survey={"/usr/bin/z": A, "/usr/bin/q": B})
    assert encode_reference(again) == data


def test_one_form_only() -> None:
    data = encode_reference(baseline())
    document = json.loads(data)
    assert parse_reference(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    for variant in (
        data + b"\n",
        b" " + data,
        json.dumps(document).encode(),
        json.dumps({**document, "more": 1}, sort_keys=True, separators=(",", ":")).encode(),
        json.dumps(
            {**document, "format": "hostd-reference/2"}, sort_keys=True, separators=(",", ":")
        ).encode(),
        json.dumps({**document, "version": 0}, sort_keys=True, separators=(",", ":")).encode(),
        json.dumps({**document, "files": {"/a": []}}, sort_keys=True, separators=(",", ":")).encode(),
        json.dumps(
            {**document, "files": {"/a": ["AA" * 32]}}, sort_keys=True, separators=(",", ":")
        ).encode(),
        json.dumps(
            {**document, "files": {"/a": [B.hex(), A.hex()]}}, sort_keys=True, separators=(",", ":")
        ).encode(),
        json.dumps({**document, "ima": {"/a": ["sha256"]}}, sort_keys=True, separators=(",", ":")).encode(),
        b"",
        b"[]",
        b"[" * 100_000,
    ):
        with pytest.raises(MalformedReferenceError):
            parse_reference(variant)


def test_truncation_and_mutation() -> None:
    data = encode_reference(baseline())
    for length in range(len(data)):
        with pytest.raises(MalformedReferenceError):
            parse_reference(data[:length])
    rng = random.Random(3)
    for _ in range(2000):
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            assert encode_reference(parse_reference(bytes(changed))) == changed
        except MalformedReferenceError:
            continue


def test_out_of_bounds_is_refused_when_built() -> None:
    with pytest.raises(ValueError, match="version"):
        baseline(version=0)
    with pytest.raises(ValueError, match="lockdown"):
        baseline(posture=posture(lockdown="else"))
