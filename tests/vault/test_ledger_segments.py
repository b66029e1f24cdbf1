"""Segments: closing and beginning, what the next start needs, archiving, and the power going at any byte."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from guestlib.attest.merkle import leaf_hash
from hostd.platform.segments import closed_segments, folder_of, number_of
from hostd.vault.ledger import NOTHING_SIGNED, ArchivedError, Entry, Ledger, LedgerError, Signed
from tests.support.ledgers import quick_folder
from tests.support.merkletree import Tree
from tests.vault.support_keys import entry
from tests.vault.test_ledger import found, in_child

PRESENT = Path(__file__).parent.parent / "data" / "ledger-single-file.jsonl"
"""A ledger as hostd wrote it before there were segments."""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


def opened(path: Path, signed: Signed = NOTHING_SIGNED, entries: int = 10) -> Ledger:
    return Ledger(path, signed, segment_entries=entries)


def fill(ledger: Ledger, upto: int, batch: int = 3) -> None:
    while ledger.size < upto:
        for _ in range(batch):
            ledger.append(entry(ledger.size, "d" * (ledger.size % 5)))
        ledger.sync()


def head(ledger: Ledger) -> Signed:
    return Signed(ledger.durable, ledger.tree.root(ledger.durable))


def lines_of(path: Path) -> list[bytes]:
    files = [segment.path for segment in closed_segments(folder_of(path))] + [path]
    return b"".join(file.read_bytes() for file in files).splitlines()


def oracle(lines: list[bytes]) -> Tree:
    tree = Tree()
    for line in lines:
        tree.append(leaf_hash(line))
    return tree


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def closed(path: Path) -> Signed:
    """A ledger of some segments, closed, and its head."""
    ledger = opened(path)
    fill(ledger, 64)
    signed = head(ledger)
    ledger.close()
    return signed


def test_segments_are_one_ledger(path: Path, closed: Signed) -> None:
    lines = lines_of(path)
    assert [number_of(line) for line in lines] == list(range(closed.size))
    assert oracle(lines).root() == closed.root
    ledger = opened(path, closed)
    assert ledger.size == closed.size
    assert len(ledger.closed) >= 4
    assert ledger.stretch(0, 999) == lines
    assert [e.seq for e in ledger.entries(7, 30)] == list(range(7, 37))
    assert ledger.stored_bytes == sum(len(line) + 1 for line in lines)
    assert found(ledger) is None
    for index in range(closed.size):
        assert ledger.stretch(index, 1) == [lines[index]]
        assert ledger.tree.inclusion(index) == oracle(lines).inclusion(index)
    ledger.close()


def test_a_segment_begins_with_what_was_before(path: Path, closed: Signed) -> None:
    lines = lines_of(path)
    previous = 0
    for segment in [*closed_segments(folder_of(path))[1:], None]:
        line = (path if segment is None else segment.path).read_bytes().split(b"\n")[0]
        first = msgspec.json.decode(line, type=Entry)
        assert first.event == "rotate"
        assert first.rotation is not None
        assert first.rotation.previous == previous
        tree = oracle(lines[: first.seq])
        at, edge = 0, []
        for bit in reversed(range(10)):
            if first.seq >> bit & 1:
                edge.append(oracle(lines[at : at + (1 << bit)]).root())
                at += 1 << bit
        assert tree.size == first.seq
        assert list(first.rotation.frontier) == edge
        previous = first.seq


def test_a_segment_is_closed_when_it_has_many_bytes(path: Path) -> None:
    ledger = Ledger(path, segment_bytes=1000)
    fill(ledger, 40)
    sizes = [segment.path.stat().st_size for segment in ledger.closed]
    assert sizes
    assert all(1000 <= size < 2000 for size in sizes)
    ledger.close()


def test_only_the_last_segment_is_read(path: Path, closed: Signed) -> None:
    """What is before it is taken from its first entry, and from nothing else."""
    segments = closed_segments(folder_of(path))
    for segment in segments[1:-1]:
        body = segment.path.read_bytes()
        begin = body.index(b"\n")
        while body[begin + 1 :].startswith(b'{"seq"') and b'"carried"' in body[begin + 1 :].split(b"\n")[0]:
            begin = body.index(b"\n", begin + 1)
        segment.path.write_bytes(body[: begin + 1])
    ledger = opened(path, closed)
    assert ledger.tree.root() == closed.root
    ledger.close()


def test_what_the_next_start_needs_is_carried(path: Path) -> None:
    ledger = opened(path)
    for event, op in (
        ("manifest", ""),
        ("officers", ""),
        ("drift", "kernel"),
        ("drift", "ima"),
        ("clear", "ima"),
        ("channel", ""),
        ("channel-next", ""),
    ):
        ledger.append(Entry(ledger.size, 5, event, "done", op=op, detail=f"of {event}"))
    ledger.append(Entry(ledger.size, 5, "withheld", "withheld", withheld=((1, 2), (4, 4))))
    ledger.sync()
    fill(ledger, 70)
    assert len(ledger.closed) > 3
    ledger.close()
    ledger = opened(path)
    assert ledger.open_drift == {"kernel": 2}
    assert {event: (e.seq, e.detail) for event, e in ledger.last.items()} == {
        "manifest": (0, "of manifest"),
        "officers": (1, "of officers"),
        "channel": (5, "of channel"),
        "channel-next": (6, "of channel-next"),
    }
    assert ledger.withheld == [(1, 2), (4, 4)]
    assert ledger.drifting == [2]
    # Cleared in a later segment: it is not carried any further.
    ledger.append(Entry(ledger.size, 6, "clear", "done", op="kernel"))
    ledger.append(Entry(ledger.size, 6, "manifest", "done", detail="newer"))
    ledger.sync()
    fill(ledger, ledger.size + 40)
    ledger.close()
    ledger = opened(path)
    assert ledger.open_drift == {}
    assert ledger.last["manifest"].detail == "newer"
    ledger.close()


def test_many_drifts_are_carried(path: Path) -> None:
    ledger = opened(path, entries=700)
    for i in range(650):
        ledger.append(Entry(ledger.size, 5, "drift", "refused", op=f"process:{i}", detail="\0" * 4000))
        ledger.append(Entry(ledger.size, 5, "withheld", "withheld", withheld=((i, i),)))
    ledger.sync()
    ledger.close()
    ledger = opened(path)
    assert len(ledger.open_drift) == 650
    assert ledger.withheld == [(i, i) for i in range(650)]
    ledger.close()


def test_a_ledger_of_one_file_is_taken_over(path: Path) -> None:
    shutil.copy(PRESENT, path)
    lines = path.read_bytes().splitlines()
    root = oracle(lines).root()
    ledger = opened(path, Signed(len(lines), root))
    assert ledger.size == len(lines)
    assert ledger.last["manifest"].seq == 3
    assert ledger.open_drift == {"process:4b5eae0c-9df4-4f3c-8a53-8a6a2d1f1c01": 11}
    fill(ledger, len(lines) + 1)
    assert [segment.first for segment in ledger.closed] == [0]
    assert ledger.stretch(0, len(lines)) == lines
    signed = head(ledger)
    ledger.close()
    ledger = opened(path, signed)
    assert ledger.open_drift == {"process:4b5eae0c-9df4-4f3c-8a53-8a6a2d1f1c01": 11}
    assert found(ledger) is None
    ledger.close()


# ── Changed while hostd is stopped ────────────────────────────────────────────────────────────────


def rewritten(path: Path, number: int, old: bytes, new: bytes) -> None:
    """Line `number` of the open segment, from 1."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    path.write_bytes(b"".join(lines))


