"""Changing reference documents: approve, retire, compare."""

from __future__ import annotations

import msgspec
import pytest

from hostd.core.manifest import approve_next, diff, merged, new_document, retire
from hostd.core.reference import Reference, Source, reference_digest

A, B, C, D = ("aa" * 32, "bb" * 32, "cc" * 32, "dd" * 32)
NOW = 1_700_000_000


def base(**parts: object) -> Reference:
    values: dict[str, object] = {"files": {"/q": (A,), "/z": (B,)}, **parts}
    return new_document(created=1, host="h", base=None, **values)  # type: ignore[arg-type]


def test_approve_follows_its_base_and_keeps_the_rest() -> None:
    before = base(ima={"/i": ("sha1:" + "ab" * 20,)})
    after = approve_next(before, {"/q": [C], "/new": [D]}, created=NOW, sources=[Source("qemu", "deb")])
    assert (after.version, after.previous) == (2, reference_digest(before).hex())
    assert after.files == before.files
    assert after.ima == before.ima
    assert after.next == {"/q": (C,), "/new": (D,)}
    assert after.retire == {}
    assert after.sources == (Source("qemu", "deb"),)


def test_approve_what_is_approved_adds_nothing() -> None:
    assert approve_next(base(), {"/q": [A]}, created=NOW).next == {}


def test_old_digests_retire_at_the_deadline_and_not_later_than_said_before() -> None:
    once = approve_next(base(), {"/q": [C]}, created=NOW, retire_after_s=10)
    assert once.retire == {"/q": {A: NOW + 10}}
    twice = approve_next(once, {"/q": [D]}, created=NOW + 5, retire_after_s=10)
    assert twice.retire == {"/q": {A: NOW + 10, C: NOW + 15}}


def test_approved_again_does_not_retire() -> None:
    once = approve_next(base(), {"/q": [C]}, created=NOW, retire_after_s=10)
    assert approve_next(once, {"/q": [A]}, created=NOW).retire == {}


def test_retire_all_that_was_replaced() -> None:
    approved = approve_next(base(), {"/q": [C]}, created=NOW)
    done = retire(approved, created=NOW)
    assert (done.files, done.next) == ({"/q": (C,), "/z": (B,)}, {})
    assert done.retired("/q", A) == NOW
    later = retire(approved, created=NOW, after_s=60)
    assert later.files["/q"] == (A, C)
    assert later.at(NOW + 60).files["/q"] == (C,)


def test_retire_one_path_only() -> None:
    approved = approve_next(base(), {"/q": [C], "/z": [D]}, created=NOW)
    done = retire(approved, created=NOW, paths=["/z"])
    assert done.files == {"/q": (A,), "/z": (D,)}
    assert done.next == {"/q": (C,)}


def test_retire_what_nobody_uses() -> None:
    approved = approve_next(base(files={"/q": (A, B), "/z": (B,)}), {"/z": [C]}, created=NOW)
    done = retire(approved, created=NOW, seen={"/q": [A], "/z": [B]})
    assert done.files == {"/q": (A,), "/z": (B,)}
    assert done.next == {"/z": (C,)}  # not seen, so it has not arrived
    assert done.retire == {"/q": {B: NOW}}
    # A path that nobody uses at all keeps what it has.
    with pytest.raises(ValueError, match="nothing to retire"):
        retire(approved, created=NOW, seen={})
    assert retire(approved, created=NOW, seen={"/z": [C]}).files == {"/q": (A, B), "/z": (C,)}


def test_nothing_to_retire() -> None:
    with pytest.raises(ValueError, match="nothing to retire"):
        retire(base(), created=NOW)


def test_nothing_differs_between_equals() -> None:
    assert diff(base(), base()) == ()


def test_differences_are_named() -> None:
    before = base(sources=[Source("qemu", "deb", "1")])
    after = approve_next(before, {"/q": [C]}, created=NOW, retire_after_s=10)
    after = msgspec.structs.replace(after, files={"/n": (D,), "/q": (A,)}, sources=())
    found = [(d.part, d.what, d.name) for d in diff(before, after)]
    assert found == [
        ("version", "changed", "version"),
        ("created", "changed", "created"),
        ("previous", "changed", "previous"),
        ("files", "added", "/n"),
        ("files", "removed", "/z"),
        ("next", "added", "/q"),
        ("retire", "added", "/q"),
        ("sources", "removed", "qemu 1 deb"),
    ]
    retiring = next(d for d in diff(before, after) if d.part == "retire")
    assert retiring.after == f"{A}: {NOW + 10}"


def test_merged() -> None:
    assert merged({"/a": [B]}, {"/a": [A, B], "/b": []}) == {"/a": (A, B)}
