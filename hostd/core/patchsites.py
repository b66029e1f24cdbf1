"""Which bytes may stand at a patch site of an x86-64 kernel (pure).

A kernel patches its own text: at boot for the processor it finds, and while it runs where a jump label,
static call or function hook is switched. Every such site is in a table of the image, with what it was
compiled as. `settle` takes the compiled bytes, the bytes that are there, and says what the site is now, in
a form that does not depend on where the kernel was loaded; or that the bytes are none of the legal ones.

Sources (Linux 6.1 to 6.12): arch/x86/kernel/{jump_label,static_call,alternative,ftrace,paravirt}.c,
arch/x86/include/asm/{nops,jump_label,static_call}.h.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class SiteKind(enum.StrEnum):
    """What patches a site."""

    JUMP = "jump-label"
    CALL = "static-call"
    TRAMPOLINE = "static-call-trampoline"
    FTRACE = "ftrace"
    FTRACE_CALL = "ftrace-call"
    """The calls inside ftrace's own entry code, which lead to what traces."""
    ALTERNATIVE = "alternative"
    PARAVIRT = "paravirt"
    RETPOLINE = "retpoline"
    RETURN = "return"
    LOCK = "smp-lock"


RUNTIME: Final = frozenset(
    {SiteKind.JUMP, SiteKind.CALL, SiteKind.TRAMPOLINE, SiteKind.FTRACE, SiteKind.FTRACE_CALL}
)
"""Kinds that legally change while the kernel runs; all others are patched once, at boot or loading."""

NOPS: Final = (
    b"\x90",
    b"\x66\x90",
    b"\x0f\x1f\x00",
    b"\x0f\x1f\x40\x00",
    b"\x0f\x1f\x44\x00\x00",
    b"\x66\x0f\x1f\x44\x00\x00",
    b"\x0f\x1f\x80\x00\x00\x00\x00",
    b"\x0f\x1f\x84\x00\x00\x00\x00\x00",
    b"\x66\x0f\x1f\x84\x00\x00\x00\x00\x00",
    b"\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00",
    b"\x66\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00",
)
"""By length, from 1 byte on."""
NOP5: Final = NOPS[4]
RETURN5: Final = b"\xc3\xcc\xcc\xcc\xcc"
_XOR5: Final = (b"\x66\x66\x48\x31\xc0", b"\x2e\x2e\x2e\x31\xc0")
"""`xor %eax, %eax` in five bytes: a static call that only returns 0."""
_CALL, _JMP, _JMP8, _INT3 = 0xE8, 0xE9, 0xEB, 0xCC
_LFENCE: Final = b"\x0f\xae\xe8"
_MASK64: Final = (1 << 64) - 1


class World(Protocol):
    """What surrounds a site."""

    def function(self, address: int) -> str:
        """Name of the function that starts at `address`, with its module; empty: none does."""


@dataclass(frozen=True, slots=True)
class Site:
    """One patch site. `compiled` are the bytes of the image file, relocated to where it runs."""

    kind: SiteKind
    address: int
    compiled: bytes
    target: int = 0
    """JUMP: where it leads when it is on."""
    variants: tuple[tuple[int, bytes], ...] = ()
    """ALTERNATIVE: (address, bytes) of each replacement."""


def is_nops(data: bytes) -> bool:
    """Whether bytes are nothing but instructions that do nothing."""
    at, size = 0, len(data)
    while at < size:
        for nop in reversed(NOPS):
            if data.startswith(nop, at):
                at += len(nop)
                break
        else:
            # A long run is jumped over, and filled with traps or one-byte nops behind the jump.
            rest = data[at:]
            if len(rest) < 2 or rest[0] != _JMP8 or rest[1] != len(rest) - 2:
                return False
            return not rest[2:].strip(b"\xcc\x90")
    return True


def branch(data: bytes, address: int) -> int | None:
    """Target of the 5-byte call or jump that stands at `address`; None: it is none."""
    if len(data) < 5 or data[0] not in (_CALL, _JMP):
        return None
    return (address + 5 + int.from_bytes(data[1:5], "little", signed=True)) & _MASK64


