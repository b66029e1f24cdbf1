"""The lab's cache: things that take long to build, built once for each recipe.

Each entry is a folder named ``KIND-KEY``; KEY is a hash of all that went into it. It appears whole or
not at all: built beside its place, then renamed. A lock per kind keeps two builders apart. Delete the
cache folder to start afresh.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def cache_root() -> Path:
    """``$HOSTD_LAB_CACHE``, or ``hostd-lab`` in the user's cache folder; made if it is not there."""
    own = os.environ.get("HOSTD_LAB_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(own) if own else Path(user) / "hostd-lab"
    root.mkdir(parents=True, exist_ok=True)
    return root.resolve()


def key_of(words: Iterable[str], files: Iterable[Path] = ()) -> str:
    """A short hash of a recipe: words that matter and files (folders: all below), names included."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(f"{len(word)}:{word}".encode())
    for top in files:
        found = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in (path for path in found if path.is_file() and "__pycache__" not in path.parts):
            name, data = str(path.relative_to(top.parent)), path.read_bytes()
            digest.update(f"{len(name)}:{name}{path.stat().st_mode & 0o111:o}{len(data)}:".encode() + data)
    return digest.hexdigest()[:16]


def build_once(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The cache entry, built by ``build(empty folder)`` if it is not there yet."""
    root = cache_root()
    entry = root / f"{kind}-{key}"
    with (root / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if entry.is_dir():
            return entry
        for stale in root.glob(f".{kind}-*.tmp"):  # we hold the lock: its builder is dead
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{kind}-", suffix=".tmp", dir=root))
        work.chmod(0o755)  # apt downloads as a user of its own
        try:
            build(work)
            work.rename(entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return entry