def test_an_edited_entry_is_named(path: Path, closed: Signed) -> None:
    first = number_of(path.read_bytes())
    assert first is not None
    rewritten(path, 2, b'"time":', b'"time":1')
    before = path.read_bytes()
    for name in ("hashes-8", "hashes-16", "offsets"):
        (folder_of(path) / name).unlink()
    with pytest.raises(
        LedgerError, match=rf"not those that were signed: ledger.jsonl line 2: entry {first + 1} was edited"
    ):
        opened(path, closed)
    assert path.read_bytes() == before
    # Without the hashes beside them it is found all the same; which it was cannot be told.
    (folder_of(path) / "hashes-0").write_bytes(bytes(64))
    with pytest.raises(LedgerError, match="were edited, replaced or reordered"):
        opened(path, closed)


def test_another_edge_than_the_tree_had(path: Path, closed: Signed) -> None:
    line = msgspec.json.decode(path.read_bytes().split(b"\n")[0])
    node = line["rotation"]["frontier"][0]
    # 32 bytes end in one of sixteen letters and "=": the last but two is any of 64.
    other = "B" if node[-3] == "A" else "A"
    rewritten(path, 1, node.encode(), f"{node[:-3]}{other}{node[-2:]}".encode())
    with pytest.raises(LedgerError, match=r"ledger.jsonl line 1: entry \d+ was edited"):
        opened(path, closed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"previous":', b'"previous":1'),
        (b'"follow":0', b'"follow":1'),
        (b'"follow":0', b'"follow":100'),
        (b'"frontier":["', b'"frontier":["AAAA","'),
        (b'"frontier":["', b'"frontier":[7,"'),
        (b'"rotation"', b'"notation"'),
        (b'{"seq":', b'{"seq":1'),
        (b'{"seq":', b"["),
    ],
)
def test_a_beginning_that_is_another(path: Path, closed: Signed, old: bytes, new: bytes) -> None:
    rewritten(path, 1, old, new)
    before = path.read_bytes()
    with pytest.raises(LedgerError):
        opened(path, closed)
    assert path.read_bytes() == before


