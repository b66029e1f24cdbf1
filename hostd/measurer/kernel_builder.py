"""Compares images of kernel code with their files: a child of the measurer, for one answer.

A process of its own because it needs some 150 MB for a second, which the measurer should not hold, and
because the comparison is Python that would keep the measurer's other threads waiting. It runs as the
measurer's user with the measurer's privileges, reads only, and writes `Built` to its standard output.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING, Final

import msgspec

from hostd.core.reading_kernel import MAX_ALTERED, VMLINUX, KernelAltered, KernelImage
from hostd.measurer import kernel_operations as operations
from hostd.measurer.kernel_built import Built, BuiltImage, pack_area, pack_sites
from hostd.measurer.kernel_elf import MalformedElfError, build_id, parse_elf
from hostd.measurer.kernel_explain import Explained, explain
from hostd.measurer.kernel_files import (
    PackageFiles,
    loaded_modules,
    running_notes,
    section_places,
)
from hostd.measurer.kernel_image import Area, vmlinux_image
from hostd.measurer.kernel_live import live_kernel, live_module
from hostd.measurer.kernel_module import ModuleFile
from hostd.measurer.kernel_tables import MalformedTableError
from hostd.platform.bzimage import MalformedImageError, unpack, unpack_image
from hostd.platform.kallsyms import Symbols, code_and_data, pack_symbols, read_symbols, scan_symbols
from hostd.platform.kcore import Kcore, KcoreError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostd.measurer.kernel_files import PackageFile
    from hostd.measurer.kernel_image import Image
    from hostd.platform.kallsyms import PackedSymbols

PAUSE_S: Final = 0.02
"""Between two looks at a patch that seems to be in the making; one takes microseconds."""
_IDT_BYTES: Final = 4096
_FTRACE_CALLS: Final = ("ftrace_call", "ftrace_regs_call")
_UNUSABLE: Final = (MalformedElfError, MalformedTableError, MalformedImageError)


class Builder:
    """Knows the running kernel's symbols; makes one image after another.

    Raises:
        OSError, MalformedSymbolsError, MalformedKcoreError: something that is needed cannot be read.
    """

    def __init__(self, kcore: Kcore, files: PackageFiles) -> None:
        self._kcore = kcore
        self._files = files
        lines = scan_symbols(read_symbols())
        self.packed: PackedSymbols = pack_symbols(code_and_data(lines))
        self._symbols = Symbols(self.packed)
        self._kernel: dict[str, int] = {}
        self._modules: dict[str, dict[str, int]] = {}
        self._exporters: dict[str, str] = {}
        for line in lines:
            name, module = line.name.decode("utf-8", "replace"), line.module.decode("utf-8", "replace")
            if module:
                self._modules.setdefault(module, {}).setdefault(name, line.address)
                if name.startswith("__ksymtab_"):
                    self._exporters.setdefault(name.removeprefix("__ksymtab_"), module)
            elif name not in self._kernel or line.kind.isupper():
                self._kernel[name] = line.address
        spans = [(item.address, item.address + item.size) for item in loaded_modules()]
        self._spans = [*spans, (self._kernel.get("_text", 0), self._kernel.get("_end", 0))]

    def build(self, name: str) -> BuiltImage:
        """One image as it is now.

        Raises:
            OSError, KcoreError, ValueError: it is gone, or cannot be read.
        """
        return self._build_kernel() if name == VMLINUX else self._build_module(name)

    def _inside(self, address: int) -> bool:
        return any(start <= address < end for start, end in self._spans)

    def _exported(self, name: str) -> int | None:
        if f"__ksymtab_{name}" in self._kernel:
            return self._kernel.get(name)
        module = self._exporters.get(name)
        return self._modules[module].get(name) if module is not None else self._kernel.get(name)

    def _explain(self, image: Image) -> Explained:
        return explain(image, self._kcore.read, self._symbols, lambda: time.sleep(PAUSE_S))

    # ── The kernel ────────────────────────────────────────────────────────────────────────────────

    def _build_kernel(self) -> BuiltImage:
        file, note = self._files.kernel(), "no file of it"
        image: Image | None = None
        if file is not None:
            try:
                unpacked = unpack_image(file.data)
                notes = parse_elf(unpacked).named(".notes")
                theirs = b"" if notes is None else build_id(parse_elf(unpacked).content(notes))
                if theirs and theirs == build_id(running_notes()):
                    calls = [self._kernel[name] for name in _FTRACE_CALLS if name in self._kernel]
                    image = vmlinux_image(unpacked, self._kernel, self._trampolines(), calls)
                else:
                    note = f"{file.path} is of another build"
            except _UNUSABLE as error:
                note = f"{file.path}: {error}"
        if image is None:
            file = None
            image = live_kernel(self._kernel, self._kcore.read, self._trampolines())
        if (idt := self._kernel.get("idt_table")) is not None:
            image.areas.append(Area("idt_table", idt, _IDT_BYTES, None))
        found = self._explain(image)
        for area, seen in zip(image.areas, found.seen, strict=True):
            if area.name == "idt_table":
                self._add_altered(found, operations.gates(seen, self._symbols, area.address))
        return self._packed(image, found, file, note)

    def _trampolines(self) -> list[int]:
        return [address for name, address in self._kernel.items() if name.startswith("__SCT__")]

    # ── Modules ───────────────────────────────────────────────────────────────────────────────────

    def _build_module(self, name: str) -> BuiltImage:
        places = section_places(name)
        own = self._modules.get(name, {})
        file, note = self._files.module(name), "no file of it"
        image: Image | None = None
        made: ModuleFile | None = None
        if file is not None:
            try:
                data = unpack(file.data)
                section = parse_elf(data).named(".note.gnu.build-id")
                theirs = b"" if section is None else build_id(parse_elf(data).content(section))
                if theirs and theirs == build_id(running_notes(name)):
                    made = ModuleFile(name, data, places, self._exported, own.get)
                    image = made.image()
                else:
                    note = f"{file.path} is of another build"
            except _UNUSABLE as error:
                note, made = f"{file.path}: {error}", None
        if image is None or made is None:
            file = None
            size = next((item.size for item in loaded_modules() if item.name == name), 0)
            image = live_module(name, places, size, self._kcore.read, own)
        found = self._explain(image)
        tables = [] if made is None else list(self._tables(name, made, found))
        return self._packed(image, found, file, note, tables)

    def _tables(
        self, name: str, made: ModuleFile, found: Explained
    ) -> Iterable[tuple[str, int, bytes, tuple[tuple[int, int], ...]]]:
        for symbol, ignored in operations.OPERATIONS.get(name, ()):
            golden = made.data_at(symbol)
            if golden is None:
                continue
            address, expected = golden[0], operations.without(golden[1], ignored)
            seen = operations.without(self._kcore.read(address, len(expected)), ignored)
            wrong = operations.wrong_slots(symbol, expected, seen, address, self._symbols, self._inside)
            self._add_altered(found, wrong)
            slots = operations.slots(seen, self._symbols, self._inside)
            words = "".join(f"{symbol}+{slot.offset:x} {slot.leads}\n" for slot in slots)
            found.patched = hashlib.sha256(found.patched + words.encode()).digest()
            yield symbol, address, seen, ignored

    def _add_altered(self, found: Explained, wrong: list[KernelAltered]) -> None:
        found.altered += wrong[: max(0, MAX_ALTERED - len(found.altered))]
        found.altered_total += len(wrong)

    def _packed(
        self,
        image: Image,
        found: Explained,
        file: PackageFile | None,
        note: str,
        tables: Iterable[tuple[str, int, bytes, tuple[tuple[int, int], ...]]] = (),
    ) -> BuiltImage:
        areas = [
            pack_area(area.name, area.address, seen)
            for area, seen in zip(image.areas, found.seen, strict=True)
        ]
        areas += [
            pack_area(f"table {symbol}", address, seen, ignored) for symbol, address, seen, ignored in tables
        ]
        addresses, kinds, compiled, targets = pack_sites(found.sites)
        return BuiltImage(
            image=KernelImage(
                number=0,
                name=image.name,
                path="" if file is None else file.path,
                sha256=b"" if file is None else file.sha256,
                note="" if file is not None else note[:256],
                patched=found.patched,
                compared=found.compared if file is not None else 0,
                pinned=found.pinned if file is not None else found.pinned + found.compared,
            ),
            areas=tuple(areas),
            addresses=addresses,
            kinds=kinds,
            compiled=compiled,
            targets=targets,
            altered=tuple(found.altered),
            altered_total=found.altered_total,
        )


def build(names: Iterable[str]) -> Built:
    """All images of `names` that are still there.

    Raises:
        OSError, MalformedSymbolsError, MalformedKcoreError, KcoreError: what all need cannot be read.
    """
    kcore = Kcore()
    try:
        builder = Builder(kcore, PackageFiles(os.uname().release))
        images = []
        for name in names:
            try:
                images.append(builder.build(name))
            except (OSError, ValueError, KcoreError):
                # A module that was unloaded meanwhile; if it was not, it will be asked for again.
                if name == VMLINUX:
                    raise
        return Built(tuple(images), builder.packed)
    finally:
        kcore.close()


def main(names: list[str]) -> None:
    """Writes what `build` gives to standard output."""
    data = msgspec.msgpack.encode(build(names))
    with open(1, "wb", closefd=False) as out:
        out.write(data)
