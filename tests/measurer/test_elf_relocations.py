"""Parsers of relocations and symbols, and linking: against other tools on real files, and damaged input."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.measurer.elf import MalformedElfError
from hostd.measurer.elf_image import DT_NEEDED, Image, Load, parse_image, string
from hostd.measurer.elf_relocations import R_JUMP_SLOT, WORD, parse_relocations
from hostd.measurer.elf_symbols import Wanted, gnu_hash
from hostd.measurer.linking import Linking, Module, parse_module

LIBRARIES = Path("/lib/x86_64-linux-gnu")
NAMES = ("libc.so.6", "libm.so.6", "libz.so.1", "ld-linux-x86-64.so.2", "libgcc_s.so.1")
FILES = [Path(os.path.realpath(LIBRARIES / name)) for name in NAMES if (LIBRARIES / name).exists()]
SMALL = Path(os.path.realpath(LIBRARIES / "ld-linux-x86-64.so.2"))


def module_of(path: Path, number: int = 1) -> Module:
    module = parse_module(memoryview(path.read_bytes()), number, str(path), bytes(32))
    assert module is not None
    return module


def readelf(*arguments: str) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    return subprocess.run(["readelf", "-W", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_relocations_are_those_of_readelf(path: Path) -> None:
    module = module_of(path)
    start, end = module.image.relro
    expected = module.relocated.expected(0x7000_0000_0000)
    lines = re.findall(r"^([0-9a-f]{16})  [0-9a-f]{16} (R_X86_64_\w+) +(.*)$", readelf("-r", str(path)), re.M)
    assert lines
    relative = [(int(at, 16), int(rest, 16)) for at, kind, rest in lines if kind == "R_X86_64_RELATIVE"]
    for at, addend in relative:
        if start <= at < end:
            word = int.from_bytes(expected[at - start : at - start + WORD], "little")
            assert word == 0x7000_0000_0000 + addend
    named = {int(at, 16) for at, kind, _ in lines if kind not in ("R_X86_64_RELATIVE", "R_X86_64_COPY")}
    inside = {item.address for item in module.relocated.named}
    assert inside == {at for at in named if start <= at < end}
    slots = {int(at, 16) for at, kind, _ in lines if kind == "R_X86_64_JUMP_SLOT"}
    loose = {item.address for item in module.relocated.loose if item.type == R_JUMP_SLOT}
    assert loose == {at for at in slots if not start <= at < end}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_definition_is_found_by_name_and_version(path: Path) -> None:
    symbols = module_of(path).symbols
    listed = re.findall(
        r"^ *\d+: ([0-9a-f]+) +\S+ (?:FUNC|OBJECT|IFUNC) +(?:GLOBAL|WEAK) +\S+ +"
        r"(?!UND|ABS)\S+ (\S+?)@@?(\S+)$",
        readelf("--dyn-syms", str(path)),
        re.M,
    )
    assert listed
    for value, name, version in listed:
        wanted = Wanted(name.encode(), version.encode(), False)
        index = symbols.find(wanted, gnu_hash(wanted.name), slot=True)
        assert index is not None, name
        assert symbols.symbol(index).name == wanted.name
        assert symbols.version(index)[0] == wanted.version
        assert value
    assert symbols.find(Wanted(b"no_such_name", b"", False), gnu_hash(b"no_such_name"), slot=True) is None
    name = listed[0][1].encode()
    assert symbols.find(Wanted(name, b"NO_SUCH_VERSION", True), gnu_hash(name), slot=True) is None


def test_hash_is_the_published_one() -> None:
    # Vectors of the description of DT_GNU_HASH.
    assert gnu_hash(b"") == 0x1505
    assert gnu_hash(b"printf") == 0x156B2BB8
    assert gnu_hash(b"syscall") == 0xBAC212A0


def test_linking_leads_to_the_first_in_order(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")

    def build(name: str, source: str, *extra: str) -> Module:
        path = tmp_path / name
        (tmp_path / f"{name}.c").write_text(source)
        arguments = ["cc", "-shared", "-fPIC", "-nostdlib", "-o", str(path), f"{path}.c", f"-L{tmp_path}"]
        subprocess.run([*arguments, f"-Wl,-soname,{name}", *extra], check=True)
        return module_of(path, int(name[3]))

    two = build("lib2.so", "int both(void) { return 2; } int two(void) { return 2; }")
    three = build("lib3.so", "int both(void) { return 3; } int three(void) { return both(); }")
    one = build(
        "lib1.so",
        "int both(void), two(void), three(void); __attribute__((weak)) int nobody(void);"
        "int one(void) { return both() + two() + three() + (nobody ? nobody() : 0); }",
        "-Wl,-z,now", "-l:lib3.so", "-l:lib2.so",
    )  # fmt: skip
    five = build("lib5.so", "int both(void) { return 5; }")
    linking = Linking((five, two, one, three), 2)
    while linking.step():
        pass
    assert not linking.unmet
    found = {linking.name_of(2, slot.item): slot.target for slot in linking.slots[2] if slot.item.symbol}
    modules = {name: target.module for name, target in found.items()}
    assert modules["both"] == 3
    assert modules["two"] == 1
    assert modules["three"] == 3
    assert modules["nobody"] == -1
    assert found["nobody"].value == 0
    both = next(slot for slot in linking.slots[2] if linking.name_of(2, slot.item) == "both")
    assert {target.module for target in linking.alternatives(2, both.item)} == {0, 1, 3}
    assert both.value([0, 0, 0, 0x1000]) == 0x1000 + found["both"].value
    # Without what it needs it is not complete.
    lacking = Linking((two, one), 1)
    while lacking.step():
        pass
    assert "lib3.so" in lacking.unmet
    assert "three" in lacking.unmet


def test_other_files_are_none() -> None:
    assert parse_module(memoryview(b"#!/bin/sh\n"), 1, "x", bytes(32)) is None
    assert parse_module(memoryview(b""), 1, "x", bytes(32)) is None


@given(st.binary(max_size=4096))
def test_any_bytes(data: bytes) -> None:
    for head in (b"", b"\x7fELF\x02\x01\x01", SMALL.read_bytes()[:64]):
        try:
            parse_module(memoryview(head + data), 1, "x", bytes(32))
        except MalformedElfError:
            continue


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files(seed: int) -> None:
    """Changed bytes in the headers, the tables and the dynamic section; cut files. What parses also links."""
    whole = SMALL.read_bytes()
    image = parse_image(memoryview(whole))
    assert image is not None
    chance = random.Random(seed)
    dynamic = image.offset_of(image.dynamic_address)
    areas = [(0, 0x240), (0x260, 0xD60), (dynamic, dynamic + 0x1A0)]
    linked = refused = 0
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            low, high = chance.choice(areas)
            at = chance.randrange(low, high)
            if chance.random() < 0.5:
                data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            else:
                value = chance.choice((0, 1, 8, (1 << 63) - 1, (1 << 64) - 1, 1 << 47, 1 << 32, len(whole)))
                data[at & ~7 : (at & ~7) + 8] = value.to_bytes(8, "little")
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        try:
            module = parse_module(memoryview(bytes(data)), 1, "/x/ld-linux-x86-64.so.2", bytes(32))
        except MalformedElfError:
            refused += 1
            continue
        if module is None:
            continue
        linking = Linking((module,), 0)
        while linking.step():
            pass
        linking.served()
        linking.copied(0)
        for item in (*module.relocated.named, *module.relocated.loose):
            linking.name_of(0, item)
            linking.alternatives(0, item)
        assert len(module.relocated.expected(0x7FFF_FFFF_F000)) == module.relocated.size
        linked += 1
    assert linked
    assert refused


def made(dynamic: bytes, table: bytes, *, relro: int = 0x1000) -> memoryview:
    """A library of one segment: headers, dynamic section at 0x200, `table` at 0x800, region at 0x1000."""
    programs = b"".join(
        struct.pack("<IIQQQQQQ", kind, 6, offset, offset, offset, size, size, 8)
        for kind, offset, size in (
            (1, 0, 0x3000), (2, 0x200, len(dynamic)), (0x6474E552, 0x1000, relro)
        )
    )  # fmt: skip
    head = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 3, 62, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0
    )
    data = bytearray(0x3000)
    data[: len(head)] = head
    data[64 : 64 + len(programs)] = programs
    data[0x200 : 0x200 + len(dynamic)] = dynamic
    data[0x800 : 0x800 + len(table)] = table
    return memoryview(bytes(data))


def entries(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<qQ", tag, value) for tag, value in (*pairs, (0, 0)))


def relocated(dynamic: bytes, table: bytes, **more: int):  # type: ignore[no-untyped-def]
    data = made(dynamic, table, **more)
    image = parse_image(data)
    assert image is not None
    return parse_relocations(data, image)


def test_relr() -> None:
    # An address, then a bitmap: words 1, 2 and 63 after it.
    table = struct.pack("<QQ", 0x1000, (0b11 | 1 << 62) << 1 | 1)
    found = relocated(entries((36, 0x800), (35, len(table))), table)
    words = memoryview(found.expected(0x5000)).cast("Q")
    assert [index for index, word in enumerate(words) if word] == [0, 1, 2, 63]
    assert {words[0], words[63]} == {0x5000}
    assert found.relative == 4
    assert not found.is_plain(0x1000)
    assert found.is_plain(0x1018)


RELA = struct.Struct("<QQq")


@pytest.mark.parametrize(
    ("dynamic", "table"),
    [
        (((36, 0x800), (35, 8)), struct.pack("<Q", 0x9000)),
        (((36, 0x800), (35, 8)), struct.pack("<Q", 0x1004)),
        (((36, 0x800), (35, 7)), bytes(7)),
        (((7, 0x800), (8, 24)), RELA.pack(0x1004, 8, 0)),
        (((7, 0x800), (8, 24)), RELA.pack(0x1000, 8, -1)),
        (((7, 0x800), (8, 24)), RELA.pack(1 << 50, 8, 0)),
        (((7, 0x800), (8, 24)), RELA.pack(0x1000, 10, 0)),
        (((7, 0x800), (8, 24)), RELA.pack(0x1FF8, 36, 0)),
        (((7, 0x800), (8, 23)), bytes(23)),
        (((7, 0x2FF0), (8, 24)), b""),
        (((7, 0x800), (8, 1 << 40)), b""),
        (((17, 0x800), (18, 16)), b""),
        (((22, 0),), b""),
        (((20, 17),), b""),
    ],
)
def test_what_is_refused(dynamic: tuple[tuple[int, int], ...], table: bytes) -> None:
    with pytest.raises(MalformedElfError):
        relocated(entries(*dynamic), table)


def test_too_many_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hostd.measurer import elf_relocations

    table = b"".join(RELA.pack(0x1000 + 8 * n, 6 | n << 32, 0) for n in range(9))
    dynamic = entries((7, 0x800), (8, len(table)))
    assert len(relocated(dynamic, table).named) == 9
    monkeypatch.setattr(elf_relocations, "MAX_NAMED", 8)
    with pytest.raises(MalformedElfError):
        relocated(dynamic, table)
    monkeypatch.setattr(elf_relocations, "MAX_RELOCATIONS", 8)
    with pytest.raises(MalformedElfError):
        relocated(dynamic, table)


def test_region_is_bounded() -> None:
    with pytest.raises(MalformedElfError):
        relocated(entries(), b"", relro=65 << 20)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 0x1FF), st.integers(0, 1 << 40)), max_size=60), st.integers(0, 1 << 46)
)
def test_relative_is_addend_and_base(pairs: list[tuple[int, int]], base: int) -> None:
    """The region as one integer is what word by word gives."""
    table = b"".join(RELA.pack(0x1000 + 8 * index, 8, addend) for index, addend in pairs)
    found = relocated(entries((7, 0x800), (8, len(table))) if table else entries(), table)
    words = memoryview(found.expected(base)).cast("Q")
    expected = dict(pairs)
    assert list(words) == [base + expected[n] if n in expected else 0 for n in range(0x200)]


def test_names_are_bounded() -> None:
    assert string(b"a\0bc\0", 2) == b"bc"
    for table, at in ((b"abc", 0), (b"a\0", 2), (b"x" * 5000 + b"\0", 0)):
        with pytest.raises(MalformedElfError):
            string(table, at)


def test_addresses_and_offsets() -> None:
    image = Image((Load(0x1000, 0x4000, 0x100, 0x900, 6),), (0, 0), 0, ((DT_NEEDED, 1),), (), b"", False)
    assert image.offset_of(0x4010, 8) == 0x1010
    assert image.address_of(0x1010) == 0x4010
    assert image.address_of(0x2000) is None
    with pytest.raises(MalformedElfError):
        image.offset_of(0x40FC, 8)
