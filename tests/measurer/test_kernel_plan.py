"""Passes over kernel memory: what changed, what explains it, and what the judge makes of both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from hostd.core.appraise_kernel import KernelJudge
from hostd.core.codes import Code
from hostd.core.findings import KERNEL, Verdict
from hostd.core.patchsites import NOPS, Site, SiteKind
from hostd.core.reading_kernel import MAX_SITES, KernelImage, KernelReading
from hostd.core.readings import Missing
from hostd.core.reference import Reference
from hostd.core.rule_kernel import KernelRule
from hostd.measurer import kernel_operations as operations
from hostd.measurer.kernel import KernelProbe
from hostd.measurer.kernel_built import CHUNK, BuiltImage, Sites, pack_area, pack_sites
from hostd.measurer.kernel_plan import (
    ATTEMPTS,
    PART_BYTES,
    Comparer,
    Plan,
    Planned,
    SymbolBook,
    carry_over,
    make_plan,
)
from hostd.measurer.tags import Tagger
from hostd.platform.kallsyms import Symbols, pack_symbols
from tests.support.kernelelf import Memory

TEXT = 0xFFFFFFFF81000000
SIZE = PART_BYTES + CHUNK + 100
OPS = 0xFFFFFFFFC0010000
RUN = TEXT + 0x2000
ROWS = [
    (TEXT, b"start", True),
    (TEXT + 0x1000, b"run_vcpu", True),
    (RUN, b"svm_run", True),
    (TEXT + 0x3000, b"ftrace_caller", True),
    (OPS, b"ops [kvm]", False),
]
EDGE = TEXT + CHUNK - 2
"""A jump label that two chunks share."""
REST = TEXT + 0x1000000
"""Another area, whose chunks have the same numbers."""
SITES = [
    Site(SiteKind.JUMP, TEXT + 0x1010, NOPS[4], TEXT + 0x1040),
    Site(SiteKind.JUMP, EDGE, NOPS[4], EDGE + 0x40),
    Site(SiteKind.FTRACE, TEXT + 0x1000, NOPS[4]),
    Site(SiteKind.CALL, TEXT + 0x1020, b"\xe8\0\0\0\0"),
]


class Kernel:
    """One image in memory, its plan, and a judge that knows it."""

    def __init__(self) -> None:
        self.memory = Memory()
        text = bytearray(SIZE)
        for site in SITES:
            at = site.address - TEXT
            text[at : at + len(site.compiled)] = site.compiled
        self.memory.put(TEXT, bytes(text))
        table = RUN.to_bytes(8, "little") + bytes(16) + (5).to_bytes(8, "little")
        self.memory.put(OPS, table)
        self.memory.put(REST, bytes(range(100)))
        addresses, kinds, compiled, targets = pack_sites(SITES)
        image = KernelImage(0, "vmlinux", "/boot/vmlinuz", b"s" * 32, "", b"p" * 32, SIZE, 100)
        self.built = BuiltImage(
            image,
            (
                pack_area(".text", TEXT, bytes(text)),
                pack_area("rest", REST, bytes(range(100))),
                pack_area("table ops", OPS, table, ((8, 16),)),
            ),
            *(addresses, kinds, compiled, targets),
            (),
            0,
        )
        self.planned = Planned(0, self.built, Sites(self.built))
        self.plan = make_plan(1, [self.planned])
        self.renewed = 0
        self.rows = list(ROWS)
        self.reads = 0
        book = SymbolBook(Symbols(pack_symbols(ROWS)), self.renew)
        self.comparer = Comparer(Tagger(), self.read_into, book)
        self.judge = KernelJudge()
        rule = KernelRule(builds={"/boot/vmlinuz": ("73" * 32,)}, patched={}, first_use=())
        self.reference = Reference(format="hostd-reference/2", version=1, created=0, host="h", kernel=rule)

    def renew(self) -> Symbols:
        self.renewed += 1
        return Symbols(pack_symbols(self.rows))

    def read_into(self, address: int, buffer: memoryview) -> None:
        self.reads += 1
        self.memory.read_into(address, buffer)

    def readings(self) -> list[KernelReading]:
        found = []
        for number, part in enumerate(self.plan.parts):
            ranges = [self.comparer.look(span) for span in part]
            chunks = [chunk for span in part for chunk in span.chunks]
            sites = [site for chunk in chunks for site in chunk.sites]
            altered = [item for chunk in chunks for item in chunk.altered]
            found.append(
                KernelReading(
                    part=number,
                    parts=len(self.plan.parts),
                    plan=self.plan.number,
                    images=(self.built.image,) if number == 0 else (),
                    ranges=tuple(ranges),
                    sites=tuple(sites[:MAX_SITES]),
                    sites_total=sum(chunk.sites_total for chunk in chunks),
                    altered=tuple(altered),
                    altered_total=sum(chunk.altered_total for chunk in chunks),
                )
            )
        return found

    def look(self) -> Verdict:
        verdicts = [self.judge.appraise(KERNEL, item, self.reference) for item in self.readings()]
        return next((verdict for verdict in verdicts if verdict.findings), verdicts[-1])


@pytest.fixture
def kernel() -> Kernel:
    kernel = Kernel()
    assert kernel.look().good
    return kernel


def on(site: Site) -> bytes:
    return b"\xe9" + (site.target - site.address - 5).to_bytes(4, "little", signed=True)


def call(site: Site, target: int) -> bytes:
    return b"\xe8" + (target - site.address - 5).to_bytes(4, "little", signed=True)


def test_parts_are_bounded_and_hold_every_byte_once(kernel: Kernel) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    for part in kernel.plan.parts:
        assert 0 < sum(span.length for span in part) <= PART_BYTES
        for span in part:
            for chunk in span.chunks:
                seen.setdefault(chunk.area.name, []).append((chunk.address, chunk.length))
    for name, start, size in ((".text", TEXT, SIZE), ("rest", REST, 100), ("table ops", OPS, 32)):
        at = start
        for address, length in sorted(seen[name]):
            assert address == at
            at += length
        assert at == start + size


def test_an_unchanged_pass_reads_once_and_compares_nothing(kernel: Kernel) -> None:
    kernel.reads = 0
    assert kernel.look().good
    assert kernel.reads == sum(len(part) for part in kernel.plan.parts)


@pytest.mark.parametrize("index", [0, 1])
def test_a_jump_label_may_be_switched_on_and_off(kernel: Kernel, index: int) -> None:
    site = SITES[index]
    first = [item.tag for reading in kernel.readings() for item in reading.ranges]
    kernel.memory.flip(site.address, on(site))
    verdict = kernel.look()
    assert verdict.good
    assert dict(verdict.claims)["sites changed"] == "12"[index], "one for each chunk that it is in"
    assert [item.tag for reading in kernel.readings() for item in reading.ranges] == first
    kernel.memory.flip(site.address, NOPS[4])
    verdict = kernel.look()
    assert verdict.good
    assert dict(verdict.claims)["sites changed"] == "0"


@pytest.mark.parametrize("index", [0, 1])
def test_a_jump_elsewhere_is_a_finding(kernel: Kernel, index: int) -> None:
    site = SITES[index]
    kernel.memory.flip(site.address, call(site, site.target))
    assert kernel.look().findings
    kernel.memory.flip(site.address, on(replace_target(site)))
    verdict = kernel.look()
    assert {finding.code for finding in verdict.findings} == {Code.KERNEL_TEXT_ALTERED}
    assert "jump-label" in verdict.findings[0].expected
    kernel.memory.flip(site.address, NOPS[4])
    assert kernel.look().good


def replace_target(site: Site) -> Site:
    return Site(site.kind, site.address, site.compiled, site.target + 1)


@pytest.mark.parametrize("at", [0, 0x100F, 0x1015, CHUNK - 3, CHUNK + 3, PART_BYTES, SIZE - 1])
def test_any_other_byte_is_a_finding(kernel: Kernel, at: int) -> None:
    was = kernel.memory.read(TEXT + at, 1)
    kernel.memory.flip(TEXT + at, bytes((was[0] ^ 1,)))
    verdict = kernel.look()
    (finding,) = verdict.findings
    assert finding.code == Code.KERNEL_TEXT_ALTERED
    assert finding.subject.startswith("ftrace_caller+" if at > 0x3000 else "run_vcpu+" if at else "start+0x0")
    assert f"{TEXT + at:#x}" in finding.where
    assert kernel.look().findings, "a second look finds it as well"
    kernel.memory.flip(TEXT + at, was)
    assert kernel.look().good


def test_a_static_call_and_a_hook_are_judged_by_where_they_lead(kernel: Kernel) -> None:
    hook, static = SITES[2], SITES[3]
    kernel.memory.flip(static.address, call(static, RUN))
    kernel.memory.flip(hook.address, call(hook, TEXT + 0x3000))
    verdict = kernel.look()
    assert verdict.good
    assert dict(verdict.claims)["traced"] == "1"
    kernel.memory.flip(hook.address, call(hook, RUN))
    (finding,) = kernel.look().findings
    assert finding.subject == "run_vcpu+0x0"
    kernel.memory.flip(hook.address, NOPS[4])
    kernel.memory.flip(static.address, call(static, RUN + 4))
    assert kernel.look().findings


def test_thousands_of_changes_in_one_chunk_are_each_explained(kernel: Kernel) -> None:
    sites = [Site(SiteKind.FTRACE, TEXT + at, NOPS[4]) for at in range(0, CHUNK - 8, 8)]
    text = bytearray(kernel.memory.read(TEXT, SIZE))
    for site in sites:
        text[site.address - TEXT : site.address - TEXT + 5] = NOPS[4]
    packed = pack_sites(sites)
    areas = (pack_area(".text", TEXT, bytes(text)), *kernel.built.areas[1:])
    kernel.built = replace(
        kernel.built, areas=areas, addresses=packed[0], kinds=packed[1], compiled=packed[2], targets=packed[3]
    )
    kernel.planned = Planned(0, kernel.built, Sites(kernel.built))
    kernel.plan, kernel.judge = make_plan(1, [kernel.planned]), KernelJudge()
    kernel.memory.flip(TEXT, bytes(text))
    assert kernel.look().good
    for site in sites:
        kernel.memory.flip(site.address, call(site, TEXT + 0x3000))
    verdict = kernel.look()
    assert verdict.good, verdict.findings
    assert dict(verdict.claims)["sites changed"] == str(len(sites))
    kernel.memory.flip(sites[-1].address, call(sites[-1], RUN))
    assert kernel.look().findings


def test_a_function_that_is_new_is_looked_up(kernel: Kernel) -> None:
    static = SITES[3]
    kernel.memory.flip(static.address, call(static, TEXT + 0x5000))
    kernel.rows.append((TEXT + 0x5000, b"made_while_running", True))
    assert kernel.look().good
    assert kernel.renewed == 1


def test_symbols_are_not_read_for_every_finding(kernel: Kernel) -> None:
    for at in range(3):
        kernel.memory.flip(TEXT + 0x4000 + at, b"\xff")
        assert kernel.look().findings
    assert kernel.renewed == 1


def test_a_patch_in_the_making_is_read_again(kernel: Kernel) -> None:
    site = SITES[0]
    kernel.memory.flip(site.address, b"\xcc")
    start, seen = kernel.comparer._read_into, 0

    def read_into(address: int, buffer: memoryview) -> None:
        nonlocal seen
        start(address, buffer)
        if address == TEXT:
            seen += 1
            if seen == ATTEMPTS - 1:
                kernel.memory.flip(site.address, on(site))

    kernel.comparer._read_into = read_into
    assert kernel.look().good
    kernel.memory.flip(site.address, b"\xcc")
    seen = ATTEMPTS
    assert kernel.look().findings, "a trap that stays"


def test_a_tables_slot_is_named_and_its_links_are_free(kernel: Kernel) -> None:
    kernel.memory.flip(OPS + 8, b"\xff" * 16)
    assert kernel.look().good, "links of a list that others move"
    kernel.memory.flip(OPS, (TEXT + 0x1000).to_bytes(8, "little"))
    (finding,) = kernel.look().findings
    assert finding.code == Code.KERNEL_TABLE_ALTERED
    assert (finding.subject, finding.expected) == ("ops+0x0", "svm_run")
    assert finding.seen.startswith("run_vcpu (0x")
    kernel.memory.flip(OPS, RUN.to_bytes(8, "little"))
    kernel.memory.flip(OPS + 24, (6).to_bytes(8, "little"))
    (finding,) = kernel.look().findings
    assert finding.subject == "ops+0x18"


def test_a_new_plan_keeps_what_was_judged(kernel: Kernel) -> None:
    kernel.memory.flip(SITES[0].address, on(SITES[0]))
    assert kernel.look().good
    new = make_plan(2, [kernel.planned])
    carry_over(kernel.plan, new)
    kernel.plan = new
    kernel.reads = 0
    assert kernel.look().good
    assert kernel.reads == sum(len(part) for part in new.parts), "nothing was compared anew"
    assert isinstance(new, Plan)
    for address in (TEXT, REST):
        kernel.memory.flip(address, b"\xff")
        assert kernel.look().findings, "nothing was lost on the way"
        kernel.memory.flip(address, b"\0")
        assert kernel.look().good


# ── Tables of operations at first sight ───────────────────────────────────────────────────────────────

SYMBOLS = Symbols(pack_symbols(ROWS))


def inside(address: int) -> bool:
    return TEXT <= address < TEXT + SIZE or OPS <= address < OPS + 4096


@pytest.mark.parametrize(
    ("table", "golden", "seen", "good"),
    [
        ("kvm_x86_ops", 0, RUN, True),
        ("kvm_x86_ops", 0, 0, True),
        ("kvm_x86_ops", 0, 4096, True),
        ("kvm_x86_ops", 0, OPS + 8, True),
        ("kvm_x86_ops", 0, RUN + 1, False),
        ("kvm_x86_ops", 0, 0xFF11223344556677, False),
        ("kvm_dev", 0, 0xFF11223344556677, True),
        ("kvm_dev", RUN, 0xFF11223344556677, False),
        ("kvm_chardev_ops", RUN, RUN, True),
        ("kvm_chardev_ops", RUN, TEXT, False),
        ("kvm_chardev_ops", RUN, 0, False),
        ("kvm_dev", 255, 232, True),
        ("kvm_dev", 255, RUN, False),
    ],
)
def test_slots_at_first_sight(table: str, golden: int, seen: int, good: bool) -> None:
    pair = [value.to_bytes(8, "little") for value in (golden, seen)]
    found = operations.wrong_slots(table, *pair, OPS, SYMBOLS, inside)
    assert (not found) == good
    if found:
        assert found[0].area == f"table {table}"
        assert found[0].expects
        assert found[0].leads


def test_interrupt_gates_lead_into_code() -> None:
    def gate(target: int, present: bool = True) -> bytes:
        return (
            (target & 0xFFFF).to_bytes(2, "little")
            + b"\x10\0\0"
            + bytes((0x8E if present else 0,))
            + (target >> 16 & 0xFFFF).to_bytes(2, "little")
            + (target >> 32).to_bytes(4, "little")
            + bytes(4)
        )

    good = gate(TEXT + 0x1000) + gate(RUN + 8) + gate(0, present=False)
    assert operations.gates(good, SYMBOLS, 0) == []
    (item,) = operations.gates(good + gate(0xFF11223344556677), SYMBOLS, OPS)
    assert (item.symbol, item.address) == ("idt_table+0x30", OPS + 0x30)
    assert len(operations.gates(good + gate(OPS + 16), SYMBOLS, OPS)) == 1, "data is no code"


# ── The probe where there is no kcore ─────────────────────────────────────────────────────────────────


@pytest.mark.skipif(Path("/proc/kcore").exists(), reason="this kernel has /proc/kcore")
def test_without_kcore_it_is_absent() -> None:
    before = len(os.listdir("/proc/self/fd"))
    probe = KernelProbe()
    for part in (0, 3):
        reading = probe.read(part)
        assert isinstance(reading, Missing)
        assert reading.absent
        assert "/proc/kcore" in reading.reason
    probe.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_sites_survive_packing() -> None:
    packed = pack_sites([*SITES, SITES[0]])
    image = replace(Kernel().built, addresses=packed[0])
    sites = Sites(image)
    assert len(sites) == len(SITES)
    for site in SITES:
        for at in range(len(site.compiled)):
            assert sites.holding(site.address + at) == site
        assert sites.holding(site.address + len(site.compiled)) is None
