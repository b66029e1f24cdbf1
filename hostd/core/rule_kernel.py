"""Reference values of component `kernel` (pure)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostd.core.reading_kernel import KernelReading

MAX_BUILDS: Final = 8192
"""Files of a kernel package with all its modules are some 4,000."""
Path = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Image = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Hex256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class KernelRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which kernel and modules may run, and how the boot may have patched them.

    Raises:
        ValueError: a list is not sorted, has a value twice, or is empty.
    """

    builds: dict[Path, tuple[Hex256, ...]]
    """Path of a kernel image or module file → accepted SHA-256. `Reference.expected` is asked as well."""
    patched: dict[Image, tuple[Hex256, ...]]
    """Image (`vmlinux` or a module) → accepted digests of the bytes that boot or loading patched: which
    alternatives this processor and these mitigations chose. An image that is not here may be patched in
    any way that its patch sites allow, and stays so."""
    first_use: tuple[Image, ...]
    """Images accepted although this host has no file of them to compare with."""

    def __post_init__(self) -> None:
        lists = [*self.builds.items(), *self.patched.items()]
        for name, values in (*lists, ("first_use", self.first_use)):
            if any(a >= b for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name}: not sorted, or a value twice")
        for name, values in lists:
            if not values:
                raise ValueError(f"{name}: no digest")


def propose_kernel(readings: Iterable[KernelReading]) -> KernelRule:
    """The rule that accepts the host as these readings show it, for an officer to review.

    Raises:
        ValueError: the readings are not all parts of one plan in order, or show something altered.
    """
    parts = list(readings)
    if not parts or len(parts) != parts[0].parts:
        raise ValueError("not a complete reading of the kernel")
    for number, part in enumerate(parts):
        if (part.part, part.plan, part.parts) != (number, parts[0].plan, len(parts)):
            raise ValueError("not a complete reading of the kernel")
        if part.altered_total:
            named = part.altered[0].symbol if part.altered else "somewhere"
            raise ValueError(f"the kernel is altered: {named}")
    builds: dict[str, set[str]] = {}
    patched: dict[str, set[str]] = {}
    for image in parts[0].images:
        patched.setdefault(image.name, set()).add(image.patched.hex())
        if image.sha256:
            builds.setdefault(image.path, set()).add(image.sha256.hex())
    return KernelRule(
        builds={path: tuple(sorted(values)) for path, values in sorted(builds.items())},
        patched={name: tuple(sorted(values)) for name, values in sorted(patched.items())},
        first_use=tuple(sorted({image.name for image in parts[0].images if not image.sha256})),
    )
