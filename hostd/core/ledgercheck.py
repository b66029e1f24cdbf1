"""Finding the place where entries are not those that were recorded.

Pure. `audit` compares lines with leaf hashes that are known to be right and ends at the first that differs,
with a sentence that says what was done: edited, missing, out of order, inserted, cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from guestlib.attest.merkle import leaf_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    Leaves = Callable[[int, int], list[bytes]]
    """(start, count) → leaf hashes; fewer than asked for where the tree ends."""


class Fault(NamedTuple):
    """The first entry that is not as it was recorded."""

    at: int
    what: str


AHEAD: Final = 64
"""Lines looked at behind the first that differs, to tell a missing entry from an edited one."""


def audit(
    lines: Iterator[list[bytes]],
    leaves: Leaves,
    start: int,
    size: Callable[[], int],
    number_of: Callable[[bytes], int | None],
) -> Generator[int, None, Fault | None]:
    """Compares the lines of entries `start` to `size()` - 1 (with their newlines, in chunks). Yields up to
    which entry they agree; returns the first that is not, if any. `size` may grow meanwhile."""
    at = start
    for chunk in lines:
        bodies = [line.removesuffix(b"\n") for line in chunk]
        expected = leaves(at, min(len(bodies), size() - at)) if at < size() else []
        hashes = [leaf_hash(body) for body in bodies]
        if hashes == expected and chunk[-1].endswith(b"\n"):
            at += len(bodies)
            yield at
            continue
        agree = 0
        for one, other in zip(hashes, expected, strict=False):
            if one != other:
                break
            agree += 1
        ahead = bodies[agree : agree + AHEAD]
        if len(ahead) < AHEAD:
            ahead += [line.removesuffix(b"\n") for line in next(lines, [])][: AHEAD - len(ahead)]
        return Fault(at + agree, _explain(at + agree, ahead, leaves, size(), number_of))
    return None if at >= size() else Fault(at, f"{_entries(at, size() - 1)} missing at the end")


def _explain(
    at: int, bodies: list[bytes], leaves: Leaves, size: int, number_of: Callable[[bytes], int | None]
) -> str:
    """`bodies[0]` stands where entry `at` should."""
    if at >= size:
        return f"something stands after the last entry, {size - 1}"
    hashes = [leaf_hash(body) for body in bodies]
    expected = leaves(at, AHEAD)
    here, wanted = hashes[0] if hashes else b"", expected[0]
    claimed = number_of(bodies[0]) if bodies else None
    there = _place(here, claimed, at, expected, leaves, size)
    if wanted in hashes[1:]:
        found = hashes.index(wanted)
        if there is not None and there > at:
            return f"entries {at} and {there} are out of order"
        return f"{found} line{'s' if found > 1 else ''} inserted before entry {at}"
    if there is not None and there > at:
        return f"{_entries(at, there - 1)} missing"
    if there is not None:
        return f"entry {there} stands in the place of entry {at}"
    return f"entry {at} was edited"


def _place(
    here: bytes, claimed: int | None, at: int, expected: list[bytes], leaves: Leaves, size: int
) -> int | None:
    """Which entry a line really is; None: none of this ledger that it could be."""
    if here in expected:
        return at + expected.index(here)
    if claimed is not None and claimed < size and leaves(claimed, 1) == [here]:
        return claimed
    return None


def _entries(first: int, last: int) -> str:
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"


def fault_of(check: Generator[int, None, Fault | None]) -> Fault | None:
    """Runs an audit to its end."""
    while True:
        try:
            next(check)
        except StopIteration as end:
            fault: Fault | None = end.value
            return fault
