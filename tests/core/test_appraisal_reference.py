"""Reference documents: one form only, what is in force when, and what a host's document holds."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest

from guestlib.attest.imalog import parse_entries
from hostd.core.manifest import approve_next, from_host, new_document
from hostd.core.reference import (
    ANY_HOST,
    MalformedReferenceError,
    Reference,
    Source,
    WrongHostError,
    check_host,
    encode_reference,
    parse_reference,
    reference_digest,
)
from tests.support.imalog import entry
from tests.support.readings import identity, posture

A, B = b"\xaa" * 32, b"\xbb" * 32
C = "cc" * 32
DAY = 86_400
CREATED = 1_700_000_000


def document(**changes: object) -> Reference:
    values: dict[str, object] = {
        "created": CREATED,
        "host": "h",
        "posture": posture(),
        "files": [identity(1, "/usr/bin/q (deleted)", A)],
        "survey": {"/usr/bin/q": B, "/usr/bin/z": A},
        "log": parse_entries(entry("/usr/bin/i", b"x") + entry("/usr/bin/v", violation=True)),
    }
    return from_host(**{**values, **changes})  # type: ignore[arg-type]


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_of_a_host() -> None:
    reference = document()
    assert reference.expected("/usr/bin/q") == (A.hex(), B.hex())
    assert reference.expected("/usr/bin/q (deleted)") == (A.hex(), B.hex())
    assert reference.expected("/usr/bin/none") == ()
    assert list(reference.ima) == ["/usr/bin/i"]
    assert reference.measured("/usr/bin/z") == ("sha256:" + A.hex(),)
    assert len(reference.measured("/usr/bin/i")) == 1
    assert reference.measured("/usr/bin/v") == ()
    assert reference.sources == (Source("h", "host"),)
    assert (reference.version, reference.previous) == (1, "")


def test_the_next_document_of_a_host_follows_the_one_in_force() -> None:
    base = approve_next(document(), {"/usr/bin/q": [C], "/usr/bin/z": [C]}, created=1, retire_after_s=5)
    again = document(base=base, survey={"/usr/bin/q": bytes.fromhex(C)})
    assert again.version == 3
    assert again.previous == reference_digest(base).hex()
    assert again.next == {"/usr/bin/z": (C,)}  # that of q was seen
    assert again.retire == base.retire


def test_log_entries_that_the_survey_has_are_not_repeated() -> None:
    reference = document(
        survey={"/usr/bin/i": hashlib.sha256(b"x").digest()}, log=parse_entries(entry("/usr/bin/i", b"x"))
    )
    assert reference.ima == {}


def test_next_is_accepted_and_retired_is_not() -> None:
    reference = approve_next(document(), {"/usr/bin/z": [C]}, created=CREATED, retire_after_s=2 * DAY)
    due = CREATED + 2 * DAY
    assert reference.expected("/usr/bin/z") == (A.hex(), C)
    assert reference.next_change(CREATED) == due
    assert reference.at(due - 1) is reference
    assert reference.retired("/usr/bin/z", A.hex()) is None
    later = reference.at(due)
    assert later.expected("/usr/bin/z") == later.expected("/usr/bin/z (deleted)") == (C,)
    assert later.retired("/usr/bin/z", A.hex()) == later.retired("/usr/bin/z (deleted)", A.hex()) == due
    assert later.retired("/usr/bin/z", B.hex()) is None
    assert later.retired("/usr/bin/q", A.hex()) is None
    assert later.next_change(due) is None
    # What ran while it was accepted is in the kernel's log until the next boot.
    assert later.measured("/usr/bin/z") == (f"sha256:{A.hex()}", f"sha256:{C}")


def test_a_path_whose_every_digest_retired_accepts_nothing() -> None:
    reference = new_document(
        created=1, host="h", base=None, files={"/a": (C,)}, retire={"/a": {C: 5}, "/b": {C: 5}}
    ).at(5)
    assert reference.expected("/a") == ()
    assert reference.retired("/a", C) == 5


def test_round_trip_and_digest() -> None:
    reference = document()
    data = encode_reference(reference)
    assert parse_reference(data) == reference
    assert reference_digest(reference) == reference_digest(document())
    assert reference_digest(reference) == hashlib.sha256(data).digest()
    assert reference_digest(reference) != reference_digest(document(created=2))
    # The order in which a host was read does not show.
    again = document(survey={"/usr/bin/z": A, "/usr/bin/q": B})
    assert encode_reference(again) == data


def test_one_form_only() -> None:
    data = encode_reference(document())
    plain = json.loads(data)
    assert parse_reference(canonical(plain))
    for variant in (
        data + b"\n",
        b" " + data,
        json.dumps(plain).encode(),
        canonical({**plain, "more": 1}),
        canonical({**plain, "format": "hostd-reference/3"}),
        canonical({**plain, "version": 0}),
        canonical({**plain, "previous": "aa"}),
        canonical({**plain, "files": {"/a": []}}),
        canonical({**plain, "files": {"/a": ["AA" * 32]}}),
        canonical({**plain, "files": {"/a": [B.hex(), A.hex()]}}),
        canonical({**plain, "files": {"/a": [A.hex(), A.hex()]}}),
        canonical({**plain, "next": {"/a": [B.hex(), A.hex()]}}),
        canonical({**plain, "next": {"/a": []}}),
        canonical({**plain, "retire": {"/a": {}}}),
        canonical({**plain, "retire": {"/a": {A.hex(): -1}}}),
        canonical({**plain, "retire": {"/a": {"aa": 1}}}),
        canonical({**plain, "ima": {"/a": ["sha256"]}}),
        canonical({**plain, "remove": []}),
        canonical({**plain, "remove": None}),
        canonical({**plain, "remove": ["/b", "/a"]}),
        canonical({**plain, "remove": ["/a", "/a"]}),
        canonical({**plain, "sources": [{"name": "q", "how": "magic"}]}),
        canonical({key: value for key, value in plain.items() if key != "next"}),
        b"",
        b"[]",
        b"[" * 100_000,
    ):
        with pytest.raises(MalformedReferenceError):
            parse_reference(variant)


def test_documents_from_before_removals_keep_their_bytes() -> None:
    data = canonical(json.loads(encode_reference(new_document(created=1, host="h", base=None))))
    assert b"remove" not in data
    assert (
        hashlib.sha256(data).hexdigest() == "8eaad7aba2b7bad11376b64d5a94d790a8859dc724744010884fb4e5f4535e4e"
    )
    assert parse_reference(data).leaving == frozenset()
    removing = parse_reference(canonical({**json.loads(data), "remove": ["/a", "/b"]}))
    assert removing.leaving == {"/a", "/b"}


def test_which_host_a_document_is_for() -> None:
    for host in ("kvm1", ANY_HOST):
        check_host(new_document(created=1, host=host, base=None), "kvm1")
    for other in ("kvm2", "kvm", "KVM1", "kvm1.example", "**", "kvm*"):
        with pytest.raises(
            WrongHostError, match=f"for host {re.escape(repr(other))}, and this one is 'kvm1'"
        ):
            check_host(new_document(created=1, host=other, base=None), "kvm1")


def test_the_old_format_is_refused_with_what_to_do() -> None:
    old = canonical({**json.loads(encode_reference(document())), "format": "hostd-reference/1"})
    with pytest.raises(MalformedReferenceError, match="hostctl manifest from-host"):
        parse_reference(old)


def test_truncation_and_mutation() -> None:
    data = encode_reference(approve_next(document(), {}, created=CREATED, removals=["/usr/bin/z"]))
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
    with pytest.raises(ValueError, match="created"):
        document(created=-1)
    with pytest.raises(ValueError, match="lockdown"):
        document(posture=posture(lockdown="else"))
