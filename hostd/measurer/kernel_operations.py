"""Writable tables of operations that must not change: which there are, and where they may lead (pure).

Each slot is 8 bytes. Where the module's file gives a slot it must hold just that; where the module fills it
in while it starts, a small number, a function's start, or data of the kernel or a module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.core.reading_kernel import KernelAltered

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.platform.kallsyms import Symbols

_LINKS: Final = ((24, 16),)
"""struct miscdevice: its place in the list of all such devices, which others move."""
_HEAP: Final = frozenset({"kvm_dev", "vhost_vsock_misc", "vhost_net_misc"})
"""Tables with pointers to objects that were allocated (struct miscdevice: this_device)."""
OPERATIONS: Final[dict[str, tuple[tuple[str, tuple[tuple[int, int], ...]], ...]]] = {
    "kvm": (
        ("kvm_x86_ops", ()),
        ("kvm_pmu_ops", ()),
        ("kvm_chardev_ops", ()),
        ("kvm_preempt_ops", ()),
        ("kvm_dev", _LINKS),
    ),
    "kvm_amd": (("svm_nested_ops", ()),),
    "kvm_intel": (("vmx_nested_ops", ()),),
    "vhost_vsock": (("vhost_transport", ()), ("vhost_vsock_misc", _LINKS)),
    "vhost_net": (("vhost_net_misc", _LINKS),),
}
"""Module → (symbol, ignored ranges as (offset, length))."""
ANY: Final = "a function of the kernel or a module"
_SMALL: Final = 1 << 32


class Slot(NamedTuple):
    """One slot: what it holds, in words that do not depend on where the kernel is loaded."""

    offset: int
    value: int
    leads: str


def without(data: bytes, ignored: tuple[tuple[int, int], ...]) -> bytes:
    """`data` with zeros for what is ignored."""
    made = bytearray(data)
    for offset, length in ignored:
        made[offset : offset + length] = bytes(len(made[offset : offset + length]))
    return bytes(made)


def slots(data: bytes, symbols: Symbols, inside: Callable[[int], bool]) -> list[Slot]:
    """All slots of a table; `inside(address)`: whether an address is of the kernel or a loaded module."""
    found: list[Slot] = []
    for offset in range(0, len(data) - 7, 8):
        value = int.from_bytes(data[offset : offset + 8], "little")
        if value < _SMALL:
            leads = str(value)
        elif inside(value):
            leads = symbols.function(value) or symbols.near(value) or "memory of the kernel"
        else:
            leads = "allocated memory"
        found.append(Slot(offset, value, leads))
    return found


def wrong_slots(
    table: str, golden: bytes, seen: bytes, address: int, symbols: Symbols, inside: Callable[[int], bool]
) -> list[KernelAltered]:
    """Slots that hold what they should not at first sight, with image number 0."""
    found: list[KernelAltered] = []
    expected = slots(golden, symbols, inside)
    for slot, wanted in zip(slots(seen, symbols, inside), expected, strict=True):
        if wanted.value:
            # An owner or a limit may be set beside a function, never instead of one.
            good = slot.value == wanted.value or wanted.value < _SMALL > slot.value
        elif slot.leads == "allocated memory":
            good = table in _HEAP
        else:
            good = slot.value < _SMALL or not _amid_function(slot, symbols)
        if not good:
            expects = wanted.leads if wanted.value else ANY
            found.append(altered_slot(table, slot, expects, address, golden, seen))
    return found


def _amid_function(slot: Slot, symbols: Symbols) -> bool:
    """Whether a slot leads into code, but not to where a function starts."""
    return not symbols.function(slot.value) and symbols.is_code(slot.value)


def altered_slot(
    table: str, slot: Slot, expects: str, address: int, expected: bytes, seen: bytes
) -> KernelAltered:
    """A finding's facts for one slot; `expects` says in words where it should lead."""
    return KernelAltered(
        image=0,
        area=f"table {table}",
        symbol=f"{table}+{slot.offset:#x}",
        address=address + slot.offset,
        expected=expected[slot.offset : slot.offset + 8],
        seen=seen[slot.offset : slot.offset + 8],
        expects=expects[:128],
        leads=f"{slot.leads} ({slot.value:#x})"[:128],
    )


def gates(table: bytes, symbols: Symbols, address: int) -> list[KernelAltered]:
    """Present entries of the interrupt table that lead to no function (Intel SDM 3A, 6.14.1)."""
    found: list[KernelAltered] = []
    for at in range(0, len(table) - 15, 16):
        low = int.from_bytes(table[at : at + 2], "little")
        middle = int.from_bytes(table[at + 6 : at + 8], "little")
        high = int.from_bytes(table[at + 8 : at + 12], "little")
        target = high << 32 | middle << 16 | low
        # Handlers of device interrupts are entries of one array of code, each without a name.
        if table[at + 5] & 0x80 and not symbols.is_code(target):
            slot = Slot(at, target, symbols.near(target) or "no symbol")
            found.append(altered_slot("idt_table", slot, ANY, address, table, table))
    return found
