"""Known answers for every kind of patch site; each byte string is one that a kernel 6.1 has or could have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.core.patchsites import (
    NOPS,
    Site,
    SiteKind,
    branch,
    differences,
    is_nops,
    settle,
)

HERE = 0xFFFFFFFF81000000
FUNCTION = HERE + 0x2000


class World:
    """Functions by address."""

    def __init__(self, **functions: int) -> None:
        self._names = {address: name for name, address in functions.items()}

    def function(self, address: int) -> str:
        return self._names.get(address, "")


WORLD = World(
    target=FUNCTION,
    __x86_indirect_thunk_rax=HERE + 0x3000,
    __x86_indirect_thunk_r11=HERE + 0x3100,
    __x86_return_thunk=HERE + 0x3200,
    srso_return_thunk=HERE + 0x3300,
    ftrace_caller=HERE + 0x3400,
    evil=HERE + 0x3500,
)


def to(address: int, *, opcode: int = 0xE8, at: int = HERE) -> bytes:
    return bytes((opcode,)) + (address - at - 5).to_bytes(4, "little", signed=True)


def word(
    kind: SiteKind,
    compiled: bytes,
    seen: bytes,
    *,
    target: int = 0,
    variants: tuple[tuple[int, bytes], ...] = (),
) -> str:
    return settle(Site(kind, HERE, compiled, target, variants), seen, WORLD)


NOP5 = NOPS[4]
CASES = [
    # A jump label is one of two things, whatever the other jumps in the kernel are.
    (SiteKind.JUMP, NOP5, to(FUNCTION, opcode=0xE9), {"target": FUNCTION}, "on"),
    (SiteKind.JUMP, to(FUNCTION, opcode=0xE9), NOP5, {"target": FUNCTION}, "off"),
    (SiteKind.JUMP, NOP5, to(FUNCTION + 1, opcode=0xE9), {"target": FUNCTION}, ""),
    (SiteKind.JUMP, NOP5, to(FUNCTION), {"target": FUNCTION}, ""),
    (SiteKind.JUMP, NOP5, b"\x0f\x1f\x44\x00\x01", {"target": FUNCTION}, ""),
    (SiteKind.JUMP, b"\x66\x90", b"\xeb\x10", {"target": HERE + 0x12}, "on"),
    (SiteKind.JUMP, b"\x66\x90", b"\xeb\x11", {"target": HERE + 0x12}, ""),
    (SiteKind.JUMP, b"\x66\x90", b"\xeb\xfe", {"target": FUNCTION}, ""),
    (SiteKind.JUMP, NOP5, b"\xcc\x1f\x44\x00\x00", {"target": FUNCTION}, ""),
    # A static call leads to where a function starts.
    (SiteKind.CALL, to(HERE + 0x100), to(FUNCTION), {}, "calls target"),
    (SiteKind.CALL, to(HERE + 0x100), to(FUNCTION + 4), {}, ""),
    (SiteKind.CALL, to(HERE + 0x100), NOP5, {}, "nothing"),
    (SiteKind.CALL, to(HERE + 0x100), b"\x66\x66\x48\x31\xc0", {}, "returns 0"),
    (SiteKind.CALL, to(HERE + 0x100), b"\x2e\x2e\x2e\x31\xc0", {}, "returns 0"),
    (SiteKind.CALL, to(HERE + 0x100), to(FUNCTION, opcode=0xE9), {}, ""),
    (SiteKind.CALL, to(HERE + 0x100), b"\xc3\xcc\xcc\xcc\xcc", {}, ""),
    (SiteKind.CALL, to(HERE + 0x100, opcode=0xE9), to(FUNCTION, opcode=0xE9), {}, "jumps to target"),
    (SiteKind.CALL, to(HERE + 0x100, opcode=0xE9), b"\xc3\xcc\xcc\xcc\xcc", {}, "returns"),
    (SiteKind.CALL, to(HERE + 0x100, opcode=0xE9), NOP5, {}, ""),
    (
        SiteKind.TRAMPOLINE,
        b"\xe9\0\0\0\0\x0f\xb9\xcc",
        to(FUNCTION, opcode=0xE9) + b"\x0f\xb9\xcc",
        {},
        "jumps to target",
    ),
    (SiteKind.TRAMPOLINE, b"\xe9\0\0\0\0\x0f\xb9\xcc", to(FUNCTION, opcode=0xE9) + b"\x0f\xb9\xcd", {}, ""),
    (SiteKind.TRAMPOLINE, b"\xe9\0\0\0\0\x0f\xb9\xcc", b"\xc3\xcc\xcc\xcc\xcc\x0f\xb9\xcc", {}, "returns"),
    (SiteKind.TRAMPOLINE, b"\xe9\0\0\0\0\x0f\xb9\xcc", b"\xc3\xcc\xcc\xcc\xcc\x90\x90\x90", {}, ""),
    # ftrace calls its own entry code and nothing else.
    (SiteKind.FTRACE, to(HERE + 0x100), NOP5, {}, "off"),
    (SiteKind.FTRACE, NOP5, to(HERE + 0x3400), {}, "calls ftrace_caller"),
    (SiteKind.FTRACE, NOP5, to(HERE + 0x3500), {}, ""),
    (SiteKind.FTRACE, NOP5, to(HERE + 0x3400, opcode=0xE9), {}, ""),
    (SiteKind.FTRACE_CALL, to(HERE + 0x100), to(FUNCTION), {}, "e8 target"),
    (SiteKind.FTRACE_CALL, to(HERE + 0x100), to(FUNCTION + 1), {}, ""),
    # Boot.
    (SiteKind.RETURN, to(HERE + 0x3200, opcode=0xE9), b"\xc3\xcc\xcc\xcc\xcc", {}, "plain"),
    (
        SiteKind.RETURN,
        to(HERE + 0x3200, opcode=0xE9),
        to(HERE + 0x3300, opcode=0xE9),
        {},
        "srso_return_thunk",
    ),
    (SiteKind.RETURN, to(HERE + 0x3200, opcode=0xE9), to(HERE + 0x3500, opcode=0xE9), {}, ""),
    (SiteKind.RETPOLINE, to(HERE + 0x3000), b"\xff\xd0\x0f\x1f\x00", {}, "plain"),
    (SiteKind.RETPOLINE, to(HERE + 0x3000), b"\x0f\xae\xe8\xff\xd0", {}, "lfence"),
    (SiteKind.RETPOLINE, to(HERE + 0x3000), b"\xff\xd1\x0f\x1f\x00", {}, ""),
    (SiteKind.RETPOLINE, to(HERE + 0x3000), b"\xff\xe0\xcc\xcc\xcc", {}, ""),
    (SiteKind.RETPOLINE, to(HERE + 0x3100, opcode=0xE9), b"\x41\xff\xe3\xcc\xcc", {}, "plain"),
    (SiteKind.RETPOLINE, to(HERE + 0x3500), b"\xff\xd0\x0f\x1f\x00", {}, ""),
    (SiteKind.LOCK, b"\xf0", b"\x3e", {}, "none"),
    (SiteKind.LOCK, b"\xf0", b"\x90", {}, ""),
    (SiteKind.PARAVIRT, b"\xff\x15\0\0\0\0", to(FUNCTION) + b"\x90", {}, "e8 target"),
    (SiteKind.PARAVIRT, b"\xff\x15\0\0\0\0", b"\x48\x89\xf8\x0f\x1f\x00", {}, "identity"),
    (SiteKind.PARAVIRT, b"\xff\x15\0\0\0\0", NOPS[5], {}, "nothing"),
    (SiteKind.PARAVIRT, b"\xff\x15\0\0\0\0", to(FUNCTION + 1) + b"\x90", {}, ""),
    (SiteKind.PARAVIRT, b"\xff\x15\0\0\0\0", b"\xff\x15\1\0\0\0", {}, ""),
    (
        SiteKind.ALTERNATIVE,
        b"\x90" * 3,
        b"\x0f\x01\xcb",
        {"variants": ((HERE + 0x9000, b"\x0f\x01\xcb"),)},
        "variant 0",
    ),
    (
        SiteKind.ALTERNATIVE,
        b"\x90" * 3,
        b"\x0f\x01\xca",
        {"variants": ((HERE + 0x9000, b"\x0f\x01\xcb"),)},
        "",
    ),
    (SiteKind.ALTERNATIVE, b"\x90" * 3, b"\x0f\x1f\x00", {"variants": ()}, "compiled"),
    (
        SiteKind.ALTERNATIVE,
        b"\x90" * 6,
        b"\xfa" + NOPS[4],
        {"variants": ((HERE + 0x9000, b"\xfa"),)},
        "variant 0",
    ),
    (
        SiteKind.ALTERNATIVE,
        b"\x90" * 6,
        b"\xfa\xcc\x1f\x44\x00\x00",
        {"variants": ((HERE + 0x9000, b"\xfa"),)},
        "",
    ),
]


@pytest.mark.parametrize(("kind", "compiled", "seen", "more", "wanted"), CASES)
def test_known_answers(
    kind: SiteKind, compiled: bytes, seen: bytes, more: dict[str, object], wanted: str
) -> None:
    assert word(kind, compiled, seen, **more) == wanted  # type: ignore[arg-type]


def test_a_moved_call_keeps_its_target_and_no_other() -> None:
    place = HERE + 0x9000
    variants = ((place, to(FUNCTION, at=place)),)
    assert word(SiteKind.ALTERNATIVE, b"\x90" * 5, to(FUNCTION), variants=variants) == "variant 0"
    assert word(SiteKind.ALTERNATIVE, b"\x90" * 5, to(FUNCTION + 1), variants=variants) == ""
    assert word(SiteKind.ALTERNATIVE, b"\x90" * 5, to(FUNCTION, at=place), variants=variants) == ""


def test_a_moved_jump_may_become_short() -> None:
    place = HERE + 0x9000
    variants = ((place, to(HERE + 0x20, opcode=0xE9, at=place)),)
    assert word(SiteKind.ALTERNATIVE, b"\x90" * 5, b"\xeb\x1e\x0f\x1f\x00", variants=variants) == "variant 0"
    assert word(SiteKind.ALTERNATIVE, b"\x90" * 5, b"\xeb\x1f\x0f\x1f\x00", variants=variants) == ""


def test_nops_are_nops_and_nothing_else() -> None:
    for nop in NOPS:
        assert is_nops(nop)
        for at in range(len(nop)):
            changed = nop[:at] + bytes((nop[at] ^ 0x80,)) + nop[at + 1 :]
            assert not is_nops(changed), changed.hex()
    assert is_nops(b"\xeb\x03\xcc\xcc\xcc")
    assert not is_nops(b"\xeb\x02\xcc\xcc\xcc")
    assert not is_nops(b"\xeb\x03\xcc\x31\xcc")


@given(st.sampled_from(list(SiteKind)), st.binary(min_size=1, max_size=8), st.binary(max_size=9))
def test_nothing_but_a_word_comes_out(kind: SiteKind, compiled: bytes, seen: bytes) -> None:
    assert isinstance(word(kind, compiled, seen, target=FUNCTION), str)
    assert word(kind, compiled, compiled) == "compiled"


@given(st.binary(min_size=5, max_size=5), st.sampled_from([SiteKind.JUMP, SiteKind.FTRACE]))
def test_random_bytes_are_never_legal(seen: bytes, kind: SiteKind) -> None:
    legal = {NOP5, to(FUNCTION, opcode=0xE9), to(HERE + 0x3400)}
    if seen not in legal:
        assert word(kind, NOP5, seen, target=FUNCTION) == ""


@given(st.binary(max_size=2000), st.lists(st.integers(0, 1999)), st.integers(1, 50))
def test_differences_are_found_in_order(data: bytes, places: list[int], limit: int) -> None:
    other = bytearray(data)
    for place in places:
        if place < len(data):
            other[place] = data[place] ^ 1
    wanted = sorted({place for place in places if place < len(data)})
    assert list(differences(data, bytes(other), limit=limit)) == wanted[:limit]


def test_branches() -> None:
    assert branch(to(FUNCTION), HERE) == FUNCTION
    assert branch(b"\xe8\xff\xff\xff\xff", 0) == 4
    assert branch(b"\x90" * 5, HERE) is None
    assert branch(b"\xe8\0\0", HERE) is None