def test_a_head_of_another_ledger(path: Path, closed: Signed) -> None:
    with pytest.raises(LedgerError, match="entries are missing"):
        opened(path, Signed(closed.size + 1, closed.root))
    for size in (1, 30, closed.size):
        with pytest.raises(LedgerError, match="not those that were signed"):
            opened(path, Signed(size, bytes(32)))


@pytest.mark.parametrize("size", [0, 1, 9, 25, 50, 60])
def test_a_head_that_is_older(path: Path, closed: Signed, size: int) -> None:
    """Also one of before the last segment: the tree's files lead to it, whatever state they are in."""
    signed = Signed(size, oracle(lines_of(path)).root(size))
    for name in ("", "hashes-0", "hashes-8"):
        if name:
            (folder_of(path) / name).write_bytes(os.urandom(1000))
        ledger = opened(path, signed)
        assert ledger.tree.root(size) == signed.root
        assert ledger.tree.root() == closed.root
        ledger.close()


# ── Archiving ─────────────────────────────────────────────────────────────────────────────────────


def archived(path: Path, signed: Signed, keep: int = 1) -> tuple[Ledger, int, list[bytes]]:
    lines = lines_of(path)
    ledger = opened(path, signed)
    end = ledger.closed[-keep].first
    ledger.append(Entry(ledger.size, 7, "archive", "done", op=str(end)))
    ledger.sync()
    ledger.drop(end)
    return ledger, end, lines


def test_archived_entries_say_so_and_later_ones_are_proved(path: Path, closed: Signed) -> None:
    ledger, end, lines = archived(path, closed)
    for _ in range(2):
        assert ledger.first == end
        with pytest.raises(ArchivedError, match=f"before {end} are archived"):
            ledger.stretch(end - 1, 5)
        with pytest.raises(ArchivedError):
            list(ledger.entries(0, 1))
        assert ledger.stretch(end, closed.size - end) == lines[end:]
        for index in range(end, closed.size):
            assert ledger.tree.inclusion(index, closed.size) == oracle(lines).inclusion(index)
        assert ledger.tree.consistency(end, closed.size) == oracle(lines).consistency(end)
        assert found(ledger) is None
        signed = head(ledger)
        ledger.close()
        ledger = opened(path, signed)
    assert ledger.stored_bytes == sum(f.stat().st_size for f in [path, *(s.path for s in ledger.closed)])
    ledger.close()


