"""The ELF files of a process: which are loaded where, parsed once for all processes.

A file's bytes are read once, through the registry's descriptor, into memory that is given back; the digest
is taken of these same bytes, so that whoever judges can tell that what was recomputed is what was approved.
What was parsed (8 MB for QEMU's 52 files) is kept while it is used and dropped a moment later.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.core.readings import EXEC, READ, WRITE
from hostd.core.reference import DELETED
from hostd.measurer.elf import MalformedElfError
from hostd.measurer.elf_image import PF_W, PF_X
from hostd.measurer.files import TooMuchError
from hostd.measurer.linking import Linking, Module, parse_module
from hostd.platform.pages import PAGE, whole_pages
from hostd.platform.procfs import ProcessGoneError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.measurer.elf_image import Load
    from hostd.measurer.files import File, Registry
    from hostd.platform.procfs import ProcessHandle, Vma

_libc: Final = ctypes.CDLL(None)
KEEP_S: Final = 10.0
"""After the last use; VMs that start one after another share one parsing (0.5 s in steps)."""
MAX_MODULES: Final = 512
MAX_PIECES: Final = 128
"""Mappings of one file; a loaded library has five. Each is compared with each other one."""
VDSO: Final = "[vdso]"


class Loaded(NamedTuple):
    """A file that is loaded at an address."""

    file: int
    base: int
    writable: bool
    """What should be protected is writable: the dynamic linker is not done, or it was made so."""


class Shape(NamedTuple):
    """What of a process's mappings relocation depends on."""

    loaded: tuple[Loaded, ...]
    uncovered: tuple[str, ...]
    """Files mapped as code that are not recomputed, and why."""
    vdso: tuple[int, int] | None
    execs: tuple[tuple[int, int], ...]


