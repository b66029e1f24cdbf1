"""The pages say what the code does, where that can be checked by reading both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hostd.core.codes import Code
from hostd.core.findings import Kind

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MEASUREMENT = (ROOT / "docs/measurement.md").read_text()


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
    for named in re.findall(r"`(tests/[\w./]+\.py)", text):
        assert (ROOT / named).exists(), named
