"""Copies of file segments as they were when the file was identified, to show a difference byte by byte.

Kept compressed (zlib's fastest: 43 MB of QEMU and its libraries take 17 MB): they are needed only
when a tag differs, and then one chunk at a time. A judgement never rests on them. Over the bounds a
finding names the range without its bytes.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

from hostd.core.reading_types import WINDOW_BYTES
from hostd.platform.pages import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNK_BYTES: Final = 256 << 10
"""Compressing one takes 2 ms."""
MAX_COPIES: Final = 64 << 20
"""Compressed bytes in all."""
MAX_COPIES_PER_OWNER: Final = 32 << 20
"""Compressed bytes of the files that one process brought: QEMU with all its libraries has 17 MB."""
_LEVEL: Final = 1


class Copy:
    """One segment, in compressed chunks of `CHUNK_BYTES` (the last may be shorter)."""

    def __init__(self, chunks: tuple[bytes, ...]) -> None:
        self._chunks = chunks
        self.size = sum(map(len, chunks))
        """Bytes of memory."""

    def chunks(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            yield zlib.decompress(chunk)

    def differences(self, now: Callable[[int, int], bytes], limit: int) -> Iterator[tuple[int, bytes, bytes]]:
        """Pages that are not what they were, at most `limit`: offset of the first differing byte in the
        segment, and both sides from there on. `now(offset, length)` gives the bytes as they are now,
        fewer where there are none."""
        at = 0
        for chunk in self.chunks():
            seen = now(at, len(chunk))
            if seen != chunk:
                for page in range(0, len(chunk), PAGE):
                    was, is_now = chunk[page : page + PAGE], seen[page : page + PAGE]
                    if was != is_now:
                        if not limit:
                            return
                        limit -= 1
                        offset, before, after = first_difference(was, is_now)
                        yield at + page + offset, before, after
            at += len(chunk)


def compress(chunk: bytes | memoryview) -> bytes:
    return zlib.compress(chunk, _LEVEL)


def first_difference(expected: bytes, seen: bytes) -> tuple[int, bytes, bytes]:
    """Offset of the first differing byte and both sides from there on; (0, same, same) if none differs."""
    if expected == seen:
        return 0, expected[:WINDOW_BYTES], seen[:WINDOW_BYTES]
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, seen, strict=False)) if a != b),
        min(len(expected), len(seen)),
    )
    return at, expected[at : at + WINDOW_BYTES], seen[at : at + WINDOW_BYTES]
