"""The ledger on a real disk: torn, edited, full."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest

from guestlib.attest.merkle import leaf_hash
from hostd.core.ledgercheck import Fault, fault_of
from hostd.vault.ledger import MAX_ENTRY_BYTES, Entry, Ledger, LedgerError
from tests.support.merkletree import Tree
from tests.vault.support_keys import entry


def written(path: Path, count: int) -> list[bytes]:
    ledger = Ledger(path)
    for i in range(ledger.size, ledger.size + count):
        ledger.append(entry(i, "d" * (i % 7)))
    ledger.sync()
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


def root_of(lines: list[bytes]) -> bytes:
    tree = Tree()
    for line in lines:
        tree.append(leaf_hash(line.rstrip(b"\n")))
    return tree.root()


def found(ledger: Ledger) -> Fault | None:
    return fault_of(ledger.audit())


def test_entries_are_leaves_in_order_and_survive(tmp_path: Path) -> None:
    path = tmp_path / "l"
    lines = written(path, 20)
    ledger = Ledger(path)
    assert ledger.size == 20
    assert ledger.tree.root() == root_of(lines)
    assert [e.seq for e in ledger.entries(5, 3)] == [5, 6, 7]
    assert list(ledger.entries(18, 100)) == [entry(18, "d" * 4), entry(19, "d" * 5)]
    assert ledger.stretch(0, 99) == [line[:-1] for line in lines]
    assert ledger.stored_bytes == path.stat().st_size
    ledger.close()
    assert written(path, 3)[:20] == lines


def test_what_is_not_synced_is_not_shown_nor_on_the_disk(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.append(entry(0))
    assert ledger.size == 1
    assert list(ledger.entries(0, 10)) == []
    assert (tmp_path / "l").stat().st_size == 0
    ledger.sync()
    assert len(list(ledger.entries(0, 10))) == 1
    ledger.sync()
    ledger.close()


def test_an_entry_has_its_place_and_its_bound(ledger: Ledger) -> None:
    for seq in (1, -1):
        with pytest.raises(ValueError, match="at place 0"):
            ledger.append(entry(seq))
    with pytest.raises(ValueError, match="too long"):
        ledger.append(entry(0, "x" * MAX_ENTRY_BYTES))
    assert ledger.size == 0


def test_the_longest_detail_that_the_vault_writes_fits(ledger: Ledger) -> None:
    """Names in a finding are somebody else's text: control characters take six bytes each."""
    ledger.append(Entry(seq=0, time=1, event="drift", outcome="refused", detail="\0" * 4000))
    ledger.append(Entry(seq=1, time=1, event="drift", outcome="refused", detail="\U0001f5dd" * 4000))
    ledger.sync()
    assert len(list(ledger.entries(0, 9))) == 2
    again = Ledger(ledger.path)
    assert again.tree.root() == ledger.tree.root()
    again.close()


def test_a_line_break_in_a_detail_makes_no_second_line(ledger: Ledger) -> None:
    ledger.append(entry(0, 'a\n{"seq":1,"time":0}\r\u2028'))
    ledger.sync()
    assert len(ledger.stretch(0, 9)) == 1


def test_a_last_line_torn_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "l"
    lines = written(path, 3)
    whole = b"".join(lines)
    start = len(whole) - len(lines[-1])
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        ledger = Ledger(path)
        assert ledger.size == 2
        assert ledger.tree.root() == root_of(lines[:2])
        ledger.append(entry(2, "again"))
        ledger.sync()
        ledger.close()
        assert path.read_bytes().startswith(whole[:start])
        assert path.read_bytes().count(b"\n") == 3
    # Torn anywhere: what is left is what was whole.
    for cut in range(start):
        path.write_bytes(whole[:cut])
        ledger = Ledger(path)
        assert ledger.size == whole[:cut].count(b"\n")
        assert path.stat().st_size == sum(map(len, lines[: ledger.size]))
        ledger.close()


