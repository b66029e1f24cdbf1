"""Manifests on this machine's disk: documents, their signatures beside them, and digests of files.

The signatures of `FILE` are in `FILE.sig`, one SSHSIG block after the other. Signing is ssh-keygen's work, so
that agents and security keys do as they are; nothing here ever reads a private key.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from guestlib.errors import MalformedError, NotFoundError
from hostd.core.codefile import holds_code
from hostd.core.reference import (
    MAX_REFERENCE_BYTES,
    NAMESPACE,
    MalformedReferenceError,
    Reference,
    encode_reference,
    parse_reference,
)
from hostd.ipc import operating as adm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostd.admin.context import Context

IN_FORCE: Final = "@"
"""Where a document is asked for: the one in force, from the vault."""
CHUNK_BYTES: Final = 1 << 20


def load(context: Context, name: str) -> Reference:
    """A document from a file, or (`@`) the one in force.

    Raises:
        MalformedError: it is none.
        OSError: it cannot be read.
        HostdError: the vault's refusal.
    """
    if name == IN_FORCE:
        return _parsed(context.ask(adm.ShowManifest(), adm.Document).document, "the manifest in force")
    return _parsed(read(Path(name)), name)


def read(path: Path, limit: int = MAX_REFERENCE_BYTES) -> bytes:
    """A file's bytes.

    Raises:
        MalformedError: it has more than `limit`.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise MalformedError(f"{path}: over {limit} bytes")
    return data


def _parsed(data: bytes, name: str) -> Reference:
    try:
        return parse_reference(data)
    except MalformedReferenceError as error:
        raise MalformedError(f"{name}: {error}") from None


def write(path: Path, reference: Reference) -> str:
    """Writes a document anew (with what stood there its signatures are void, and taken away); its digest in
    hex."""
    data = encode_reference(reference)
    path.write_bytes(data)
    signatures_of(path).unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def signatures_of(path: Path) -> Path:
    return path.with_name(path.name + ".sig")


def signatures(path: Path) -> bytes:
    """The signatures beside a document; empty if there are none."""
    beside = signatures_of(path)
    return read(beside, adm.MAX_SIGNATURES_BYTES) if beside.exists() else b""


def sign(path: Path, key: Path) -> None:
    """Adds a signature by `key` (a private key, or the public half of one that an agent holds).

    Raises:
        NotFoundError: there is no ssh-keygen, or it did not sign.
    """
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise NotFoundError("ssh-keygen is not installed (Debian: openssh-client)")
    argv = [tool, "-Y", "sign", "-n", NAMESPACE, "-f", str(key)]
    done = subprocess.run(argv, input=read(path), capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NotFoundError(
            f"{key}: ssh-keygen made no signature: {reason[-1] if reason else 'no reason given'}"
        )
    with signatures_of(path).open("ab") as file:
        file.write(done.stdout)


def kernel_path(path: str) -> str:
    """The path by which the kernel names a file that a package or a person calls `path`: folders that are
    links (/lib on a merged /usr) are followed, the file itself is not. The file need not be there yet."""
    folder, name = os.path.split("/" + path.lstrip("/"))
    return os.path.join(os.path.realpath(folder), name)


def digest_of(path: str) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Digests of these files, whatever they hold, by the names that the kernel gives them.

    Raises:
        OSError: one cannot be read.
    """
    return {os.path.realpath(path): (digest_of(os.path.realpath(path)),) for path in paths}


def hash_folders(folders: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Digests of all files under these folders that hold code; links are not followed.

    Raises:
        OSError: a file cannot be read.
    """
    return {path: (digest_of(path),) for folder in folders for path in _code_under(os.path.realpath(folder))}


def hash_folder(folder: Path, place: str | None) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The path, with a `/` at its end, that a folder has or (`place`) will have, and digests of all files
    under it that hold code, by their paths there.

    Raises:
        OSError: a file cannot be read.
    """
    root = os.path.realpath(folder)
    there = (root if place is None else kernel_path(place.rstrip("/"))).rstrip("/")
    found = hash_folders([folder])
    return f"{there}/", {there + path.removeprefix(root): digests for path, digests in found.items()}


def _code_under(folder: str) -> Iterator[str]:
    for directory, _, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(directory, name)
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode) and holds_code(os.fsencode(name), info.st_mode):
                yield path
