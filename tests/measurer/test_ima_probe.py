"""The IMA log at length: what the first replay costs, and what every later pass does."""

from __future__ import annotations

from pathlib import Path

from guestlib.attest.imalog import parse_entries
from hostd.core.readings import ImaReading
from hostd.measurer.ima import MAX_READING_BYTES, ImaProbe
from hostd.measurer.ima_bench import ENTRIES, made_entry, measure


def test_a_hundred_thousand_entries() -> None:
    cost = measure(ENTRIES)
    print(
        f"{cost.entries} entries: first pass {cost.first_s:.2f} s, {cost.replay_us_per_entry:.1f} µs an "
        f"entry; idle {cost.idle_us:.0f} µs"
    )
    # Targets are 1 s and 1000 µs on an idle machine; here others are at work.
    assert cost.first_s < 4
    assert cost.idle_us < 4000


def test_readings_are_whole_entries_and_bounded(tmp_path: Path) -> None:
    data = b"".join(made_entry(f"/usr/bin/{n}", bytes(32)) for n in range(20_000))
    (tmp_path / "log").write_bytes(data)
    probe, position, parts = ImaProbe(tmp_path / "log"), 0, 0
    while True:
        reading = probe.read(position)
        assert isinstance(reading, ImaReading)
        assert len(reading.data) <= MAX_READING_BYTES
        assert reading.data == data[position : position + len(reading.data)]
        assert parse_entries(reading.data)[-1].end == len(reading.data)
        position, parts = position + len(reading.data), parts + 1
        if not reading.more:
            break
    assert position == len(data)
    assert parts == len(data) // MAX_READING_BYTES + 1
