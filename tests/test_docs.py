"""The pages say what the code does, where that can be checked by reading both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hostd.core.codes import Code
from hostd.core.entry import Entry
from hostd.core.findings import Kind
from hostd.vault import allowance, identifying, measuring, observers, receipts, shares, vault, witness
from tests.vault import test_gate_traces as traces

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MEASUREMENT = (ROOT / "docs/measurement.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
GATE = (ROOT / "docs/gate.md").read_text()


@pytest.mark.parametrize("code", Code)
def test_every_finding_is_explained(code: Code) -> None:
    assert f"`{code.value}`" in MEASUREMENT


@pytest.mark.parametrize("kind", Kind)
def test_every_component_is_in_the_table(kind: Kind) -> None:
    assert f"| `{kind.value}` |" in MEASUREMENT


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_tests_are_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    for line in text.splitlines():
        folder = Path()
        # A name without a folder is beside the one before it.
        for named in map(Path, re.findall(r"`((?:tests/[\w/]*)?test_\w+\.py|tests/[\w./]+\.py)", line)):
            folder = named.parent if named.parts[0] == "tests" else folder
            assert (ROOT / folder / named.name).exists(), named


@pytest.mark.parametrize("field", Entry.__struct_fields__)
def test_every_field_of_an_entry_is_named(field: str) -> None:
    assert f"`{field}`" in ARCHITECTURE.partition("## Ledger and quotes")[2].partition("\n## ")[0]


def test_every_event_of_the_ledger_is_in_the_table() -> None:
    text = "".join(path.read_text() for path in (ROOT / "hostd/vault").glob("*.py"))
    events = set(re.findall(r'(?:record\(\s*|event=)"([a-z]+)"', text))
    assert len(events) > 10
    first = [line.split("|")[1] for line in ARCHITECTURE.splitlines() if line.startswith("| `")]
    assert events <= set(re.findall(r"`([a-z]+)`", "".join(first)))


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (GATE, f"{len(traces.MUTATIONS)} checks of the gate taken away"),
        (GATE, f"{traces.REQUESTS:,} requests a run"),
        (GATE, f"for {shares.HOLD_NS // 1_000_000} ms\n"),
        (GATE, f"every {vault.TICK_S * 1e3:.0f} ms at least"),
        (GATE, {8: "a caller has an eighth of a batch"}[shares.PART]),
        (ARCHITECTURE, f"| {measuring.MAX_READINGS}; {identifying.MAX_OPEN} file identifications"),
        (ARCHITECTURE, f"file identifications of {measuring.IDENTIFY_DEADLINE_S:.0f} s |"),
        (ARCHITECTURE, f"{observers.MAX_PER_CALLER} waiting per caller; then {witness.MAX_QUOTING} per"),
        (
            ARCHITECTURE,
            f"{allowance.PER_SECOND} units a second of one caller, {allowance.ALL_PER_SECOND:,}",
        ),
        (ARCHITECTURE, f"a receipt is {receipts.RECEIPT_COST}, a page {receipts.AUDIT_COST})"),
    ],
)
def test_numbers_are_those_of_the_code(page: str, said: str) -> None:
    assert said in page
