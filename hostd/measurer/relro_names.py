"""Names for what differs in relocated data: the slot, what it should point to, and what it points to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from hostd.core.reading_relro import MAX_VALUES, AlteredSlot, Value
from hostd.core.reference import DELETED
from hostd.measurer.elf import MalformedElfError
from hostd.measurer.elf_relocations import NAMES, R_RELATIVE, WORD

if TYPE_CHECKING:
    from hostd.measurer.files import Registry
    from hostd.measurer.linking import Linking
    from hostd.measurer.relro_compare import Odd
    from hostd.measurer.relro_modules import Shape

MAX_LABEL: Final = 256
MAX_NAME: Final = 4096
WRITABLE: Final = "writable"


class Names:
    """Names slots and values."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def slot(self, linking: Linking, shape: Shape, odd: Odd) -> AlteredSlot:
        """Everything about one word that differs."""
        module = linking.modules[odd.module]
        own = odd.address - shape.loaded[odd.module].base
        offset, place = self._place(linking, odd.module, own)
        if odd.item is not None:
            relocation, symbol = NAMES[odd.item.type], linking.name_of(odd.module, odd.item)
        else:
            plain = not module.relocated.size or module.relocated.is_plain(own)
            relocation, symbol = NAMES[0 if plain else R_RELATIVE], ""
        return AlteredSlot(
            address=odd.address,
            name=module.path[:MAX_NAME],
            file_offset=offset,
            place=place,
            symbol=symbol,
            relocation=relocation,
            expected=tuple(self.value(linking, shape, item) for item in odd.expected[:MAX_VALUES]),
            seen=self.value(linking, shape, odd.seen),
            reason=odd.reason,
        )

    def writable(self, linking: Linking, shape: Shape, number: int, region: memoryview) -> AlteredSlot:
        """A module whose protected region is writable."""
        module = linking.modules[number]
        start = module.relocated.start
        offset, place = self._place(linking, number, start)
        first = self.value(linking, shape, int.from_bytes(region[:WORD], "little"))
        address = shape.loaded[number].base + start
        name = module.path[:MAX_NAME]
        return AlteredSlot(address, name, offset, place, "", NAMES[0], (first,), first, WRITABLE)

    def value(self, linking: Linking, shape: Shape, value: int) -> Value:
        """A word and what it points to."""
        for number, loaded in enumerate(shape.loaded):
            module = linking.modules[number]
            for load in module.image.loads:
                if loaded.base + load.address <= value < loaded.base + load.address + load.size:
                    _, place = self._place(linking, number, value - loaded.base)
                    file = os.path.basename(module.path.removesuffix(DELETED))
                    return Value(value, f"{place or hex(value - loaded.base)} in {file}"[:MAX_LABEL])
        if shape.vdso is not None and shape.vdso[0] <= value < shape.vdso[1]:
            return Value(value, f"[vdso]+{value - shape.vdso[0]:#x}")
        if any(start <= value < end for start, end in shape.execs):
            return Value(value, "executable memory of no loaded file")
        return Value(value, "no loaded file")

    def _place(self, linking: Linking, number: int, own: int) -> tuple[int, str]:
        """File offset and symbol or section of an address of a module's own."""
        module = linking.modules[number]
        try:
            offset = module.image.offset_of(own)
        except MalformedElfError:
            return 0, ".bss"
        file = self._registry.get(module.number)
        return offset, "" if file is None else file.place(offset)[:MAX_LABEL]
