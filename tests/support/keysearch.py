"""Looking for keys in processes and files, whole and in pieces.

What is freed loses its first bytes to the allocator, and what is overwritten in part keeps the rest. So what
is looked for is each eight bytes of a number; no eight are there by chance. Memory is taken as words of eight
bytes: of any copy of fifteen bytes, wherever it begins, one word is part of the number.
"""

from __future__ import annotations

import base64
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK: Final = 8 << 20
_WORD: Final = 8


def numbers(material: bytes) -> list[bytes]:
    """What of a key's material is secret: itself (32 bytes), the scalar or the seed of PKCS#8 DER, or the
    private numbers of RSA. Each lies in memory as it is, or reversed (a bignum)."""
    if len(material) == 32:
        return [material]
    private = load_der_private_key(material, password=None)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return [private.private_numbers().private_value.to_bytes(32, "big")]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return [private.private_bytes_raw()]
    assert isinstance(private, rsa.RSAPrivateKey)
    n = private.private_numbers()
    return [x.to_bytes((x.bit_length() + 7) // 8, "big") for x in (n.d, n.p, n.q, n.dmp1, n.dmq1, n.iqmp)]


def _words(form: bytes) -> Iterator[int]:
    for at in range(len(form) - _WORD + 1):
        yield int.from_bytes(form[at : at + _WORD], sys.byteorder)


def _texts(number: bytes) -> Iterator[bytes]:
    yield number.hex().encode()
    yield number.hex().upper().encode()
    yield base64.b64encode(number).rstrip(b"=")[:-1]


class Search:
    """Looks for secrets: in pieces, in both orders, and as text (hex in both cases, base64)."""

    def __init__(self, secrets: dict[str, bytes]) -> None:
        """`secrets`: name → material (see `numbers`)."""
        self._words: dict[int, tuple[str, bytes]] = {}
        """Word → name, and the text that has to be there whole (digits may be there by chance)."""
        for name, material in secrets.items():
            for number in numbers(material):
                for text in _texts(number):
                    self._words |= dict.fromkeys(_words(text), (name, text))
                for form in (number, number[::-1]):
                    self._words |= dict.fromkeys(_words(form), (name, b""))

    def in_bytes(self, data: bytes) -> set[str]:
        with memoryview(data + bytes(-len(data) % _WORD)) as whole:
            words = self._words.keys() & whole.cast("Q")
        return {name for name, text in map(self._words.__getitem__, words) if text in data}

    def in_folder(self, folder: Path) -> dict[str, set[str]]:
        files = (p for p in folder.rglob("*") if p.is_file())
        return {str(p): found for p in files if (found := self.in_bytes(p.read_bytes()))}

    def in_memory(self, pid: int) -> set[str]:
        """All that a process has written or could write: every readable page but those of files that it can
        only read."""
        return set(self.places(pid))

    def places(self, pid: int) -> dict[str, set[str]]:
        """Name → the mappings that it was found in (`[heap]`, `[stack]`, a file, or nothing)."""
        found: dict[str, set[str]] = {}
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        try:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                span, permissions, _, _, _, *path = line.split(maxsplit=5)
                start, end = (int(part, 16) for part in span.split("-"))
                where = path[0] if path else ""
                if "r" in permissions and not where.startswith("[v") and ("w" in permissions or not where):
                    for name in self._in_range(memory, start, end):
                        found.setdefault(name, set()).add(where)
        finally:
            os.close(memory)
        return found

    def _in_range(self, memory: int, start: int, end: int) -> set[str]:
        found: set[str] = set()
        for at in range(start, end, _CHUNK):
            # A page that cannot be read (memfd_secret, a hole in a file) is not there to be searched.
            with contextlib.suppress(OSError):
                found |= self.in_bytes(os.pread(memory, min(_CHUNK, end - at), at))
        return found
