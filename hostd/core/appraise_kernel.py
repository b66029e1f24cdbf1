"""Judges component `kernel` (pure).

Who is trusted for what. The measurer reads memory, and compares an image with its file when it first sees
it: some 450,000 bytes differ then, each explained by a patch site (`hostd.core.patchsites`, the same code
that runs here). It reports the file's digest, a digest of what patching chose, and what it could not
explain. The judge decides whether that file may be a reference at all. From then on it does not take the
measurer's word for what changes: equal tags are equal bytes, and every site that changed comes with its
bytes and is judged here.

One complete reading is `parts` parts of one plan in order. Until the last part the verdict is pending.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.core.codes import Code
from hostd.core.findings import Finding, Severity, Status, Verdict
from hostd.core.patchsites import RUNTIME, Site, SiteKind, branch, is_ftrace_entry, settle
from hostd.core.reading_kernel import MAX_SITES, VMLINUX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.core.findings import Component
    from hostd.core.reading_kernel import (
        KernelAltered,
        KernelImage,
        KernelRange,
        KernelReading,
        KernelSite,
    )
    from hostd.core.reference import Reference
    from hostd.core.rule_kernel import KernelRule

MAX_FINDINGS: Final = 64
_TABLE: Final = "table "
MAX_PINNED: Final = 65536
"""Ranges held to their first tag; a host has some 300. Over it nothing more is good."""
RangeKey = tuple[int, str, int, int]
"""(image, area, offset, length)."""


class KernelJudge:
    """Judges readings of `kernel` and keeps what later ones must agree with."""

    def __init__(self) -> None:
        self._pinned: dict[RangeKey, bytes] = {}
        self._patched: dict[int, bytes] = {}
        self._ranges: dict[int, set[RangeKey]] = {}
        """Plan → ranges that a complete reading of it has."""
        self._plan = -1
        self._next = 0
        self._parts = 0
        self._images: dict[int, KernelImage] = {}
        self._seen: set[RangeKey] = set()
        self._sites = 0
        self._traced = 0

    def appraise(self, component: Component, reading: KernelReading, reference: Reference) -> Verdict:
        """The verdict on one part."""
        if reading.part == 0:
            self._start(reading)
        in_order = (reading.part, reading.plan, reading.parts) == (self._next, self._plan, self._parts)
        if not in_order or (reading.part and reading.images):
            self._next = -1
            return Verdict(component, Status.PENDING, claims=(("reading", "starts again"),))
        self._next += 1
        name = str(component)
        findings = [
            *self._altered(name, reading),
            *self._moved(name, reading),
            *self._switched(name, reading),
        ]
        rule = reference.kernel
        known = rule is not None or self._kernel_known(reference)
        if reading.part == 0 and known:
            findings += self._unapproved(name, reference, rule)
        if findings:
            claims = (("altered", str(reading.altered_total)), *self._claims(reference, rule))
            return Verdict(component, Status.DRIFTED, tuple(findings[:MAX_FINDINGS]), claims=claims)
        if self._next < self._parts:
            return Verdict(component, Status.PENDING, claims=(("parts", f"{self._next} of {self._parts}"),))
        if not self._complete():
            return Verdict(component, Status.PENDING, claims=(("reading", "not complete"),))
        claims = self._claims(reference, rule)
        if not known:
            return Verdict(component, Status.ABSENT, claims=(("reference", "none"), *claims))
        return Verdict(component, Status.VERIFIED, claims=claims)

    def _start(self, reading: KernelReading) -> None:
        self._plan, self._parts, self._next = reading.plan, reading.parts, 0
        self._images = {image.number: image for image in reading.images}
        self._seen.clear()
        self._sites = self._traced = 0
        self._ranges = {plan: keys for plan, keys in self._ranges.items() if plan == reading.plan}
        self._pinned = {key: tag for key, tag in self._pinned.items() if key[0] in self._images}
        self._patched = {number: value for number, value in self._patched.items() if number in self._images}

    def _complete(self) -> bool:
        """Whether every byte of every image was read once, in the ranges of the plan's first complete
        reading."""
        covered = dict.fromkeys(self._images, 0)
        for number, area, _, length in self._seen:
            if number not in covered:
                return False
            covered[number] += 0 if area.startswith(_TABLE) else length
        kernel = any(image.name == VMLINUX for image in self._images.values())
        if not kernel or any(
            not covered[number] or covered[number] != image.compared + image.pinned
            for number, image in self._images.items()
        ):
            return False
        return self._seen == self._ranges.setdefault(self._plan, set(self._seen))

    # ── What the parts say ────────────────────────────────────────────────────────────────────────

    def _altered(self, name: str, reading: KernelReading) -> Iterator[Finding]:
        for item in reading.altered:
            yield _finding(
                name,
                _code_of(item.area),
                item.symbol or f"{self._named(item.image)} {item.area}",
                _expected(item),
                item.leads or f"bytes {item.seen.hex(' ')}",
                f"{item.area} {item.address:#x}",
            )
        if reading.altered_total > len(reading.altered) and not reading.altered:
            yield _finding(name, Code.KERNEL_TEXT_ALTERED, "kernel", "no altered byte", "altered bytes")

    def _moved(self, name: str, reading: KernelReading) -> Iterator[Finding]:
        """Ranges whose tag is not the one they first had, where nothing above names the byte."""
        named = {(item.image, item.area) for item in reading.altered}
        for item in reading.ranges:
            key = (item.image, item.area, item.offset, item.length)
            if key in self._seen:
                # Two ranges under one name: one of them could hide the other.
                yield self._range_finding(name, item)
            self._seen.add(key)
            if len(self._pinned) < MAX_PINNED:
                # What is altered at first sight is a finding of its own, and must not become the measure.
                first = None if (item.image, item.area) in named else self._pinned.setdefault(key, item.tag)
            else:
                first = self._pinned.get(key, b"")
            if first is not None and first != item.tag:
                yield self._range_finding(name, item)
        for image in reading.images:
            if self._patched.setdefault(image.number, image.patched) != image.patched:
                yield _finding(
                    name, Code.KERNEL_PATCHED, image.name, "as when first seen", image.patched.hex()
                )

    def _range_finding(self, name: str, item: KernelRange) -> Finding:
        where = f"{item.area} {item.offset:#x}-{item.offset + item.length:#x}"
        return _finding(
            name,
            _code_of(item.area),
            self._named(item.image),
            "content as first seen",
            "other content",
            where,
        )

    def _switched(self, name: str, reading: KernelReading) -> Iterator[Finding]:
        """Sites that changed, each judged by what may stand there."""
        self._sites += reading.sites_total
        approved = {image.name for image in self._images.values()}
        for item in reading.sites:
            word = _word(item, approved)
            if not word:
                yield _finding(
                    name,
                    Code.KERNEL_TEXT_ALTERED,
                    item.symbol,
                    f"bytes legal at a {item.kind} site, as {item.compiled.hex(' ')}",
                    f"bytes {item.seen.hex(' ')}" + (f" ({item.callee})" if item.callee else ""),
                    f"{item.address:#x}",
                )
            self._traced += item.kind == SiteKind.FTRACE and is_ftrace_entry(item.callee)
        if reading.sites_total > MAX_SITES and len(reading.sites) < MAX_SITES:
            yield _finding(
                name, Code.KERNEL_TEXT_ALTERED, "kernel", "the sites that changed", "fewer than there are"
            )

    def _named(self, number: int) -> str:
        image = self._images.get(number)
        return image.name if image is not None else f"image {number}"

    # ── Reference values ──────────────────────────────────────────────────────────────────────────

    def _kernel_known(self, reference: Reference) -> bool:
        return any(image.name == VMLINUX and expected(reference, image) for image in self._images.values())

    def _unapproved(self, name: str, reference: Reference, rule: KernelRule | None) -> Iterator[Finding]:
        for image in self._images.values():
            wanted = expected(reference, image)
            if image.sha256:
                if image.sha256.hex() not in wanted:
                    yield _finding(
                        name,
                        Code.KERNEL_UNAPPROVED,
                        f"{image.name} ({image.path})",
                        f"SHA-256 {' or '.join(wanted)}" if wanted else "a file among the reference values",
                        f"SHA-256 {image.sha256.hex()}",
                    )
            elif rule is None or image.name not in rule.first_use:
                yield _finding(
                    name,
                    Code.KERNEL_UNAPPROVED,
                    image.name,
                    "a file to compare with, among the reference values",
                    f"none: {image.note}",
                )
            patched = () if rule is None else rule.patched.get(image.name, ())
            if patched and image.patched.hex() not in patched:
                yield _finding(
                    name, Code.KERNEL_PATCHED, image.name, " or ".join(patched), image.patched.hex()
                )

    def _claims(self, reference: Reference, rule: KernelRule | None) -> tuple[tuple[str, str], ...]:
        images = self._images.values()
        kernel = next((image for image in images if image.name == VMLINUX), None)
        first_use = sorted(image.name for image in images if not image.sha256)
        return (
            ("kernel", kernel.path or "no file" if kernel is not None else "not read"),
            ("images", str(len(self._images))),
            ("golden", f"{sum(image.compared for image in images)} bytes of files"),
            ("pinned", f"{sum(image.pinned for image in images)} bytes since first sight"),
            ("first use", " ".join(first_use)[:200] or "none"),
            ("sites changed", str(self._sites)),
            ("traced", str(self._traced)),
        )


def expected(reference: Reference, image: KernelImage) -> tuple[str, ...]:
    """Digests accepted for the file of an image. /lib is /usr/lib where they are merged: a package
    lists the one and the kernel names the other."""
    rule = reference.kernel
    found: set[str] = set()
    for path in {image.path, image.path.removeprefix("/usr"), f"/usr{image.path}"} - {""}:
        found.update(reference.expected(path))
        if rule is not None:
            found.update(rule.builds.get(path, ()))
    return tuple(sorted(found))


class _Callee:
    """The one function that a changed site leads to."""

    def __init__(self, item: KernelSite, approved: set[str]) -> None:
        self._address = branch(item.seen, item.address)
        if len(item.seen) == 6:
            distance = int.from_bytes(item.seen[2:], "little", signed=True)
            self._address = item.address + 6 + distance & (1 << 64) - 1
        module = item.callee.partition(" [")[2].removesuffix("]")
        ftrace = item.kind in (SiteKind.FTRACE, SiteKind.FTRACE_CALL) and is_ftrace_entry(item.callee)
        self._name = item.callee if not module or module in approved or ftrace else ""

    def function(self, address: int) -> str:
        return self._name if address == self._address else ""


def _word(item: KernelSite, approved: set[str]) -> str:
    if item.kind not in RUNTIME:
        return ""
    site = Site(SiteKind(item.kind), item.address, item.compiled, item.target)
    return settle(site, item.seen, _Callee(item, approved))


def _code_of(area: str) -> Code:
    if area.startswith(_TABLE) or area == "idt_table":
        return Code.KERNEL_TABLE_ALTERED
    return Code.KERNEL_TEXT_ALTERED if "text" in area else Code.KERNEL_RODATA_ALTERED


def _expected(item: KernelAltered) -> str:
    if item.expects:
        return item.expects
    at_site = f" or another legal form of a {item.site} site" if item.site else ""
    return f"bytes {item.expected.hex(' ')}{at_site}"


def _finding(component: str, code: Code, subject: str, expected: str, seen: str, where: str = "") -> Finding:
    return Finding(component, code.value, Severity.CRITICAL, subject, expected, seen, where)
