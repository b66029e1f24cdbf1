"""Parsers of what the kernel and QEMU write: whole, cut, with more behind, and mutated."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostd.measurer.commandline import Said, parse_command_line
from hostd.measurer.domain_xml import parse_cid
from hostd.measurer.elf import HEADER_BYTES, Layout, MalformedElfError, parse_layout
from hostd.platform.pages import FILE, FRAME, PRESENT, SWAPPED, differing, whole_pages
from hostd.platform.procfs import MalformedProcError, parse_maps, parse_stat, parse_uid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAT = (
    b"812 (a b) c) S 1 812 812 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 3 0 4711 1000 200 18446744073709551615 "
    b"11 12 13 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 21 22 23 24 25 26 27 0\n"
)
MAPS = (
    b"55d0a0000000-55d0a0001000 r--p 00000000 fd:01 42                         /usr/bin/x y\n"
    b"55d0a0001000-55d0a0002000 r-xp 00001000 fd:01 42                         /usr/bin/x y\n"
    b"55d0a0003000-55d0a0004000 rw-p 00000000 00:00 0                          [heap]\n"
    b"7f0000000000-7f0000001000 rwxp 00000000 00:00 0 \n"
    b"7f0000002000-7f0000003000 rw-s 00000000 00:01 9                          /memfd:a (deleted)\n"
    b"7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0                          [vdso]\n"
    b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
)


def spoiled(data: bytes, *, seed: int, count: int = 2000) -> Iterator[bytes]:
    for length in range(len(data)):
        yield data[:length]
    yield data + b"\0"
    yield data + data
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(changed))
            match rng.randrange(3):
                case 0:
                    changed[at] = rng.randrange(256)
                case 1:
                    del changed[at]
                case _:
                    changed.insert(at, rng.choice(b"\0\xff 9-(\n"))
            if not changed:
                break
        yield bytes(changed)


def survives(parse: Callable[[bytes], object], data: bytes, error: type[Exception], seed: int) -> None:
    for variant in spoiled(data, seed=seed):
        try:
            parse(variant)
        except error:
            continue


def test_stat() -> None:
    stat = parse_stat(STAT)
    assert stat.state == "S"
    assert stat.start_time == 4711
    assert stat.image == (11, 12, 13, 21, 22, 23, 24, 25, 26, 27)
    assert not stat.ended
    own = parse_stat(Path("/proc/self/stat").read_bytes())
    assert own.state == "R"
    for length in range(len(STAT)):
        if length < STAT.rindex(b" "):
            with pytest.raises(MalformedProcError):
                parse_stat(STAT[:length])
    survives(parse_stat, STAT, MalformedProcError, 1)


def test_maps() -> None:
    found = parse_maps(MAPS)
    assert [(vma.start, vma.protection, vma.inode, vma.name) for vma in found] == [
        (0x55D0A0000000, 4, 42, "/usr/bin/x y"),
        (0x55D0A0001000, 5, 42, "/usr/bin/x y"),
        (0x7F0000000000, 7, 0, ""),
        (0x7F0000002000, 6, 9, "/memfd:a (deleted)"),
        (0x7FFC00000000, 5, 0, "[vdso]"),
    ]
    assert found[1].offset == 0x1000
    assert found[3].shared
    assert not found[0].shared
    assert parse_maps(Path("/proc/self/maps").read_bytes())
    assert parse_maps(b"") == []
    line_ends = {index + 1 for index, byte in enumerate(MAPS) if byte == 10} | {0}
    for length in range(len(MAPS)):
        if length not in line_ends:
            with pytest.raises(MalformedProcError):
                parse_maps(MAPS[:length])
    survives(parse_maps, MAPS, MalformedProcError, 2)


@pytest.mark.parametrize(
    "line",
    [
        b"2000-1000 r-xp 00000000 fd:01 42 /x\n",
        b"1000-1000 r-xp 00000000 fd:01 42 /x\n",
        b"1001-2000 r-xp 00000000 fd:01 42 /x\n",
        b"1000-2000 rxxp 00000000 fd:01 42 /x\n",
        b"5000-6000 r-xp 00000000 fd:01 42 /x\n4000-5000 r-xp 00000000 fd:01 42 /x\n",
        b"1000-2000 r-xp 00000000 fd:01 42 /x\n\n",
    ],
)
def test_maps_refuses(line: bytes) -> None:
    with pytest.raises(MalformedProcError):
        parse_maps(line)


def test_name_that_is_not_utf8() -> None:
    (vma,) = parse_maps(b"1000-2000 r-xp 00000000 fd:01 42 /\xff\xfe\n")
    assert vma.name == "/\\xff\\xfe"


def test_uid() -> None:
    assert parse_uid(Path("/proc/self/status").read_bytes()) == os.geteuid()
    assert parse_uid(b"Name:\tUid:\nUid:\t1\t2\t3\t4\n") == 2
    with pytest.raises(MalformedProcError):
        parse_uid(b"Name:\tx\n")
    survives(parse_uid, b"Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t1\n", MalformedProcError, 3)


UUID = "11111111-2222-3333-4444-55555555aaaa"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["q", "-uuid", UUID.upper(), "-name", "guest=web,debug-threads=on"], Said(UUID, "web", 0)),
        (["q", "--uuid", UUID, "-name", "web"], Said(UUID, "web", 0)),
        (["q", "-name", "guest=a,,b"], Said("", "a,b", 0)),
        (["q", "-name", "process=x"], Said("", "", 0)),
        (["q", "-device", "vhost-vsock-pci,id=v,guest-cid=7"], Said("", "", 7)),
        (["q", "-device", '{"driver":"vhost-vsock-pci","guest-cid":9,"vhostfd":"3"}'], Said("", "", 9)),
        (["q", "-device", '{"driver":"vhost-vsock-pci","guest-cid":"9"}'], Said("", "", 9)),
        (["q", "-device", "x,guest-cid=7", "-device", "x,guest-cid=8"], Said("", "", 0)),
        (["q", "-device", "x,guest-cid=2"], Said("", "", 0)),
        (["q", "-device", "x,guest-cid=4294967295"], Said("", "", 0)),
        (["q", "-device", "x,guest-cid=-1"], Said("", "", 0)),
        (["q", "-device", '{"guest-cid":' + "[" * 5000], Said("", "", 0)),
        (["q", "-uuid", UUID, "-uuid", "22222222-2222-3333-4444-555555555555"], Said("", "", 0)),
        (["q", "-uuid", "nonsense"], Said("", "", 0)),
        (["q", "-uuid"], Said("", "", 0)),
        ([], Said("", "", 0)),
    ],
)
def test_command_line(arguments: list[str], said: Said) -> None:
    assert parse_command_line("\0".join([*arguments, ""]).encode()) == said


def test_command_line_survives() -> None:
    data = f'q\0-uuid\0{UUID}\0-device\0{{"guest-cid":9}}\0-device\0x,guest-cid=7\0-name\0a\xff\0'.encode(
        "latin-1"
    )
    for variant in spoiled(data, seed=4):
        said = parse_command_line(variant)
        assert said.vm == "" or len(said.vm) == 36
        assert said.cid == 0 or 2 < said.cid < 2**32 - 1
        said.name.encode()


def test_live_xml() -> None:
    xml = "<domain><devices><vsock model='virtio'><cid auto='no' address='{}'/></vsock></devices></domain>"
    assert parse_cid(xml.format("42")) == 42
    for wrong in ("2", "-3", "4294967295", "x", ""):
        assert parse_cid(xml.format(wrong)) == 0
    assert parse_cid("<domain><devices/></domain>") == 0
    assert parse_cid("<domain>") == 0
    assert parse_cid("x" * (2 << 20)) == 0


def elf(*segments: tuple[int, int, int, int], count: int | None = None, table: int = 64) -> bytes:
    """(type, flags, offset, size) of each program header."""
    head = struct.pack(
        "<4sBBBxxxxxxxxxHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 3, 62, 1, 0, table, 0, 0, 64, 56,
        len(segments) if count is None else count, 0, 0, 0,
    )  # fmt: skip
    rows = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, 4096)
        for kind, flags, offset, size in segments
    )
    return head + rows


def test_elf() -> None:
    layout = parse_layout(elf((1, 5, 0, 0x3000), (1, 6, 0x3ABC, 0x1000), (0x6474E552, 4, 0x3ABC, 0x100)))
    assert layout == Layout(((0x3000, 0x5000),))
    assert layout.constant(0, 0x3000)
    assert not layout.constant(0x3000, 0x1000)
    assert layout.constant(0x2000, 0x2000)
    assert layout.constant(0x4000, 0x2000)
    assert parse_layout(b"#!/bin/sh") is None
    assert parse_layout(b"") is None
    own = Path("/proc/self/exe").read_bytes()[:HEADER_BYTES]
    real = parse_layout(own)
    assert real is not None
    assert real.writable


@pytest.mark.parametrize(
    "data",
    [
        b"\x7fELF",
        elf((1, 6, 0, 1), count=0),
        elf((1, 6, 0, 1), count=129),
        elf((1, 6, 0, 1), count=2),
        elf((1, 6, 0, 1), table=2**63),
        elf((1, 6, 2**60, 1)),
        b"\x7fELF\x01" + elf((1, 6, 0, 1))[5:],
    ],
)
def test_elf_refuses(data: bytes) -> None:
    with pytest.raises(MalformedElfError):
        parse_layout(data)


def test_elf_survives() -> None:
    survives(parse_layout, elf((1, 5, 0, 0x3000), (1, 6, 0x3ABC, 0x1000)), MalformedElfError, 5)


def entries(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def test_differing_pages() -> None:
    mine = PRESENT | FILE | 77
    own = entries(mine, mine, mine, mine, mine, mine, mine, 0)
    other = entries(
        mine,  # the same page
        0,  # not touched
        PRESENT | 77,  # the frame, but anonymous
        PRESENT | FILE | 78,  # another frame
        SWAPPED | 5,  # swapped out
        mine | 1 << 55 | 1 << 56,  # bits that say nothing
        SWAPPED | FILE | 77,  # in migration
        mine,  # ours is not there
    )
    assert differing(other, own) == [2, 3, 4, 6, 7]
    assert differing(b"", b"") == []
    with pytest.raises(ValueError, match="pair"):
        differing(own, own[8:])
    with pytest.raises(ValueError, match="pair"):
        differing(b"1234", b"1234")


def test_differing_agrees_with_the_plain_way() -> None:
    rng = random.Random(6)
    for _ in range(300):
        count = rng.randint(1, 40)
        own = [rng.choice((0, PRESENT | FILE | rng.randrange(1, 4))) for _ in range(count)]
        other = [
            rng.choice(
                (0, mine, mine | 1 << 56, PRESENT | FILE | rng.randrange(1, 4), PRESENT | 1, SWAPPED | 1)
            )
            for mine in own
        ]
        plain = [
            index
            for index, (a, b) in enumerate(zip(own, other, strict=True))
            if b & SWAPPED or (b & PRESENT and (not a & PRESENT or (a ^ b) & (FILE | FRAME)))
        ]
        assert differing(entries(*other), entries(*own)) == plain


def test_whole_pages() -> None:
    assert [whole_pages(length) for length in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
