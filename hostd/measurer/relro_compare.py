"""Compares a process's relocated data with what recomputation gives, word by word (pure).

Every word of the protected regions, and every slot outside them, has its one value, or is one of these:
- `lazy`: a slot not bound yet holds the address of its stub; bound, that of its symbol;
- `ifunc`: a resolver chose it: 0, or code of the resolver's own file or the vDSO, and the same in every slot
  that this resolver answers for;
- `tls`: module numbers, offsets and descriptors that the dynamic linker gives out: small numbers, or its
  own code;
- `linker`: words that the dynamic linker keeps in its own protected data (`_rtld_global_ro`), GOT[1] and
  GOT[2], DT_DEBUG, and data copied by COPY: never an address of code but its own, the vDSO's, or of the few
  functions of other files that it is known to keep (`linking.SERVED`);
- another definition of the same symbol, by preloading.
All but `lazy` are pinned: what was seen first has to stay. At most `MAX_PINNED` words are.
"""

from __future__ import annotations

import bisect
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.measurer.elf_image import PF_X
from hostd.measurer.elf_relocations import R_DTPMOD64, R_TLSDESC, R_TPOFF64, WORD
from hostd.measurer.linking import Slot

if TYPE_CHECKING:
    from hostd.measurer.elf_relocations import Named
    from hostd.measurer.linking import Linking, Module

MAX_PINNED: Final = 16384
"""Of one process; QEMU has some 900, with 52 files."""
MAX_ODD: Final = 4096
"""Differing words that are looked at; over it only their number is told."""
_SMALL: Final = 1 << 31
_CHUNK: Final = 4096
VDSO_MODULE: Final = -2


class Code(NamedTuple):
    """Executable memory of a module (its position), or of the vDSO."""

    start: int
    end: int
    module: int


class Odd(NamedTuple):
    """A word that differs and is not explained. `module`: position; `address`: in the process."""

    module: int
    address: int
    seen: int
    expected: tuple[int, ...]
    reason: str
    item: Named | None


@dataclass(slots=True)
class Known:
    """What only the process knows, while it is compared."""

    words: dict[int, int]
    """Address → value."""
    resolved: dict[int, int]
    """Address of a resolver → the function it chose."""
    done: frozenset[int]
    """Load addresses of the modules that were compared: no word of theirs becomes special any more."""


class Pins:
    """The same, as it was first seen, packed: 13 kB for a QEMU."""

    def __init__(self) -> None:
        self._words = array("Q")
        self._resolved = array("Q")
        self._done: frozenset[int] = frozenset()

    def known(self) -> Known:
        return Known(_unpacked(self._words), _unpacked(self._resolved), self._done)

    def keep(self, known: Known, bases: list[int]) -> None:
        """Takes over what a comparison found that had no fault."""
        self._words, self._resolved = _packed(known.words), _packed(known.resolved)
        self._done = known.done | frozenset(bases)


@dataclass(slots=True)
class Outcome:
    """What one comparison found."""

    odd: list[Odd] = field(default_factory=list)
    total: int = 0
    pinned: list[int] = field(default_factory=list)
    """Per module."""
    words: list[int] = field(default_factory=list)
    interposed: int = 0


