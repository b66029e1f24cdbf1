"""The IMA log: outside vectors, every template, and everything that is no log."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestlib.attest.imalog import (
    MAX_TEMPLATE_DATA,
    PCR_START,
    VIOLATION_EXTENDS,
    MalformedLogError,
    extend,
    parse_entries,
    replay,
    whole_entries,
)
from tests.support.imalog import body_of, entry, field, framed, legacy


@pytest.mark.parametrize("template", ["ima-ng", "ima-sig", "ima-buf", "ima-ngv2", "ima-sigv2"])
def test_templates(template: str) -> None:
    (parsed,) = parse_entries(entry("/usr/bin/x y", b"content", template=template))
    assert parsed.path == "/usr/bin/x y"
    assert parsed.template == template
    assert parsed.content == "sha256:" + hashlib.sha256(b"content").hexdigest()
    assert parsed.extends == hashlib.sha256(body_of("/usr/bin/x y", b"content", template=template)).digest()
    assert not parsed.violation


def test_legacy_template() -> None:
    (parsed,) = parse_entries(legacy("/usr/bin/x"))
    assert (parsed.path, parsed.content) == ("/usr/bin/x", "sha1:" + "11" * 20)
    assert parsed.extends == hashlib.sha256(b"\x11" * 20 + b"/usr/bin/x".ljust(256, b"\0")).digest()


def test_violation() -> None:
    (parsed,) = parse_entries(entry("/usr/bin/x", violation=True))
    assert parsed.violation
    assert parsed.extends == VIOLATION_EXTENDS == b"\xff" * 32


def test_unknown_template_is_kept_and_replays() -> None:
    (parsed,) = parse_entries(framed(b"d-ng|n", b"whatever"))
    assert (parsed.template, parsed.path, parsed.digest) == ("d-ng|n", "", b"")
    assert parsed.extends == hashlib.sha256(b"whatever").digest()


def test_replay() -> None:
    data = entry("/a") + entry("/b", pcr=11) + entry("/c", violation=True)
    parsed = parse_entries(data)
    first = hashlib.sha256(PCR_START + parsed[0].extends).digest()
    assert extend(first, parsed[1]) == first
    assert replay(parsed) == hashlib.sha256(first + b"\xff" * 32).digest()
    assert parsed[-1].end == len(data)
    assert [item.path for item in parse_entries(data, parsed[0].end)] == ["/b", "/c"]


def test_cut_entries_are_left() -> None:
    one, two = entry("/usr/bin/a"), legacy("/usr/bin/b") + entry("/c", template="ima-sig")
    for length in range(len(two)):
        parsed = parse_entries(one + two[:length])
        assert parsed[0].end == len(one)
        assert parsed[-1].end <= len(one) + length


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I20sI", 24, bytes(20), 6),
        struct.pack("<I20sI", 10, bytes(20), 0),
        struct.pack("<I20sI", 10, bytes(20), 65),
        struct.pack("<I20sI", 10, bytes(20), 3) + b"a\0b",
        struct.pack("<I20sI", 10, bytes(20), 6) + b"ima-ng" + struct.pack("<I", MAX_TEMPLATE_DATA + 1),
        framed(b"ima-ng", b""),
        framed(b"ima-ng", field(b"sha256:\0" + bytes(32))),
        framed(b"ima-ng", body_of("/a") + field(b"more")),
        framed(b"ima-ng", body_of("/a")[:-1]),
        framed(b"ima-ng", field(b"sha256" + bytes(32)) + field(b"/a\0")),
        framed(b"ima-ng", field(b"sha256:\0") + field(b"/a\0")),
        framed(b"ima-ng", field(b"sha256:\0" + bytes(65)) + field(b"/a\0")),
        framed(b"ima-ng", field(b"sha256:\0" + bytes(32)) + field(b"/a")),
        framed(b"ima-ng", field(b"sha256:\0" + bytes(32)) + field(b"/a\0b\0")),
        framed(b"ima-ng", field(b"sha256:\0" + bytes(32)) + field(b"/" * 5000 + b"\0")),
        legacy("/" * 256),
        legacy("/a\0b"),
    ],
    ids=range(17),
)
def test_malformed(data: bytes) -> None:
    first = entry("/first")
    with pytest.raises(MalformedLogError) as caught:
        parse_entries(first + data)
    assert caught.value.offset == len(first)


def test_mutations() -> None:
    data = entry("/a") + legacy("/b") + entry("/c", template="ima-sig") + entry("/d", violation=True)
    rng = random.Random(12)
    for _ in range(5000):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            for parsed in parse_entries(bytes(changed)):
                assert parsed.end <= len(changed)
                parsed.path.encode()
        except MalformedLogError:
            continue


def test_frames_end_where_entries_do() -> None:
    """Over whole logs, cuts and mutations: the quick way gets as far as the parser, or further."""
    log = (
        entry("/usr/bin/a")
        + legacy("/usr/bin/b")
        + framed(b"d-ng|n", b"x" * 40)
        + entry("/c", violation=True)
    )
    for length in range(len(log) + 1):
        parsed = parse_entries(log[:length])
        assert whole_entries(log[:length]) == (parsed[-1].end if parsed else 0)
    chance = random.Random(3)
    for _ in range(3000):
        data = bytearray(log)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            end = whole_entries(bytes(data))
        except MalformedLogError:
            with pytest.raises(MalformedLogError):
                parse_entries(bytes(data))
            continue
        assert end <= len(data)
        try:
            parsed = parse_entries(bytes(data))
        except MalformedLogError:
            continue
        assert end == (parsed[-1].end if parsed else 0)


@given(st.binary(max_size=200))
def test_only_the_malformed_error_escapes(data: bytes) -> None:
    for candidate in (data, entry("/a") + data):
        for parse in (parse_entries, whole_entries):
            try:
                parse(candidate)
            except MalformedLogError:
                continue
