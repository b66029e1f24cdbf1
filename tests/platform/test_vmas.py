"""Mappings by PROCMAP_QUERY and by text: the same, on real processes; and the parser of the answers."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.platform.procfs import MalformedProcError, ProcessGoneError, ProcessHandle, Vma
from hostd.platform.vmas import COVERING_OR_NEXT, MAX_NAME_BYTES, QUERY, MapsReader, parse_row, parse_rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WORDS = QUERY.size // 8


@pytest.fixture(params=["query", "text"])
def reader(request: pytest.FixtureRequest) -> MapsReader:
    wanted = request.param == "query"
    if wanted and not MapsReader().query:
        pytest.skip("this kernel has no PROCMAP_QUERY")
    return MapsReader(query=wanted)


@pytest.fixture
def own() -> Iterator[ProcessHandle]:
    handle = ProcessHandle(os.getpid())
    yield handle
    handle.close()


def _of(vmas: tuple[Vma, ...], path: Path) -> list[Vma]:
    inode = path.stat().st_ino
    return [vma for vma in vmas if vma.inode == inode]


def test_both_ways_give_the_same(own: ProcessHandle, tmp_path: Path) -> None:
    if not MapsReader().query:
        pytest.skip("this kernel has no PROCMAP_QUERY")
    query, text = MapsReader(query=True), MapsReader(query=False)
    odd = tmp_path / "a b\n\\ \xff(deleted)"
    odd.write_bytes(bytes(3 * 4096))
    gone = tmp_path / "gone"
    gone.write_bytes(bytes(4096))
    with odd.open("r+b") as file, gone.open("rb") as other:
        shared = mmap.mmap(file.fileno(), 8192, offset=4096)
        private = mmap.mmap(
            other.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC
        )
        anonymous = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
        gone.unlink()
        try:
            assert query.read(own).vmas == text.read(own).vmas
            (vma,) = _of(text.read(own).vmas, odd)
            assert "\\012" in vma.name
            assert vma.shared
            assert vma.offset == 4096
            assert any(vma.name.endswith("gone (deleted)") for vma in query.read(own).vmas)
            assert any(vma.protection == 7 and not vma.inode for vma in query.read(own).vmas)
        finally:
            for item in (shared, private, anonymous):
                item.close()


_CHILD = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
files = [open(path, "rb") for path in sys.argv[1:]]
areas = []
def mapped(number, offset, length):
    fd = files[number].fileno()
    areas.append(mmap.mmap(fd, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=offset))
def unmapped():
    areas.pop().close()
def protect(address, length, protection):
    assert libc.mprotect(address, length, protection) == 0
for line in sys.stdin:
    eval(line)
    print("done", flush=True)
"""


def test_state_moves_with_every_change(reader: MapsReader, tmp_path: Path) -> None:
    """And with nothing else: a process that did nothing has the same state."""
    paths = [tmp_path / "file", tmp_path / "twin"]
    for path in paths:
        path.write_bytes(bytes(4 * 4096))
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        handle = ProcessHandle(child.pid)

        def do(command: str) -> bytes:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(command + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "done\n"
            state = reader.state(handle)
            assert reader.read(handle).state == state
            return state

        try:
            # Its heap has what it needs after the first time.
            for _ in range(2):
                for command in ("mapped(0, 0, 8192)", "unmapped()", "protect(0, 0, 1)"):
                    before = do(command)
            assert do("protect(0, 0, 1)") == before
            states = [before, do("mapped(0, 0, 8192)")]
            address = next(vma.start for vma in reader.read(handle).vmas if vma.name == str(paths[0]))
            states += [do(f"protect({address}, 8192, {bits})") for bits in (5, 7, 3, 0)]
            states.append(do(f"protect({address + 4096}, 4096, 5)"))
            do("unmapped()")
            for command in ("mapped(0, 4096, 8192)", "mapped(1, 0, 8192)", "mapped(0, 0, 4096)"):
                # Mostly at the very address where the first was.
                states.append(do(command))
                do("unmapped()")
            assert len(set(states)) == len(states)
        finally:
            child.kill()
            handle.close()


def test_a_state_is_shared_only_if_it_was_read_after_the_ask(reader: MapsReader, own: ProcessHandle) -> None:
    asked = time.monotonic_ns()
    first = reader.state(own)
    late = time.monotonic_ns()
    with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7):
        assert reader.state(own, asked) == first
        # Asked for when that had been read, or with no time: as it is now.
        second = reader.state(own, late)
        assert second != first
        assert reader.state(own, asked) == second
    assert reader.state(own) != second


