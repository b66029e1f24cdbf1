"""Operators ↔ vault: how the manifest in force stands."""

from __future__ import annotations

import msgspec

from hostd.core.reading_types import Struct


class ManifestStatus(Struct, frozen=True, tag="manifest-status"):
    """What is coming and going in the manifest in force, and what of it the measurer has seen."""


class ComingDigest(msgspec.Struct, frozen=True):
    path: str
    digest: str
    seen: bool
    """A hypervisor maps it, or the kernel's log of this boot has it."""


class RetiringDigest(msgspec.Struct, frozen=True):
    path: str
    digest: str
    retires: int
    """Unix time, seconds."""
    seen: bool


class ManifestReport(msgspec.Struct, frozen=True):
    digest: str
    version: int
    created: int
    signed_by: tuple[str, ...]
    files: int
    next: tuple[ComingDigest, ...]
    retire: tuple[RetiringDigest, ...]
    """What has not retired yet."""
    remove: tuple[str, ...]
    """Files that may be missing."""
    unseen: int
    """Digests of `files` that were not seen."""
    seen: dict[str, tuple[str, ...]]
    """Path → digests seen of those that the document names under `files`, `next` or `retire`."""
