"""Metrics ↔ vault: one question, one answer. Nothing in it names a key, a tenant or a caller."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_types import Struct

Label = Annotated[str, msgspec.Meta(max_length=128)]
Labels = Annotated[tuple[tuple[Label, Label], ...], msgspec.Meta(max_length=8)]
MAX_SAMPLES = 4096


class Scrape(Struct, frozen=True, tag="scrape"):
    pass


class Sample(Struct, frozen=True):
    name: Label
    labels: Labels
    value: float


class Histogram(Struct, frozen=True):
    """`counts[i]` are the observations in (bounds[i-1], bounds[i]]; the last is above all bounds."""

    name: Label
    labels: Labels
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Snapshot(Struct, frozen=True, tag="snapshot"):
    counters: Annotated[tuple[Sample, ...], msgspec.Meta(max_length=MAX_SAMPLES)]
    gauges: Annotated[tuple[Sample, ...], msgspec.Meta(max_length=MAX_SAMPLES)]
    histograms: Annotated[tuple[Histogram, ...], msgspec.Meta(max_length=MAX_SAMPLES)]
