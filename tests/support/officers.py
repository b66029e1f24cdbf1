"""Officers' keys and signatures, made by the real ssh-keygen."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guestlib.sshkeys import PublicKey, parse_public_key

if TYPE_CHECKING:
    from pathlib import Path

NAMESPACE = "hostd-manifest"


@dataclass(frozen=True)
class Officer:
    path: Path
    """The private key; the public one is beside it, with `.pub`."""

    @property
    def line(self) -> str:
        return self.path.with_suffix(".pub").read_text().strip()

    @property
    def key(self) -> PublicKey:
        return parse_public_key(self.line)

    def sign(self, message: bytes, namespace: str = NAMESPACE, *options: str) -> bytes:
        return keygen("-Y", "sign", *options, "-n", namespace, "-f", str(self.path), given=message)


def keygen(*arguments: str, given: bytes = b"") -> bytes:
    done = subprocess.run(
        ["ssh-keygen", *arguments], input=given, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def make(directory: Path, name: str, kind: str = "ed25519", bits: int | None = None) -> Officer:
    path = directory / name
    size = () if bits is None else ("-b", str(bits))
    keygen("-q", "-t", kind, *size, "-N", "", "-C", name, "-f", str(path))
    return Officer(path)