def test_a_state_is_shared_within_one_process(reader: MapsReader, own: ProcessHandle) -> None:
    asked = time.monotonic_ns()
    mine = reader.state(own, asked)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            other = ProcessHandle(child.pid)
            assert reader.state(other, asked) != mine
            # Nor is it given once another was read meanwhile.
            again = ProcessHandle(child.pid)
            assert reader._latest is not None
            assert reader._latest[0] is other
            assert reader.state(again, asked)
            assert reader._latest[0] is again
        finally:
            child.kill()
    with pytest.raises(ProcessGoneError):
        reader.state(again)
    # What could not be read leaves nothing behind.
    with pytest.raises(ProcessGoneError):
        reader.state(again, asked)


def test_process_that_ended(reader: MapsReader) -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    handle = ProcessHandle(pid)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        # A zombie has no memory: nothing, or an error, and never another process's.
        assert reader.read(handle).vmas == ()
    except ProcessGoneError:
        pass
    finally:
        os.waitpid(pid, 0)
    with pytest.raises(ProcessGoneError):
        reader.read(handle)
    with pytest.raises(ProcessGoneError):
        reader.state(handle)
    handle.close()


def row(
    start: int = 0x1000,
    end: int = 0x3000,
    flags: int = 5,
    *,
    asked: int = 0,
    name: bytes = b"",
    inode: int = 7,
) -> bytes:
    head = QUERY.pack(
        QUERY.size,
        COVERING_OR_NEXT,
        asked,
        start,
        end,
        flags,
        4096,
        0x2000,
        inode,
        0xFD,
        1,
        len(name),
        0,
        0,
        0,
    )
    return head + name


def test_row() -> None:
    assert parse_row(row(name=b"/usr/bin/x\ny\0")) == Vma(
        0x1000, 0x3000, 5, False, 0x2000, "fd:01", 7, "/usr/bin/x\\012y"
    )
    assert parse_row(row(flags=8 | 1)).shared
    assert [parse_row(row(flags=flags)).protection for flags in range(8)] == [0, 4, 2, 6, 1, 5, 3, 7]
    assert [vma.start for vma in parse_rows([row(), row(0x3000, 0x4000, asked=0x3000)])] == [0x1000, 0x3000]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        row()[:-1],
        row() + b"\0",
        row(name=b"no end"),
        row(name=b"two\0ends\0"),
        row(end=0x1000),
        row(start=0x1001),
        row(asked=0x3000),
        row(end=1 << 63),
        QUERY.pack(QUERY.size, 0, 0, 0x1000, 0x2000, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0),
        QUERY.pack(96, 0, 0, 0x1000, 0x2000, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        row(name=b"x" * MAX_NAME_BYTES + b"\0"),
    ],
)
def test_row_refuses(data: bytes) -> None:
    with pytest.raises(MalformedProcError):
        parse_row(data)


def test_rows_out_of_order() -> None:
    with pytest.raises(MalformedProcError):
        parse_rows([row(0x5000, 0x6000), row()])
    with pytest.raises(MalformedProcError):
        parse_rows([row(0x1000, 0x3000), row(0x2000, 0x4000)])


@given(st.lists(st.integers(0, 2**64 - 1), min_size=_WORDS, max_size=_WORDS), st.binary(max_size=40))
def test_only_the_malformed_error_escapes(words: list[int], name: bytes) -> None:
    data = b"".join(word.to_bytes(8, "little") for word in words) + name
    try:
        vma = parse_row(data)
    except MalformedProcError:
        return
    assert vma.start < vma.end


def test_mutations() -> None:
    whole = row(name=b"/usr/lib/x.so\0")
    rng = random.Random(7)
    for length in range(len(whole)):
        with pytest.raises(MalformedProcError):
            parse_row(whole[:length])
    for _ in range(3000):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            vma = parse_row(bytes(changed))
        except MalformedProcError:
            continue
        assert 0 <= vma.start < vma.end
        vma.name.encode()
