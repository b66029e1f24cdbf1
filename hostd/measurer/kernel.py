"""Reads the running kernel's code and constants, part by part, through /proc/kcore.

When an image (the kernel, or a module that was loaded) is new, a child process compares it with its
package file (`kernel_builder`) while readings say that it is not ready; a pass then costs the reading and
a tag of some 20 MB. What the appraisal may rest on is said in `hostd.core.appraise_kernel`.

Needs CAP_SYS_RAWIO (kcore), CAP_SYSLOG (addresses of symbols and sections).
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from typing import IO, TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from hostd.core.reading_kernel import (
    MAX_ALTERED,
    MAX_SITES,
    VMLINUX,
    KernelAltered,
    KernelReading,
    KernelSite,
)
from hostd.core.readings import Missing
from hostd.measurer.kernel_built import Built, BuiltImage, Sites
from hostd.measurer.kernel_files import Instance, living
from hostd.measurer.kernel_plan import (
    Comparer,
    Plan,
    Planned,
    SymbolBook,
    carry_over,
    make_plan,
    numbered,
)
from hostd.measurer.tags import Tagger
from hostd.platform import program
from hostd.platform.kallsyms import MalformedSymbolsError, Symbols, parse_symbols, read_symbols
from hostd.platform.kcore import Kcore, KcoreError, MalformedKcoreError

if TYPE_CHECKING:
    from hostd.config import Config

BUILD_AGAIN_S: Final = 2.0
"""After a builder that failed."""
SUSPECT_AGAIN_S: Final = 60.0
"""After one that found something altered: it may have been put back."""
MAX_BUILT_BYTES: Final = 256 << 20
_KERNEL: Final = Instance(VMLINUX, 0, 0)


class KernelProbe:
    """Reads the kernel. One thread at a time may call it; it shares nothing with other probes."""

    def __init__(self, config: Config | None = None) -> None:
        del config
        self._kcore: Kcore | None = None
        self._refused = ""
        self._tagger = Tagger()
        self._comparer: Comparer | None = None
        self._images: dict[Instance, Planned] = {}
        self._plan: Plan | None = None
        self._plans = 0
        self._next_image = 0
        self._child: tuple[subprocess.Popen[bytes], IO[bytes], list[Instance]] | None = None
        self._not_before = 0.0
        self._suspect_from = 0.0
        self._said = ""

    def read(self, part: int) -> KernelReading | Missing:
        """Part `part` of the plan. Part 0 looks for modules that came and went, which makes a new plan."""
        if not self._open():
            return Missing(self._refused, absent=True)
        try:
            if part == 0 and (waiting := self._replan()):
                return Missing(waiting[:512], absent=False)
            return self._read(part)
        except (KcoreError, MalformedKcoreError, MalformedSymbolsError, OSError, ValueError) as error:
            return Missing(f"the kernel cannot be read: {error}"[:512], absent=False)

    def _open(self) -> bool:
        if self._kcore is None:
            try:
                self._kcore = Kcore()
            except (OSError, MalformedKcoreError) as error:
                self._refused = f"/proc/kcore: {error}"[:512]
                return False
        return True

    # ── Which images there are ────────────────────────────────────────────────────────────────────

    def _replan(self) -> str:
        """Brings the plan up to date; what is waited for, empty if nothing is."""
        wanted = {_KERNEL} | living()
        self._take_built()
        gone = self._images.keys() - wanted
        missing = sorted(wanted - self._images.keys())
        suspect = sorted(key for key, image in self._images.items() if image.built.altered_total)
        for key in gone:
            del self._images[key]
        if missing or (suspect and time.monotonic() >= self._suspect_from):
            self._start_builder(missing or suspect)
        if missing:
            names = " ".join(item.name for item in missing)
            return f"being compared with package files: {names}; {self._said}"
        if self._plan is None or {image.number for image in self._plan.images} != {
            image.number for image in self._images.values()
        }:
            self._plans += 1
            plan = make_plan(self._plans, sorted(self._images.values(), key=lambda image: image.number))
            if self._plan is not None:
                carry_over(self._plan, plan)
            self._plan = plan
        return ""

    def _start_builder(self, keys: list[Instance]) -> None:
        if self._child is not None or time.monotonic() < self._not_before:
            return
        out = tempfile.TemporaryFile()  # noqa: SIM115 - the child outlives this call
        # `--` ends options: a module's name comes from the kernel.
        argv = program.command("kernel-images", "--", *(item.name for item in keys))
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out)
        self._child = child, out, keys

    def _take_built(self) -> None:
        if self._child is None:
            return
        child, out, keys = self._child
        if child.poll() is None:
            return
        self._child = None
        with out:
            self._not_before = time.monotonic() + BUILD_AGAIN_S
            if child.returncode:
                self._said = f"the comparison ended with {child.returncode}"
                return
            out.seek(0)
            built = msgspec.msgpack.decode(out.read(MAX_BUILT_BYTES), type=Built)
        suspect = any(image.altered_total for image in built.images)
        self._suspect_from = time.monotonic() + (SUSPECT_AGAIN_S if suspect else 0.0)
        self._not_before = 0.0
        self._said = ""
        symbols = Symbols(built.symbols)
        if self._comparer is None:
            assert self._kcore is not None
            book = SymbolBook(symbols, lambda: parse_symbols(read_symbols()))
            self._comparer = Comparer(self._tagger, self._kcore.read_into, book)
        else:
            self._comparer.book.symbols = symbols
        by_name = {image.image.name: image for image in built.images}
        for key in keys:
            if key.name in by_name:
                self._take(key, by_name[key.name])

    def _take(self, key: Instance, built: BuiltImage) -> None:
        image = replace(built.image, number=self._next_image)
        self._images[key] = Planned(self._next_image, replace(built, image=image), Sites(built))
        self._next_image += 1

    # ── Readings ──────────────────────────────────────────────────────────────────────────────────

    def _read(self, part: int) -> KernelReading | Missing:
        plan, comparer = self._plan, self._comparer
        if plan is None or comparer is None or part >= len(plan.parts):
            return Missing("no such part of the kernel", absent=False)
        ranges = [comparer.look(span) for span in plan.parts[part]]
        chunks = [chunk for span in plan.parts[part] for chunk in span.chunks]
        sites: list[KernelSite] = [site for chunk in chunks for site in chunk.sites]
        altered: list[KernelAltered] = []
        total = sum(chunk.altered_total for chunk in chunks)
        if part == 0:
            for image in plan.images:
                altered += numbered(image.built.altered, image.number)
                total += image.built.altered_total
        altered += [item for chunk in chunks for item in chunk.altered]
        if any(chunk.altered_total for chunk in chunks) and (gone := self._gone()):
            return Missing(f"unloaded while it was read: {gone}"[:512], absent=False)
        return KernelReading(
            part=part,
            parts=len(plan.parts),
            plan=plan.number,
            images=tuple(image.built.image for image in plan.images) if part == 0 else (),
            ranges=tuple(ranges),
            sites=tuple(sites[:MAX_SITES]),
            sites_total=sum(chunk.sites_total for chunk in chunks),
            altered=tuple(altered[:MAX_ALTERED]),
            altered_total=total,
        )

    def _gone(self) -> str:
        """Names of modules of the plan that are not loaded any more."""
        return " ".join(sorted(item.name for item in self._images.keys() - {_KERNEL} - living()))

    def close(self) -> None:
        if self._child is not None:
            child, out, _ = self._child
            child.kill()
            child.wait()
            out.close()
            self._child = None
        if self._kcore is not None:
            self._kcore.close()
            self._kcore = None