def settle(site: Site, seen: bytes, world: World) -> str:
    """What a site is now: a short word, equal wherever the kernel is loaded; empty if `seen`, as many
    bytes as `site.compiled`, is none of its legal forms."""
    if len(seen) != len(site.compiled):
        return ""
    if seen == site.compiled:
        return "compiled"
    return _RULES[site.kind](site, seen, world)


def _jump(site: Site, seen: bytes, _world: World) -> str:
    size = len(site.compiled)
    if seen == NOPS[size - 1]:
        return "off"
    distance = site.target - site.address - size
    if size == 2:
        on = bytes((_JMP8, distance & 0xFF)) if -128 <= distance < 128 else b""
    else:
        on = bytes((_JMP,)) + (distance & 0xFFFFFFFF).to_bytes(4, "little")
    return "on" if seen == on else ""


def _call(site: Site, seen: bytes, world: World) -> str:
    size = len(site.compiled)
    if size == 6:
        return _conditional(site, seen, world)
    called = _named(site, seen, world)
    if site.compiled[0] == _CALL:
        if seen == NOP5:
            return "nothing"
        if seen in _XOR5:
            return "returns 0"
        return f"calls {called}" if seen[0] == _CALL and called else ""
    if seen == RETURN5:
        return "returns"
    return f"jumps to {called}" if seen[0] == _JMP and called else ""


def _conditional(site: Site, seen: bytes, world: World) -> str:
    """A tail call behind a condition: 0f 8x and a distance."""
    if seen[:2] != site.compiled[:2]:
        return ""
    target = site.address + 6 + int.from_bytes(seen[2:], "little", signed=True)
    called = world.function(target & _MASK64)
    return f"jumps to {called}" if called else ""


def _trampoline(site: Site, seen: bytes, world: World) -> str:
    if seen[:5] == RETURN5 and seen[5:] == site.compiled[5:]:
        return "returns"
    called = _named(site, seen, world)
    if seen[0] == _JMP and called and seen[5:] == site.compiled[5:]:
        return f"jumps to {called}"
    return ""


FTRACE_ENTRIES: Final = frozenset({"ftrace_caller", "ftrace_regs_caller", "__fentry__"})
FTRACE_TRAMPOLINE: Final = "ftrace_trampoline [__builtin__ftrace]"
"""How the kernel's symbols name entry code that ftrace made while running."""


def is_ftrace_entry(name: str) -> bool:
    return name in FTRACE_ENTRIES or name == FTRACE_TRAMPOLINE


def _ftrace(site: Site, seen: bytes, world: World) -> str:
    if seen == NOP5:
        return "off"
    called = _named(site, seen, world)
    return f"calls {called}" if seen[0] == _CALL and is_ftrace_entry(called) else ""


def _ftrace_call(site: Site, seen: bytes, world: World) -> str:
    if seen == NOP5:
        return "off"
    called = _named(site, seen, world)
    return f"{seen[0]:02x} {called}" if seen[0] in (_CALL, _JMP) and called else ""


def _named(site: Site, seen: bytes, world: World) -> str:
    target = branch(seen, site.address)
    return "" if target is None else world.function(target)


def _paravirt(site: Site, seen: bytes, world: World) -> str:
    """A call through pv_ops, made a direct call, one inline instruction or nothing."""
    if is_nops(seen):
        return "nothing"
    called = _named(site, seen, world)
    if called and is_nops(seen[5:]):
        return f"{seen[0]:02x} {called}"
    if seen[:3] == b"\x48\x89\xf8" and is_nops(seen[3:]):
        return "identity"
    return "traps" if seen[:2] == b"\x0f\x0b" and is_nops(seen[2:]) else ""