class Modules:
    """Parsed files, by the registry's numbers, and linkings of them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._modules: dict[int, Module | None] = {}
        self._refused: dict[int, str] = {}
        self._linkings: dict[tuple[tuple[tuple[int, str], ...], int], Linking] = {}
        self._used = 0.0

    def drop_idle(self) -> None:
        """Gives back what nobody has used for `KEEP_S`."""
        if self._modules and time.monotonic() - self._used > KEEP_S:
            self._modules.clear()
            self._refused.clear()
            self._linkings.clear()
            _libc.malloc_trim(0)

    # ── Where files are loaded ────────────────────────────────────────────────────────────────────

    def steps(self, handle: ProcessHandle, vmas: tuple[Vma, ...]) -> Iterator[None]:
        """Parses what these mappings need, one file at each step.

        Raises:
            ProcessGoneError, TooMuchError: as `Registry.resolve`.
        """
        self._used = time.monotonic()
        for file, _ in self._files(handle, vmas):
            if file.number not in self._modules and file.own is not None:
                self._modules[file.number] = self._parse(file)
                yield

    def _files(self, handle: ProcessHandle, vmas: tuple[Vma, ...]) -> list[tuple[File, list[Vma]]]:
        """ELF files that may be loaded as code or constants, and their mappings."""
        by_key: dict[tuple[str, int], list[Vma]] = {}
        for vma in vmas:
            if vma.inode:
                by_key.setdefault((vma.device, vma.inode), []).append(vma)
        found = []
        for mapped in by_key.values():
            if any(vma.protection & EXEC or vma.protection == READ for vma in mapped):
                file = self._registry.resolve(handle, mapped[0])
                if file.own is None or file.magic == b"\x7fELF" or _executable(mapped):
                    found.append((file, mapped))
        if len(found) > MAX_MODULES:
            raise ProcessGoneError(f"over {MAX_MODULES} ELF files are mapped")
        return found

    def _parse(self, file: File) -> Module | None:
        try:
            size = os.fstat(file.fd).st_size
            if not 0 < size <= file.size:
                raise MalformedElfError("its size has changed")
            # Anonymous memory, given back to the system with the last reference.
            view = memoryview(mmap.mmap(-1, size))
            filled = 0
            while filled < size and (got := os.preadv(file.fd, [view[filled:]], filled)):
                filled += got
            if filled != size:
                raise MalformedElfError("its size has changed")
            data = view.toreadonly()
            return parse_module(data, file.number, file.path, hashlib.sha256(data).digest())
        except (MalformedElfError, OSError) as error:
            self._refused[file.number] = str(error)
            return None

    def shape(self, handle: ProcessHandle, vmas: tuple[Vma, ...]) -> Shape:
        """Where the files are loaded; after `steps`."""
        loaded: list[Loaded] = []
        uncovered: list[str] = []
        for file, mapped in self._files(handle, vmas):
            module = self._modules.get(file.number)
            if module is not None and module.path != mapped[0].name:
                # Each process is judged by its own names.
                module = self._modules[file.number] = replace(module, path=mapped[0].name)
            if module is None:
                if _executable(mapped):
                    reason = file.refusal or self._refused.get(file.number) or "it is not linked dynamically"
                    uncovered.append(f"{file.path}: {reason}")
                continue
            if len(mapped) > MAX_PIECES:
                uncovered.append(f"{file.path}: mapped in {len(mapped)} pieces, over {MAX_PIECES}")
                continue
            found = list(_instances(module, mapped))
            loaded += [Loaded(file.number, base, _writable(module, base, mapped)) for base in found]
            if odd := next(filter(None, (_displaced(module, base, mapped) for base in found)), None):
                uncovered.append(f"{file.path}: {odd}")
            stray = [v for v in mapped if v.protection & EXEC and not _in_place(v, module, found)]
            if stray:
                uncovered.append(f"{file.path}: mapped as code at {stray[0].start:#x}, not as it is linked")
        if len(loaded) > MAX_MODULES:
            raise TooMuchError(f"over {MAX_MODULES} ELF files are loaded")
        vdso = next(((v.start, v.end) for v in vmas if v.name == VDSO and not v.inode), None)
        execs = tuple((v.start, v.end) for v in vmas if v.protection & EXEC)
        # By number: addresses are random, and processes with the same files are to share a linking.
        return Shape(tuple(sorted(loaded)), tuple(uncovered), vdso, execs)

    # ── Linking ───────────────────────────────────────────────────────────────────────────────────

    def link(self, shape: Shape, executable: str) -> Linking:
        """The linking of a shape's files, which all processes with the same share; `Linking.step` is for
        the caller to call until it is done.

        Raises:
            ProcessGoneError: no program is among them.
        """
        self._used = time.monotonic()
        modules = [self._modules.get(item.file) for item in shape.loaded]
        known = tuple(module for module in modules if module is not None)
        if len(known) != len(modules):
            raise ProcessGoneError("a file has to be parsed again")
        # Its file may have been replaced since.
        path = executable.removesuffix(DELETED)
        main = next((n for n, module in enumerate(known) if module.path.removesuffix(DELETED) == path), None)
        if main is None:
            raise ProcessGoneError("its program is not mapped (any more)")
        key = (tuple((module.number, module.path) for module in known), main)
        linking = self._linkings.get(key)
        if linking is None:
            linking = self._linkings[key] = Linking(known, main)
        return linking


def _executable(mapped: list[Vma]) -> bool:
    return any(vma.protection & EXEC for vma in mapped)


def _instances(module: Module, mapped: list[Vma]) -> Iterator[int]:
    """Load addresses: where the first segment is mapped, and every other one where it then must be."""
    loads = module.image.loads
    first = loads[0]
    for vma in mapped:
        if vma.offset != first.offset // PAGE * PAGE or vma.shared:
            continue
        base = vma.start - first.address // PAGE * PAGE
        if base >= 0 and all(
            _maps(mapped, base + load.address, load.offset) for load in loads if load.file_size
        ):
            yield base


def _maps(mapped: list[Vma], address: int, offset: int) -> bool:
    """Whether a file offset is mapped at an address."""
    return any(
        vma.start <= address < vma.end and vma.offset + address - vma.start == offset for vma in mapped
    )


def _in_place(vma: Vma, module: Module, bases: list[int]) -> bool:
    """Whether an executable mapping is a part of a segment of code, at its address. Elsewhere the same code
    would take its data and slots from what stands beside it there."""
    for load in module.image.loads:
        if load.flags & PF_X:
            low, high = _pages(load)
            for base in bases:
                if (
                    base + low <= vma.start
                    and vma.end <= base + high
                    and vma.offset - vma.start == load.offset - load.address - base
                ):
                    return True
    return False


def _displaced(module: Module, base: int, mapped: list[Vma]) -> str:
    """What of the code, the constants and the protected region of a loaded file is not mapped from the file,
    from the offset that belongs there, with the rights it is linked with; empty: nothing. A hole may hide an
    altered page that nobody looks at, or be filled with memory that is no file's."""
    loads = module.image.loads
    wanted: list[tuple[int, int, Load, int]] = []
    for load, following in zip(loads, (*loads[1:], None), strict=True):
        low, high = _pages(load)
        if following is not None:
            # The later one is mapped over a page that two segments share.
            high = min(high, _pages(following)[0])
        if load.flags & PF_W:
            first, last = module.image.relro
            low, high = max(low, first // PAGE * PAGE), min(high, last // PAGE * PAGE)
        wanted.append((base + low, base + high, load, load.flags & (READ | EXEC)))
    for start, end, load, rights in wanted:
        at = start
        for vma in mapped:
            if (
                vma.start <= at < vma.end
                and vma.offset - vma.start == load.offset - load.address - base
                and vma.protection & rights == rights
            ):
                at = vma.end
        if at < end:
            return f"not mapped at {at:#x} as it is linked"
    return ""


def _pages(load: Load) -> tuple[int, int]:
    """The pages that a segment's part of the file takes, before the load address is added."""
    return load.address // PAGE * PAGE, whole_pages(load.address + load.file_size)


def _writable(module: Module, base: int, mapped: list[Vma]) -> bool:
    """Whether a whole page of the protected region is writable."""
    low, high = module.image.relro
    start, end = (base + low) // PAGE * PAGE, (base + high) // PAGE * PAGE
    return any(vma.protection & WRITE and vma.start < end and start < vma.end for vma in mapped)
