"""Changing reference documents: approve, retire, compare."""

from __future__ import annotations

import msgspec
import pytest

from hostd.core.manifest import Counts, approve_next, counts, diff, from_host, merged, new_document, retire
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


def test_nothing_to_retire_says_why() -> None:
    with pytest.raises(ValueError, match="no path has several digests"):
        retire(base(), created=NOW)
    several = base(files={"/q": (A, B), "/z": (B, C)})
    with pytest.raises(ValueError, match="no `next` digest replaces one"):
        retire(several, created=NOW)
    with pytest.raises(
        ValueError, match="2 paths have several digests; of 1 of them this host has used none"
    ):
        retire(several, created=NOW, seen={"/q": [A, B]})


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
    assert retiring.after == f"{A}: 2023-11-14T22:13:30Z"
    created = next(d for d in diff(before, after) if d.part == "created")
    assert (created.before, created.after) == ("1970-01-01T00:00:01Z", "2023-11-14T22:13:20Z")


# ── Files that an update removes ──────────────────────────────────────────────────────────────────


def test_a_removal_is_approved_and_carried_through() -> None:
    once = approve_next(base(), {"/q": [C]}, created=NOW, removals=["/z"], retire_after_s=10)
    assert once.remove == ("/z",)
    assert once.leaving == {"/z"}
    assert once.files == base().files
    assert once.retire == {"/q": {A: NOW + 10}, "/z": {B: NOW + 10}}
    assert ("remove", "added", "/z", "", "may be missing") in [
        (d.part, d.what, d.name, d.before, d.after) for d in diff(base(), once)
    ]
    assert "/z" not in once.at(NOW + 10).files
    done = retire(once, created=NOW + 1)
    assert (done.files, done.remove) == ({"/q": (C,)}, msgspec.UNSET)
    assert done.retired("/z", B) == NOW + 1
    # Ended later, it may be missing until then.
    later = retire(once, created=NOW + 1, after_s=5)
    assert (later.leaving, later.retire["/z"]) == ({"/z"}, {B: NOW + 6})
    assert retire(later, created=NOW + 6).leaving == frozenset()
    assert retire(once, created=NOW + 1, paths=["/q"]).leaving == {"/z"}
    # Another change in between keeps it, and approving the file again takes it back.
    assert approve_next(once, {"/q": [D]}, created=NOW + 1).leaving == {"/z"}
    back = approve_next(once, {"/z": [B]}, created=NOW + 1)
    assert (back.remove, "/z" in back.retire) == (msgspec.UNSET, False)


def test_a_file_that_is_still_in_use_is_not_removed_unseen() -> None:
    once = approve_next(base(), {}, created=NOW, removals=["/z"])
    with pytest.raises(ValueError, match="nothing to retire"):
        retire(once, created=NOW, seen={"/z": [B]})
    assert retire(once, created=NOW, seen={}).files == {"/q": (A,)}


@pytest.mark.parametrize(
    ("digests", "path", "text"),
    [({}, "/none", "no such file to remove"), ({"/z": [C]}, "/z", "removed and replaced at once")],
)
def test_what_cannot_be_removed(digests: dict[str, list[str]], path: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        approve_next(base(), digests, created=NOW, removals=[path])


def test_a_new_document_of_the_host_keeps_removals_of_files_that_are_there() -> None:
    once = approve_next(base(), {}, created=NOW, removals=["/q", "/z"])
    again = from_host(
        created=NOW, host="h", posture=None, files=[], survey={"/z": bytes.fromhex(B)}, log=[], base=once
    )
    assert again.remove == ("/z",)


# ── What is shown ─────────────────────────────────────────────────────────────────────────────────


def test_one_way_to_count() -> None:
    before = base(files={"/q": (A, B), "/z": (B,)}, retire={"/q": {A: NOW, B: NOW + 5}})
    some = approve_next(before, {"/q": [C, D]}, created=NOW, removals=["/z"])
    assert counts(some, NOW) == Counts(files=2, next=2, retire=1, remove=1)
    assert counts(some, NOW - 1).retire == 2
    assert str(counts(some, NOW)) == "2 files; digests: 2 next, 1 to retire; 1 files to remove"


def test_merged() -> None:
    assert merged({"/a": [B]}, {"/a": [A, B], "/b": []}) == {"/a": (A, B)}
