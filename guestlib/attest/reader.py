"""A cursor over bytes that refuses to read past the end or to leave anything behind. Big-endian."""

from __future__ import annotations

from guestlib.errors import MalformedError


class Reader:
    """Reads `data`, which is `what` in errors. Every method raises `MalformedError` on short data."""

    __slots__ = ("_data", "_position", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._position = 0
        self._what = what

    def take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise self.refuse(f"truncated at byte {len(self._data)}")
        data = self._data[self._position : end]
        self._position = end
        return data

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def sized(self, limit: int) -> bytes:
        """A TPM2B: two bytes of length, then that many bytes, at most `limit`."""
        size = self.u16()
        if size > limit:
            raise self.refuse(f"a field of {size} bytes, at most {limit} are allowed")
        return self.take(size)

    def end(self) -> None:
        """Nothing may be left."""
        left = len(self._data) - self._position
        if left:
            raise self.refuse(f"{left} trailing bytes")

    def refuse(self, reason: str) -> MalformedError:
        """The error to raise for `reason`."""
        return MalformedError(f"{self._what}: {reason}")
