"""A survey has hostd's own files, whatever they hold and wherever they stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from hostd.measurer import survey as module
from hostd.measurer.survey import survey


def surveyed(prefixes: Sequence[Path]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in survey([f"{path}/" for path in prefixes]):
        found.update(part or {})
    return found


def test_own_files_below_a_prefix_where_only_code_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, system = tmp_path / "opt", tmp_path / "usr-lib"
    for folder in (root, system):
        folder.mkdir()
    (root / "module.py").write_text("pass")
    (system / "own.conf").write_text("u hostd\n")
    (system / "other.conf").write_text("nothing\n")
    monkeypatch.setattr(module, "OWN_PATHS", (str(system / "own.conf"),))
    monkeypatch.setattr(module, "installation", lambda: (f"{root}/",))

    assert surveyed([system]) == {}, "without the installation nothing of hostd's is asked for"
    found = surveyed([system, root])
    assert set(found) == {str(system / "own.conf"), str(root / "module.py")}
    assert found[str(system / "own.conf")] == hashlib.sha256(b"u hostd\n").digest()