def test_hashes_of_archived_entries_are_lost(path: Path, closed: Signed, tmp_path: Path) -> None:
    """It still starts, and takes entries; proofs need the archive then."""
    (tmp_path / "kept").mkdir()
    for segment in closed_segments(folder_of(path)):
        shutil.copy(segment.path, tmp_path / "kept")
    ledger, end, lines = archived(path, closed)
    ledger.close()
    hashes = folder_of(path) / "hashes-0"
    hashes.write_bytes(bytes(32 * end) + hashes.read_bytes()[32 * end :])
    ledger = opened(path, closed)
    with pytest.raises(
        LedgerError, match=r"hashes of entries 0 to \d+ are damaged, and entries before \d+ are archived"
    ):
        ledger.tree.inclusion(end, closed.size)
    fill(ledger, ledger.size + 30)
    ledger.close()
    for file in (tmp_path / "kept").iterdir():
        shutil.copy(file, folder_of(path))
    ledger = opened(path, closed)
    assert ledger.first == 0
    assert ledger.tree.inclusion(end, closed.size) == oracle(lines).inclusion(end)
    assert found(ledger) is None
    ledger.close()


def test_segments_that_went_without_being_archived(path: Path, closed: Signed) -> None:
    first, second, *_ = closed_segments(folder_of(path))
    first.path.unlink()
    with pytest.raises(
        LedgerError, match=f"entries 0 to {second.first - 1} are missing, and were not archived"
    ):
        opened(path, closed)


def test_more_segments_gone_than_were_archived(path: Path, closed: Signed) -> None:
    ledger, end, _ = archived(path, closed, keep=2)
    signed = head(ledger)
    ledger.close()
    closed_segments(folder_of(path))[0].path.unlink()
    with pytest.raises(LedgerError, match=r"are missing, and were not archived"):
        opened(path, signed)
    assert end


# ── The power goes ────────────────────────────────────────────────────────────────────────────────


def test_the_open_segment_torn_at_any_byte(path: Path, closed: Signed, tmp_path: Path) -> None:
    """Also in the middle of its beginning: then it begins anew. What was whole is there, and it goes on."""
    whole, lines = path.read_bytes(), lines_of(path)
    before = len(lines) - whole.count(b"\n")
    for cut in range(len(whole)):
        place = tmp_path / "copy"
        shutil.copytree(path.parent, place, ignore=lambda *_: ["copy"])
        copy = place / path.name
        copy.write_bytes(whole[:cut])
        kept = lines[: before + whole[:cut].count(b"\n")]
        ledger = opened(copy)
        again = ledger.stretch(0, 999)
        assert again[:before] == lines[:before]
        if whole[:cut].count(b"\n"):
            assert again == kept
        else:
            assert msgspec.json.decode(again[before], type=Entry).event == "rotate"
        fill(ledger, ledger.size + 1)
        assert found(ledger) is None
        signed = head(ledger)
        ledger.close()
        reopened = opened(copy, signed)
        assert reopened.tree.root() == oracle(lines_of(copy)).root()
        reopened.close()
        shutil.rmtree(place)


