"""Images made from files: sections, relocations, tables of patch sites, and the comparison with memory."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.core.patchsites import NOPS, SiteKind
from hostd.measurer import kernel_tables as tables
from hostd.measurer.kernel_elf import MalformedElfError, build_id, parse_elf
from hostd.measurer.kernel_explain import explain
from hostd.measurer.kernel_files import PackageFiles, living, parse_dep, parse_modules
from hostd.measurer.kernel_image import Image, parse_relocations, vmlinux_image
from hostd.measurer.kernel_live import live_module
from hostd.measurer.kernel_module import ModuleFile
from hostd.platform.kallsyms import Symbols, pack_symbols
from tests.support.kernelelf import ALLOC, EXEC, NOBITS, WRITE, ElfMaker, Memory

TEXT = 0xFFFFFFFFC0001000
TABLE = 0xFFFFFFFFC0005000
DATA = 0xFFFFFFFFC0007000
EXPORTED = 0xFFFFFFFF81234560
SYMBOLS = Symbols(
    pack_symbols([(TEXT, b"run [m]", True), (TEXT + 0x20, b"other [m]", True), (EXPORTED, b"schedule", True)])
)


def module() -> bytes:
    """Text with a call of `schedule`, a jump label and an ftrace site; a table of operations in data."""
    maker = ElfMaker()
    text = bytearray(0x40)
    text[0:5] = NOPS[4]
    text[5:10] = b"\xe8\0\0\0\0"
    text[0x10:0x15] = NOPS[4]
    text[0x20:0x25] = NOPS[4]
    code = maker.add(".text", bytes(text), ALLOC | EXEC)
    jumps = maker.add("__jump_table", bytes(16), ALLOC | WRITE)
    hooks = maker.add("__mcount_loc", bytes(8), ALLOC)
    data = maker.add(".data", bytes(32), ALLOC | WRITE)
    cpu = maker.add(".data..percpu", bytes(8), ALLOC | WRITE)
    bss = maker.add(".bss", b"", ALLOC | WRITE, kind=NOBITS)
    maker.add(".init.text", b"\x90" * 8, ALLOC | EXEC)
    symbols = maker.symbols(
        [
            ("run", code, 0, 0x20),
            ("other", code, 0x20, 0x20),
            ("schedule", 0, 0, 0),
            ("ops", data, 8, 16),
            ("counter", cpu, 0, 8),
            ("key", bss, 0, 0),
            ("text", code, 0, 0),
        ]
    )
    maker.relocations(code, symbols, [(6, 4, 3, -4), (0x28, 1, 5, 0), (0x30, 11, 6, 0)])
    maker.relocations(jumps, symbols, [(0, 2, 7, 0x10), (4, 2, 7, 0x20), (8, 24, 7, 0)])
    maker.relocations(hooks, symbols, [(0, 1, 1, 0)])
    maker.relocations(data, symbols, [(8, 1, 2, 0)])
    return maker.file()


PLACES = {
    ".text": TEXT,
    "__jump_table": TABLE,
    "__mcount_loc": TABLE + 0x100,
    ".data": DATA,
    ".init.text": 0,
}
OWN = {"counter": 0x34008, "key": DATA + 0x100}


def loaded() -> ModuleFile:
    return ModuleFile("m", module(), PLACES, {"schedule": EXPORTED}.get, OWN.get)


def memory_of(image: Image) -> Memory:
    memory = Memory()
    for area in image.areas:
        memory.put(area.address, bytes(area.golden or bytes(area.length)))
    return memory


def test_a_module_is_relocated_to_where_it_runs() -> None:
    made = loaded()
    image = made.image()
    areas = {area.name: area for area in image.areas}
    assert set(areas) == {".text", "__jump_table", "__mcount_loc"}
    golden = areas[".text"].golden
    assert golden is not None
    assert golden[5:10] == b"\xe8" + (EXPORTED - TEXT - 10).to_bytes(4, "little", signed=True)
    # Of a per-CPU variable and of an empty section a symbol says the place.
    assert golden[0x28:0x30] == (0x34008).to_bytes(8, "little")
    assert golden[0x30:0x34] == (DATA + 0x100 & 0xFFFFFFFF).to_bytes(4, "little")
    assert areas["__jump_table"].golden is None
    assert not made.unresolved
    assert made.executable() == [(TEXT, 0x40), (0, 8)]
    assert made.data_at("ops") == (DATA + 8, (TEXT + 0x20).to_bytes(8, "little") + bytes(8))
    assert made.data_at("none") is None


def test_sites_come_from_the_modules_own_tables() -> None:
    sites = {site.kind: site for site in loaded().image().sites}
    assert set(sites) == {SiteKind.JUMP, SiteKind.FTRACE}
    assert (sites[SiteKind.JUMP].address, sites[SiteKind.JUMP].target) == (TEXT + 0x10, TEXT + 0x20)
    assert sites[SiteKind.FTRACE].address == TEXT


def look(memory: Memory, image: Image | None = None) -> list[str]:
    found = explain(image or loaded().image(), memory.read, SYMBOLS, lambda: None)
    assert found.altered_total == len(found.altered)
    return [item.symbol for item in found.altered]


def test_only_what_a_site_explains_may_differ() -> None:
    image = loaded().image()
    memory = memory_of(image)
    assert look(memory) == []
    memory.flip(TEXT + 0x10, b"\xe9" + (0x0B).to_bytes(4, "little"))
    assert look(memory) == [], "the jump label, on"
    memory.flip(TEXT + 0x10, b"\xe9" + (0x0C).to_bytes(4, "little"))
    assert look(memory) == ["run+0x10 [m]"], "a jump elsewhere"
    memory.flip(TEXT + 0x10, NOPS[4])
    for at in (5, 0x15, 0x2F, 0x3F):
        was = memory.read(TEXT + at, 1)
        memory.flip(TEXT + at, bytes((was[0] ^ 0x40,)))
        assert len(look(memory)) == 1, f"{at:#x}"
        memory.flip(TEXT + at, was)


def test_a_patch_in_the_making_is_read_again() -> None:
    image = loaded().image()
    memory = memory_of(image)
    memory.flip(TEXT + 0x10, b"\xcc")
    pauses: list[int] = []

    def pause() -> None:
        pauses.append(1)
        if len(pauses) == 3:
            memory.flip(TEXT + 0x10, NOPS[4])

    assert not explain(image, memory.read, SYMBOLS, pause).altered
    assert len(pauses) == 3
    memory.flip(TEXT + 0x10, b"\xcc")
    assert explain(image, memory.read, SYMBOLS, lambda: None).altered, "a trap that stays"


def test_the_digest_of_patching_does_not_depend_on_the_place() -> None:
    def digest(base: int) -> bytes:
        maker = ElfMaker()
        maker.add(".text", b"\xe9\0\0\0\0" + b"\x55" * 11, ALLOC | EXEC)
        maker.add(".return_sites", b"\0\0\0\0", ALLOC)
        code = maker.symbols([("t", 1, 0, 0), ("__x86_return_thunk", 0, 0, 0)])
        maker.relocations(1, code, [(1, 4, 2, -4)])
        maker.relocations(2, code, [(0, 2, 1, 0)])
        places = {".text": base, ".return_sites": base + 0x1000}
        image = ModuleFile("m", maker.file(), places, {"__x86_return_thunk": EXPORTED}.get, OWN.get).image()
        memory = memory_of(image)
        plain = explain(image, memory.read, SYMBOLS, lambda: None)
        memory.flip(base, b"\xc3\xcc\xcc\xcc\xcc")
        patched = explain(image, memory.read, SYMBOLS, lambda: None)
        assert not plain.altered
        assert not patched.altered
        assert plain.patched != patched.patched
        return patched.patched

    assert digest(TEXT) == digest(TEXT + 0x30000)


def test_a_module_without_a_file_is_what_it_is() -> None:
    image = loaded().image()
    memory = memory_of(image)
    jumps = struct.pack("<iiq", TEXT + 0x10 - TABLE, TEXT + 0x20 - TABLE - 4, 0)
    memory.put(TABLE, jumps)
    memory.put(TABLE + 0x100, TEXT.to_bytes(8, "little"))
    places = {".text": TEXT, "end": TEXT + 0x40, "__jump_table": TABLE, "x": TABLE + 16}
    live = live_module("m", places, 0x8000, memory.read, {})
    assert [(area.name, area.length) for area in live.areas] == [(".text", 0x40)]
    assert [(site.kind, site.address) for site in live.sites] == [(SiteKind.JUMP, TEXT + 0x10)]
    memory.flip(TEXT + 0x10, b"\xe9" + (0x0B).to_bytes(4, "little"))
    assert look(memory, live) == []
    memory.flip(TEXT + 0x18, b"\x77")
    assert look(memory, live) == ["run+0x18 [m]"]


# ── The kernel's own image ────────────────────────────────────────────────────────────────────────────

LINKED = 0xFFFFFFFF81000000
SLIDE = 0x1C400000


def kernel() -> bytes:
    maker = ElfMaker()
    text = bytearray(0x100)
    text[0x10:0x15] = NOPS[4]
    text[0x20:0x28] = (LINKED + 0x40).to_bytes(8, "little")
    text[0x30:0x34] = (LINKED + 0x44 & 0xFFFFFFFF).to_bytes(4, "little")
    text[0x38:0x3C] = (0x1000).to_bytes(4, "little")
    maker.add(".text", bytes(text), ALLOC | EXEC, address=LINKED)
    jump = struct.pack("<iiq", 0x10 - 0x1080, 0x40 - 0x1084, 0)
    ro = (b"constants".ljust(0x80, b".") + jump).ljust(0x100, b"\0") + b"more constants"
    maker.add(".rodata", ro, ALLOC | WRITE, address=LINKED + 0x1000)
    maker.add(".data", b"\0" * 16, ALLOC | WRITE, address=LINKED + 0x2000)
    relocations = struct.pack(
        "<8I",
        *(0, LINKED + 0x20 & 0xFFFFFFFF, 0, LINKED + 0x38 & 0xFFFFFFFF, 0, LINKED + 0x30 & 0xFFFFFFFF),
        *(LINKED + 0x2000 & 0xFFFFFFFF, LINKED + 0x2008 & 0xFFFFFFFF),
    )
    return maker.file() + relocations


KERNEL_SYMBOLS = {
    name: LINKED + SLIDE + at
    for name, at in {
        "_text": 0,
        "__start_ro_after_init": 0x1080,
        "__end_ro_after_init": 0x1100,
        "__start___jump_table": 0x1080,
        "__stop___jump_table": 0x1090,
    }.items()
}


def test_the_kernel_is_relocated_by_its_own_table() -> None:
    image = vmlinux_image(kernel(), KERNEL_SYMBOLS, [], [])
    names = [(area.name, area.address - LINKED - SLIDE, area.length) for area in image.areas]
    assert names == [
        (".text", 0, 0x100),
        (".rodata", 0x1000, 0x80),
        ("ro_after_init", 0x1080, 0x80),
        (".rodata after boot's", 0x1100, 14),
    ]
    assert len({name for name, _, _ in names}) == len(names)
    golden = image.areas[0].golden
    assert golden is not None
    assert golden[0x20:0x28] == (LINKED + 0x40 + SLIDE).to_bytes(8, "little")
    assert golden[0x30:0x34] == (LINKED + 0x44 + SLIDE & 0xFFFFFFFF).to_bytes(4, "little")
    assert golden[0x38:0x3C] == (0x1000 - SLIDE & 0xFFFFFFFF).to_bytes(4, "little")
    (site,) = image.sites
    assert (site.kind, site.address, site.target) == (
        SiteKind.JUMP,
        LINKED + SLIDE + 0x10,
        LINKED + SLIDE + 0x40,
    )


def test_a_kernel_without_its_symbols_is_refused() -> None:
    for name in ("_text", "__start_ro_after_init", "__end_ro_after_init"):
        without = {key: value for key, value in KERNEL_SYMBOLS.items() if key != name}
        with pytest.raises(MalformedElfError):
            vmlinux_image(kernel(), without, [], [])


@pytest.mark.parametrize("words", [[], [1], [0], [0, 1, 0, 2, 0, 3, 0]])
def test_other_lists_of_relocations_are_refused(words: list[int]) -> None:
    with pytest.raises(MalformedElfError):
        parse_relocations(struct.pack(f"<{len(words)}I", *words))


def test_lists_of_relocations_with_and_without_the_inverse() -> None:
    def lists(*words: int) -> list[list[int]]:
        return [list(found) for found in parse_relocations(struct.pack(f"<{len(words)}I", *words))]

    assert lists(0, 5, 6, 0, 7, 0, 8) == [[5, 6], [7], [8]]
    assert lists(0, 5, 6, 0, 8) == [[5, 6], [], [8]]


# ── Parsers under attack ──────────────────────────────────────────────────────────────────────────────

BROKEN = (MalformedElfError, tables.MalformedTableError)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_never_escape(seed: int) -> None:
    rng = random.Random(seed)
    for good, make in (
        (module(), lambda data: ModuleFile("m", data, PLACES, {}.get, OWN.get).image()),
        (kernel(), lambda data: vmlinux_image(data, KERNEL_SYMBOLS, [LINKED + SLIDE], [])),
    ):
        for _ in range(300):
            data = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
            if rng.random() < 0.2:
                del data[rng.randrange(len(data)) :]
            with contextlib.suppress(*BROKEN):
                make(bytes(data))


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(*BROKEN):
        parse_elf(data)
    with contextlib.suppress(*BROKEN):
        parse_relocations(data)
    assert isinstance(build_id(data), bytes)
    for reader in (
        lambda: list(tables.jumps(data, 0)),
        lambda: list(tables.calls(data, 0)),
        lambda: list(tables.offsets(data, 0, "x")),
        lambda: list(tables.addresses(data)),
        lambda: list(tables.paravirt(data)),
        lambda: tables.alternatives(data, 0, lambda _at, _size: True),
    ):
        with contextlib.suppress(*BROKEN):
            reader()


def test_alternatives_of_every_kernel() -> None:
    place, spare = 0x1000, 0x9000

    def entry(number: int, size: int) -> bytes:
        here = place + number * size
        head = struct.pack("<ii", 0x500 - here, spare + 4 * number - here - 4)
        return head + {12: b"\5\0\x06\3", 13: b"\5\0\x06\3\0", 14: b"\5\0\1\0\x06\3"}[size]

    for size in (12, 13, 14):
        data = entry(0, size) + entry(1, size)
        found = tables.alternatives(data, place, lambda at, length: spare <= at and at + length <= spare + 8)
        assert [(item.address, item.replacement, item.length, item.new_length) for item in found] == [
            (0x500, spare, 6, 3),
            (0x500, spare + 4, 6, 3),
        ], size
        with pytest.raises(tables.MalformedTableError):
            tables.alternatives(data[:-1], place, lambda at, length: spare <= at < spare + 8)


def test_build_ids() -> None:
    def note(kind: int, name: bytes, value: bytes) -> bytes:
        pad = bytes(-len(value) % 4)
        return struct.pack("<III", len(name), len(value), kind) + name + value + pad

    linux = note(0x100, b"Linux\0\0\0", b"abc")
    assert build_id(linux + note(3, b"GNU\0", b"i" * 20)) == b"i" * 20
    assert build_id(linux) == b""
    assert build_id((linux + note(3, b"GNU\0", b"i" * 20))[:-1]) == b""


def test_modules_are_found_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "lib/modules/6.1"
    folder.mkdir(parents=True)
    (folder / "kvm-amd.ko").write_bytes(b"\x7fELF")
    (folder / "modules.dep").write_text("kvm-amd.ko: kvm.ko\nextra/a.ko.zst:\n../../x.ko:\nnonsense\n")
    files = PackageFiles("6.1", tmp_path)
    found = files.module("kvm_amd")
    assert found is not None
    assert found.path == "/lib/modules/6.1/kvm-amd.ko"
    assert files.module("a") is None
    assert files.module("x") is None
    assert files.kernel() is None
    assert set(parse_dep((folder / "modules.dep").read_text(), folder)) == {"kvm_amd", "a"}


def test_only_living_modules_count() -> None:
    text = (
        "kvm 1146880 1 kvm_amd, Live 0xffffffffc0371000\n"
        "loop 32768 0 - Unloading 0xffffffffc0300000 (OE)\n"
        "fuse 176128 1 - Live 0xffffffffc0200000\n"
    )
    assert [(item.name, item.size, item.address) for item in parse_modules(text)] == [
        ("kvm", 1146880, 0xFFFFFFFFC0371000),
        ("fuse", 176128, 0xFFFFFFFFC0200000),
    ]
    for broken in ("kvm\n", "kvm x 1 - Live 0x1\n", "kvm 1 1 - Live zz\n", "\n"):
        with pytest.raises(ValueError, match=r"modules|literal"):
            parse_modules(broken)


def test_a_module_that_was_loaded_again_is_another(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/modules").write_text("loop 1 0 - Live 0x1000\ngone 1 0 - Live 0x2000\n")
    folder = tmp_path / "sys/module/loop"
    folder.mkdir(parents=True)
    (first,) = living(tmp_path)
    assert (first.name, first.address) == ("loop", 0x1000)
    folder.rename(tmp_path / "sys/old")
    folder.mkdir()
    (second,) = living(tmp_path)
    assert second != first