@pytest.mark.parametrize("change", ["delete", "reorder", "repeat", "renumber", "foreign", "empty", "long"])
def test_a_line_that_is_not_the_entry_of_its_place(tmp_path: Path, change: str) -> None:
    path = tmp_path / "l"
    lines = written(path, 12)
    match change:
        case "delete":
            del lines[3]
        case "reorder":
            lines[3], lines[4] = lines[4], lines[3]
        case "repeat":
            lines.insert(3, lines[3])
        case "renumber":
            lines[3] = lines[3].replace(b'"seq":3,', b'"seq":33,')
        case "foreign":
            lines[3] = b"hello\n"
        case "empty":
            lines[3] = b"\n"
        case "long":
            lines[3] = lines[3].rstrip(b"\n") + b" " * MAX_ENTRY_BYTES + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=r"line [45] "):
        Ledger(path)
    assert path.read_bytes() == b"".join(lines), "a ledger that is refused is left as it is"


def test_an_edited_line_changes_the_root(tmp_path: Path) -> None:
    path = tmp_path / "l"
    lines = written(path, 12)
    before = root_of(lines)
    edited = lines.copy()
    edited[3] = edited[3].replace(b"released", b"denied")
    path.write_bytes(b"".join(edited))
    ledger = Ledger(path)
    assert ledger.tree.root() == root_of(edited) != before
    ledger.close()


def test_the_tail_cut_off_while_it_is_open_shows(tmp_path: Path) -> None:
    path = tmp_path / "l"
    lines = written(path, 5)
    ledger = Ledger(path)
    path.write_bytes(b"".join(lines[:4]))
    assert found(ledger) == Fault(4, "entry 4 is missing at the end")
    with pytest.raises(LedgerError, match=r"l line 5 is not entry 4"):
        ledger.stretch(3, 2)
    ledger.close()


def test_it_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(LedgerError):
        Ledger(tmp_path)
    with pytest.raises(LedgerError):
        Ledger(tmp_path / "none" / "l")


# ── A disk that is full ───────────────────────────────────────────────────────────────────────────


def assert_closed_for_good(ledger: Ledger, durable: int, root: bytes) -> None:
    with pytest.raises(LedgerError):
        ledger.sync()
    assert ledger.size == durable
    assert ledger.tree.root() == root
    for _ in range(2):
        with pytest.raises(LedgerError, match="closed"):
            ledger.append(entry(ledger.size))
        with pytest.raises(LedgerError, match="closed"):
            ledger.sync()
    assert len(list(ledger.entries(0, 10_000))) == durable


def in_child(work: object) -> None:
    """Limits of a process belong to a process of its own."""
    assert callable(work)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_file_size_limit_in_the_middle_of_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "l"

    def work() -> None:
        ledger = Ledger(path)
        for i in range(4):
            ledger.append(entry(i))
        ledger.sync()
        root = ledger.tree.root()
        limit = path.stat().st_size + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for i in range(4, 9):
            ledger.append(entry(i))
        assert_closed_for_good(ledger, 4, root)
        # Room again does not open it: only a new look at the file does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with pytest.raises(LedgerError, match="closed"):
            ledger.append(entry(4))
        ledger.close()

    in_child(work)
    assert path.read_bytes().count(b"\n") == 4, "nothing unacknowledged is left to be found"
    assert path.read_bytes().endswith(b"\n")
    ledger = Ledger(path)
    assert ledger.size == 4
    ledger.append(entry(4))
    ledger.sync()
    ledger.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: root only")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        ledger = Ledger(disk / "l")
        ledger.append(entry(0))
        ledger.sync()
        root = ledger.tree.root()
        for i in range(1, 20):
            ledger.append(entry(i, "x" * 8000))
        assert_closed_for_good(ledger, 1, root)
        ledger.close()
        again = Ledger(disk / "l")
        assert (again.size, again.tree.root()) == (1, root)
        again.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_the_next_start_needs_to_know_is_noted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    said = ("manifest", "retire", "manifest", "operation", "drift", "drift", "clear")
    for seq, event in enumerate(said):
        op = "kernel" if seq == 4 else "ima"
        ledger.append(Entry(seq, 1, event, "done", op=op, detail='"event":"officers"'))
    ledger.sync()
    assert ledger.last == {}
    ledger.close()
    again = Ledger(tmp_path / "l")
    assert {event: entry.seq for event, entry in again.last.items()} == {"manifest": 2, "retire": 1}
    assert again.open_drift == {"kernel": 4}
    again.close()