def test_a_beginning_with_what_it_carries_torn_at_any_byte(path: Path, tmp_path: Path) -> None:
    ledger = opened(path)
    for op in ("kernel", "ima"):
        ledger.append(Entry(ledger.size, 5, "drift", "done", op=op))
    ledger.sync()
    fill(ledger, 11)
    ledger.close()
    whole = path.read_bytes()
    assert whole.count(b"\n") == 3, "the rotation and two drifts"
    for cut in range(len(whole)):
        place = tmp_path / "copy"
        shutil.copytree(path.parent, place, ignore=lambda *_: ["copy"])
        (place / path.name).write_bytes(whole[:cut])
        ledger = opened(place / path.name)
        assert ledger.open_drift == {"kernel": 0, "ima": 1}
        fill(ledger, 30)
        ledger.close()
        ledger = opened(place / path.name)
        assert ledger.open_drift == {"kernel": 0, "ima": 1}
        assert found(ledger) is None
        ledger.close()
        shutil.rmtree(place)


def test_between_closing_and_beginning(path: Path, closed: Signed) -> None:
    """The open segment has got its new name, and the next is not there yet."""
    first = msgspec.json.decode(path.read_bytes().split(b"\n")[0], type=Entry)
    path.rename(folder_of(path) / f"{first.seq:012d}.jsonl")
    ledger = opened(path, closed)
    assert ledger.size == closed.size + 1
    assert ledger.open_first == closed.size
    assert found(ledger) is None
    ledger.close()


@pytest.mark.parametrize("name", ["hashes-0", "hashes-8", "offsets"])
def test_a_derived_file_torn_at_any_byte(path: Path, closed: Signed, name: str) -> None:
    lines = lines_of(path)
    file = folder_of(path) / name
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        ledger = opened(path, closed)
        index = cut * 7 % closed.size
        assert ledger.stretch(index, 3) == lines[index : index + 3]
        assert ledger.tree.inclusion(index) == oracle(lines).inclusion(index)
        ledger.close()
    ledger = opened(path, closed)
    assert ledger.stretch(0, 99) == lines
    assert found(ledger) is None
    ledger.close()
    assert file.read_bytes() == whole


# ── A disk that is full or fails ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("room", [0, 1, 50, 100, 200])
def test_no_room_while_a_segment_begins(path: Path, room: int) -> None:
    """The entries before it are durable and were acknowledged; the ledger takes no more, and opens again."""

    def work() -> None:
        ledger = opened(path)
        fill(ledger, 9, batch=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 60 + room, resource.RLIM_INFINITY))
        acknowledged = 9
        try:
            for _ in range(50):
                ledger.append(entry(ledger.size))
                ledger.sync()
                acknowledged = ledger.durable
        except LedgerError:
            pass
        with pytest.raises(LedgerError, match="closed"):
            ledger.append(entry(ledger.size))
        assert ledger.durable >= acknowledged
        (path.parent / "acknowledged").write_text(str(acknowledged))
        ledger.close()

    in_child(work)
    ledger = opened(path)
    assert ledger.size >= int((path.parent / "acknowledged").read_text())
    fill(ledger, ledger.size + 30)
    assert found(ledger) is None
    ledger.close()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "rename", "fsync"])
def test_a_failing_call_at_every_place(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whatever fails, and when: nothing acknowledged is lost, and a ledger that failed takes nothing more."""
    real: Callable[..., object] = getattr(os, call)
    for fail_at in range(60):
        shutil.rmtree(folder_of(path), ignore_errors=True)
        path.unlink(missing_ok=True)
        ledger = opened(path, entries=6)
        calls = 0

        def failing(*args: object, at: int = fail_at) -> object:
            nonlocal calls
            calls += 1
            if calls > at:
                raise OSError(5, "Input/output error")
            return real(*args)

        monkeypatch.setattr(os, call, failing)
        acknowledged = 0
        try:
            while ledger.size < 40:
                ledger.append(entry(ledger.size))
                ledger.sync()
                acknowledged = ledger.durable
        except LedgerError:
            with pytest.raises(LedgerError, match="closed"):
                ledger.append(entry(ledger.size))
        assert len(ledger.stretch(0, 99)) == ledger.durable
        ledger.close()
        monkeypatch.setattr(os, call, real)
        again = opened(path, entries=6)
        assert again.size >= acknowledged
        assert found(again) is None
        again.close()
        if calls <= fail_at:
            break