def _retpoline(site: Site, seen: bytes, world: World) -> str:
    """A call or jump of a thunk for one register, made the plain instruction for the same register."""
    target = branch(site.compiled[-5:], site.address + len(site.compiled) - 5)
    thunk = "" if target is None else world.function(target)
    register = thunk.rpartition("_")[2]
    if not thunk.startswith("__x86_indirect_") or register not in _REGISTERS:
        return ""
    number = _REGISTERS.index(register)
    prefix = b"\x41" if number >= 8 else b""
    opcode = site.compiled[-5]
    plain = prefix + bytes((0xFF, (0xD0 if opcode == _CALL else 0xE0) | number & 7))
    for start, word in ((_LFENCE + plain, "lfence"), (plain, "plain")):
        rest = seen[len(start) :]
        if seen.startswith(start) and (is_nops(rest) or (opcode == _JMP and not rest.strip(b"\xcc"))):
            return word
    other = _named(site, seen, world)
    if seen[0] == opcode and other.startswith("__x86_indirect_") and other.endswith(f"_{register}"):
        return other
    return ""


_REGISTERS: Final = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""By their numbers in an instruction."""


def _return(site: Site, seen: bytes, world: World) -> str:
    if seen == RETURN5:
        return "plain"
    called = _named(site, seen, world)
    return called if seen[0] == _JMP and called.endswith("return_thunk") else ""


def _lock(_site: Site, seen: bytes, _world: World) -> str:
    """The LOCK prefix, or a DS prefix of no effect on a machine with one processor."""
    return {b"\xf0": "lock", b"\x3e": "none"}.get(seen, "")


def _alternative(site: Site, seen: bytes, _world: World) -> str:
    if _fits(site.compiled, seen, 0, site.address):
        return "compiled"
    for number, (address, code) in enumerate(site.variants):
        padded = code + b"\x90" * (len(seen) - len(code))
        if len(padded) == len(seen) and _fits(padded, seen, address - site.address, site.address):
            return f"variant {number}"
    return ""


def _fits(code: bytes, seen: bytes, moved: int, address: int) -> bool:
    """Whether `seen` is `code` after it was moved: `moved` is what its branches' distances grow by. Runs of
    one-byte nops may have become long ones, and a jump its short form."""
    at, size = 0, len(code)
    while at < size:
        if code[at] == 0x90:
            end = at
            while end < size and code[end] == 0x90:
                end += 1
            if not is_nops(seen[at:end]):
                return False
            at = end
            continue
        step = _moved_branch(code, seen, at, moved)
        if step:
            at += step
        elif code[at] != seen[at] or (at == 0 and branch(code, address) is not None):
            # Only of the first byte is it sure that it is an instruction's, and no operand.
            return False
        else:
            at += 1
    return True


def _moved_branch(code: bytes, seen: bytes, at: int, moved: int) -> int:
    """Bytes of a branch at `at` whose distance was adjusted, 0 if there is none."""
    opcode = code[at]
    if opcode in (_CALL, _JMP):
        head = 1
    elif opcode == 0x0F and at + 1 < len(code) and code[at + 1] & 0xF0 == 0x80:
        head = 2
    else:
        return 0
    end = at + head + 4
    if end > len(code):
        return 0
    distance = int.from_bytes(code[at + head : end], "little", signed=True) + moved
    wanted = (distance & 0xFFFFFFFF).to_bytes(4, "little")
    if seen[at:end] == code[at : at + head] + wanted:
        return end - at
    short = distance + 3
    if opcode == _JMP and -128 <= short < 128 and seen[at : at + 2] == bytes((_JMP8, short & 0xFF)):
        return end - at if is_nops(seen[at + 2 : end]) else 0
    return 0


_RULES: Final = {
    SiteKind.JUMP: _jump,
    SiteKind.CALL: _call,
    SiteKind.TRAMPOLINE: _trampoline,
    SiteKind.FTRACE: _ftrace,
    SiteKind.FTRACE_CALL: _ftrace_call,
    SiteKind.ALTERNATIVE: _alternative,
    SiteKind.PARAVIRT: _paravirt,
    SiteKind.RETPOLINE: _retpoline,
    SiteKind.RETURN: _return,
    SiteKind.LOCK: _lock,
}


def differences(expected: bytes, seen: bytes, *, limit: int) -> Iterator[int]:
    """Offsets where two byte strings of one length differ, the first `limit` of them."""
    found = 0
    for start in range(0, len(expected), 256):
        if expected[start : start + 256] == seen[start : start + 256]:
            continue
        for at in range(start, min(start + 256, len(expected))):
            if expected[at] != seen[at]:
                yield at
                found += 1
                if found >= limit:
                    return