class Comparison:
    """One process's memory against one linking. `bases`: load address of each module."""

    def __init__(
        self, linking: Linking, bases: list[int], vdso: tuple[int, int] | None, execs: list[tuple[int, int]]
    ) -> None:
        self._linking = linking
        self._bases = bases
        self._code = sorted(
            [
                Code(base + load.address // _CHUNK * _CHUNK, base + load.address + load.size, number)
                for number, (module, base) in enumerate(zip(linking.modules, bases, strict=True))
                for load in module.image.loads
                if load.flags & PF_X
            ]
            + ([Code(*vdso, VDSO_MODULE)] if vdso else [])
        )
        self._execs = sorted(execs)
        self._service: frozenset[int] | None = None
        self._linkers = {number for number, module in enumerate(linking.modules) if module.is_linker}

    def run(self, regions: list[memoryview], loose: list[list[int]], pins: Pins, *, final: bool) -> Outcome:
        """Compares. `regions`: each module's protected bytes as read; `loose`: the words at its loose
        slots. New pins are added to `pins` if nothing is odd and the words are `final`: while something is
        writable that should not be, the dynamic linker may still be at work."""
        outcome = Outcome()
        known = pins.known()
        self._vote(regions, loose, known)
        for number, module in enumerate(self._linking.modules):
            soft = self._region(number, module, regions[number], known, outcome)
            soft += self._loose(number, loose[number], known, outcome)
            outcome.pinned.append(soft)
            outcome.words.append(len(regions[number]) // WORD + len(loose[number]))
        if len(known.words) > MAX_PINNED:
            outcome.total += len(known.words)
        if final and not outcome.total:
            pins.keep(known, self._bases)
        return outcome

    def _vote(self, regions: list[memoryview], loose: list[list[int]], known: Known) -> None:
        """What each resolver chose, that is not known yet: what most of its slots have."""
        votes: dict[int, tuple[int, Counter[int]]] = {}
        for number, module in enumerate(self._linking.modules):
            now = regions[number].cast("Q")
            start, base = module.relocated.start, self._bases[number]
            pairs = [(slot, now[(slot.item.address - start) // WORD]) for slot in self._linking.slots[number]]
            pairs += zip(self._linking.loose[number], loose[number], strict=True)
            for slot, value in pairs:
                key = slot.value(self._bases)
                if slot.soft != "ifunc" or not value or key in known.resolved:
                    continue
                if slot.stub is None or value != base + slot.stub:
                    votes.setdefault(key, (slot.target.module, Counter()))[1][value] += 1
        for key, (module_number, counted) in votes.items():
            value = counted.most_common(1)[0][0]
            if self._in_code_of(value, {module_number, VDSO_MODULE}):
                known.resolved[key] = value

    def _region(self, number: int, module: Module, seen: memoryview, known: Known, outcome: Outcome) -> int:
        relocated, base = module.relocated, self._bases[number]
        expected = relocated.expected(base)
        words = memoryview(expected).cast("Q")
        soft: dict[int, Slot] = {}
        for slot in self._linking.slots[number]:
            index = (slot.item.address - relocated.start) // WORD
            if not slot.soft:
                words[index] = slot.value(self._bases)
                continue
            soft[index] = slot
            if slot.item.type == R_TLSDESC:
                soft[index + 1] = slot
        now = seen.cast("Q")
        copies = self._linking.copied(number)
        count = 0
        for index in sorted({*_differing(expected, seen), *soft}):
            address, value = base + relocated.start + index * WORD, now[index]
            special = soft.get(index)
            own = relocated.start + index * WORD
            if special is not None:
                first = own == special.item.address
                verdict = self._soft(number, special, value, known, first)
            else:
                verdict = self._plain(number, module, own, value, copies, outcome)
            if verdict == "fixed":
                continue
            legal = known.words.get(address, words[index])
            if special is not None and special.soft == "ifunc":
                legal = known.words.get(address, known.resolved.get(special.value(self._bases), 0))
            if verdict and (value == legal or (address not in known.words and base not in known.done)):
                known.words[address] = value
                count += 1
                continue
            item = special.item if special is not None else self._item(number, own)
            _add(outcome, Odd(number, address, value, (legal,), "pinned" if verdict else "value", item))
        return count

    def _plain(
        self,
        number: int,
        module: Module,
        own: int,
        value: int,
        copies: list[tuple[int, int]],
        outcome: Outcome,
    ) -> str:
        """Why a differing word without a soft slot may be; empty: it may not."""
        relocated = module.relocated
        if own in relocated.dynamic_words:
            # Made absolute by most linkers, left alone by some.
            return "fixed" if value == self._unbased(relocated, own) else ""
        if own in relocated.linker_words:
            return self._linker(number, value)
        if any(start <= own < end for start, end in copies):
            return self._linker(number, value)
        if relocated.is_plain(own):
            return self._linker(number, value) or self._served(value) if number in self._linkers else ""
        item = self._item(number, own)
        if item is not None and self._interposed(number, item, value, outcome):
            outcome.interposed += 1
            return "interposed"
        return ""

    def _unbased(self, relocated: object, own: int) -> int:
        index = (own - relocated.start) // WORD  # type: ignore[attr-defined]
        return int(relocated.words >> (64 * index) & (1 << 64) - 1)  # type: ignore[attr-defined]

    def _interposed(self, number: int, item: Named, value: int, outcome: Outcome) -> bool:
        if outcome.total + outcome.interposed >= MAX_ODD:
            # Nobody has so many; looking for the definitions of each would take seconds.
            return False
        for target in self._linking.alternatives(number, item):
            if target.ifunc:
                if self._in_code_of(value, {target.module, VDSO_MODULE}):
                    return True
            elif Slot(item, target).value(self._bases) == value:
                return True
        return False

    def _soft(self, number: int, slot: Slot, value: int, known: Known, first: bool) -> str:
        """Why a value that only the process knows may be; empty: it may not."""
        kind = slot.item.type
        if slot.soft == "ifunc":
            return self._ifunc(slot, value, known)
        if slot.soft == "linker":
            return self._linker(number, value)
        if kind == R_DTPMOD64:
            return "tls" if value < 4096 else ""
        if kind == R_TPOFF64:
            return "tls" if value < _SMALL or value > (1 << 64) - _SMALL else ""
        # A TLS descriptor: code of the dynamic linker, and its argument.
        if first:
            return "tls" if self._in_code_of(value, self._linkers) else ""
        return "tls" if not self._leads_to_code(value) else ""

    def _ifunc(self, slot: Slot, value: int, known: Known) -> str:
        if not value:
            return "ifunc"
        if not self._in_code_of(value, {slot.target.module, VDSO_MODULE}):
            return ""
        return "ifunc" if known.resolved.setdefault(slot.value(self._bases), value) == value else ""

    def _linker(self, number: int, value: int) -> str:
        if not self._leads_to_code(value) or self._in_code_of(value, {*self._linkers, VDSO_MODULE}):
            return "linker"
        return ""

    def _served(self, value: int) -> str:
        if self._service is None:
            targets = self._linking.served()
            self._service = frozenset(
                target.value + self._bases[target.module] for target in targets if target.module >= 0
            )
        return "linker" if value in self._service else ""

    def _loose(self, number: int, seen: list[int], known: Known, outcome: Outcome) -> int:
        base = self._bases[number]
        count = 0
        for slot, value in zip(self._linking.loose[number], seen, strict=True):
            address = base + slot.item.address
            stub = None if slot.stub is None else base + slot.stub
            if value == stub:
                continue
            if slot.soft:
                verdict = self._soft(number, slot, value, known, True)
                # Bound late, it is pinned when it is bound; every slot of a resolver agrees all the same.
                if verdict and (stub is not None or known.words.setdefault(address, value) == value):
                    count += 1
                    continue
                expected = [known.resolved.get(slot.value(self._bases), 0)]
            else:
                expected = [slot.value(self._bases)]
                if value == expected[0]:
                    continue
                if self._interposed(number, slot.item, value, outcome):
                    outcome.interposed += 1
                    if known.words.setdefault(address, value) == value:
                        continue
                verdict = ""
            if stub is not None:
                expected.append(stub)
            reason = "pinned" if verdict else "value"
            _add(outcome, Odd(number, address, value, tuple(expected), reason, slot.item))
        return count

    def _item(self, number: int, own: int) -> Named | None:
        items = self._linking.modules[number].relocated.named
        at = bisect.bisect_left(items, (own,))
        return items[at] if at < len(items) and items[at].address == own else None

    def _leads_to_code(self, value: int) -> bool:
        at = bisect.bisect_right(self._execs, (value, 1 << 64)) - 1
        return at >= 0 and self._execs[at][0] <= value < self._execs[at][1]

    def _in_code_of(self, value: int, modules: set[int]) -> bool:
        at = bisect.bisect_right(self._code, (value, 1 << 64, 0)) - 1
        if at < 0 or not self._leads_to_code(value):
            return False
        code = self._code[at]
        return code.start <= value < code.end and code.module in modules


def _add(outcome: Outcome, odd: Odd) -> None:
    outcome.total += 1
    if len(outcome.odd) < MAX_ODD:
        outcome.odd.append(odd)


def _packed(pairs: dict[int, int]) -> array[int]:
    return array("Q", [number for pair in pairs.items() for number in pair])


def _unpacked(packed: array[int]) -> dict[int, int]:
    return dict(zip(packed[::2], packed[1::2], strict=True))


def _differing(expected: bytearray, seen: memoryview) -> list[int]:
    """Indices of words that differ."""
    view = memoryview(expected)
    found: list[int] = []
    for start in range(0, len(view), _CHUNK):
        mine, other = view[start : start + _CHUNK], seen[start : start + _CHUNK]
        if bytes(mine) != bytes(other):
            pairs = zip(array("Q", bytes(mine)), array("Q", bytes(other)), strict=True)
            found += [start // WORD + index for index, (a, b) in enumerate(pairs) if a != b]
    return found
