"""Promise: who floods the gate fills his own share of each batch and nobody else's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e import flood

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
BATCH = 32
COUNT = 60


def test_a_flood_passes_by(binary: Path) -> None:
    """The flooding machine has up to 1,024 requests waiting. A quiet one's request waits for the batch under
    way, perhaps for one that was ready before its readings were, and is in the next, where its neighbour has
    at most the rest."""
    seen = flood.observe(binary, count=COUNT, batch=BATCH)
    print(f"{len(seen.others)} quiet requests, most others between: {max(seen.others)}; flood: {seen.flood}")
    assert len(seen.others) == COUNT
    assert seen.flood > 10 * BATCH
    assert sorted(seen.others)[COUNT // 2] <= 4 * BATCH
    assert max(seen.others) <= 10 * BATCH < flood.CONNECTIONS * flood.DEPTH
