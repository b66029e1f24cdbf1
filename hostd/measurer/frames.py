"""Page frames of our own mappings, to compare processes with.

A hundred processes that map the same files are compared with the same frames, so these are read once for
all that are looked at within `FRESH_S`. That is no weaker than reading them for each: before the kernel gives
a page of the page cache another frame (migration, reclaim, truncation) it takes the old frame out of every
page table (mm/rmap.c), so a process that still shows the frame we had still shows the file's page. Where
anything differs they are read anew before it counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.platform.pages import ENTRY_BYTES, PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hostd.platform.pages import OwnPages, Run

FRESH_S: Final = 0.01
MAX_SHAPES: Final = 32
"""Different sets of files kept; 90 kB each for QEMU."""

Shape = tuple[tuple[int, int], ...]
"""(address in our memory, pages), in the order of the entries."""


class Frames:
    """Entries of our page table for one shape."""

    __slots__ = ("entries", "taken", "version")

    def __init__(self) -> None:
        self.entries = b""
        self.taken = float("-inf")
        self.version = 0
        """Moves when the entries change; never used twice in this process."""


class OwnFrames:
    """Our own entries, for the shapes that processes have."""

    def __init__(self, own_pages: OwnPages, clock: Callable[[], float]) -> None:
        self._own_pages = own_pages
        self._clock = clock
        self._shapes: dict[Shape, Frames] = {}
        self._versions = 0

    def of(self, shape: Shape, *, anew: bool) -> Frames:
        """Entries of `shape` as of now, or of `FRESH_S` ago unless `anew`."""
        frames = self._shapes.pop(shape, None)
        if frames is None:
            frames = Frames()
            while len(self._shapes) >= MAX_SHAPES:
                del self._shapes[next(iter(self._shapes))]
        self._shapes[shape] = frames
        now = self._clock()
        if anew or now - frames.taken > FRESH_S:
            entries = b"".join(
                self._own_pages.entries(own, pages) if own else bytes(pages * ENTRY_BYTES)
                for own, pages in shape
            )
            if entries != frames.entries or not frames.version:
                self._versions += 1
                frames.version = self._versions
                frames.entries = entries
            frames.taken = now
        return frames


def shape_of(runs: Sequence[Run]) -> Shape:
    """The shape of runs that are sorted by our own address: the same for all processes that map the same,
    wherever the loader put it in each."""
    shape: list[tuple[int, int]] = []
    for run in runs:
        own, pages = shape[-1] if shape else (0, 0)
        if own and own + pages * PAGE == run.own:
            shape[-1] = own, pages + run.pages
        else:
            shape.append((run.own, run.pages))
    return tuple(shape)
