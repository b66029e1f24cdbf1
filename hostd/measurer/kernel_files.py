"""Finds what the running kernel was made of: package files, and where its modules are.

A file is only a candidate for comparison: its digest goes into the reading, and the appraisal decides
whether it may be one. A file of another build than what runs (a package upgraded since the boot) is told
by its build id and is no candidate.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

MAX_FILE_BYTES: Final = 128 << 20
MAX_DEP_BYTES: Final = 16 << 20
MAX_MODULES: Final = 2048
_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


class PackageFile(NamedTuple):
    """A file as packed on disk, by its resolved path."""

    path: str
    data: bytes

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.data).digest()


class Loaded(NamedTuple):
    """A line of /proc/modules."""

    name: str
    size: int
    address: int


class Instance(NamedTuple):
    """One loading of a module."""

    name: str
    address: int
    inode: int


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """A regular file's bytes.

    Raises:
        OSError: it is not there, cannot be read, is no regular file or over the limit.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"{path} is over {limit} bytes")
    return data


class PackageFiles:
    """Files of kernel `release` below `root`."""

    def __init__(self, release: str, root: Path = Path("/")) -> None:
        self._release = release
        self._root = root
        self._modules: dict[str, Path] | None = None

    def kernel(self) -> PackageFile | None:
        """The kernel's image, as bzImage; None: it is nowhere known."""
        places = (f"boot/vmlinuz-{self._release}", f"usr/lib/modules/{self._release}/vmlinuz")
        return self._first([self._root / place for place in places])

    def module(self, name: str) -> PackageFile | None:
        """The file of a module, packed or not; None: there is none."""
        if self._modules is None:
            self._modules = self._index()
        path = self._modules.get(name)
        return None if path is None else self._first([path])

    def _first(self, paths: list[Path]) -> PackageFile | None:
        for path in paths:
            try:
                resolved = path.resolve(strict=True)
                return PackageFile(f"/{resolved.relative_to(self._root.resolve())}", read_file(resolved))
            except (OSError, ValueError):
                continue
        return None

    def _index(self) -> dict[str, Path]:
        folder = self._root / "lib/modules" / self._release
        try:
            text = read_file(folder / "modules.dep", MAX_DEP_BYTES).decode("utf-8", "replace")
        except OSError:
            return {}
        return parse_dep(text, folder)


def parse_dep(text: str, folder: Path) -> dict[str, Path]:
    """Module name → file, from modules.dep (modules.dep(5)); what names no module file is left out."""
    found: dict[str, Path] = {}
    for line in text.splitlines():
        path = line.partition(":")[0]
        base = path.rpartition("/")[2]
        suffix = next((s for s in _SUFFIXES if base.endswith(s)), None)
        if suffix is not None and ".." not in path.split("/"):
            found.setdefault(base.removesuffix(suffix).replace("-", "_"), folder / path)
    return found


def parse_modules(text: str) -> list[Loaded]:
    """Modules that are alive, from /proc/modules (kernel/module/procfs.c `m_show`).

    Raises:
        ValueError: a line is not of its form, or there are too many.
    """
    found: list[Loaded] = []
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) < 6 or not 0 < len(fields[0]) <= 64:
            raise ValueError("a line of /proc/modules is not of its form")
        if fields[4] == "Live":
            found.append(Loaded(fields[0], int(fields[1]), int(fields[5], 16)))
    if len(found) > MAX_MODULES:
        raise ValueError(f"over {MAX_MODULES} modules")
    return found


def loaded_modules(root: Path = Path("/")) -> list[Loaded]:
    """What is loaded now; nothing if this kernel has no modules.

    Raises:
        OSError, ValueError: it cannot be read or made out.
    """
    try:
        with open(root / "proc/modules", encoding="ascii", errors="replace") as file:
            return parse_modules(file.read(4 << 20))
    except FileNotFoundError:
        return []


def living(root: Path = Path("/")) -> set[Instance]:
    """What is loaded now, told apart from what was loaded under the same name at the same place before: the
    folder in sysfs is another one (kernfs gives no number twice).

    Raises:
        OSError, ValueError: see `loaded_modules`.
    """
    found: set[Instance] = set()
    for item in loaded_modules(root):
        try:
            folder = os.stat(root / "sys/module" / item.name)
        except FileNotFoundError:
            continue
        found.add(Instance(item.name, item.address, folder.st_ino))
    return found


def section_places(name: str, root: Path = Path("/")) -> dict[str, int]:
    """Section → address of a loaded module (/sys/module/NAME/sections). Needs CAP_SYSLOG.

    Raises:
        OSError: the module is gone, or this kernel does not say.
        ValueError: something else than an address.
    """
    folder = root / "sys/module" / name / "sections"
    places = {entry: int((folder / entry).read_text("ascii"), 16) for entry in os.listdir(folder)}
    if places and not any(places.values()):
        raise OSError("section addresses are hidden: CAP_SYSLOG is missing")
    return places


def running_notes(module: str = "", root: Path = Path("/")) -> bytes:
    """ELF notes of the running kernel, or of a loaded module; empty: it does not say."""
    place = f"sys/module/{module}/notes/.note.gnu.build-id" if module else "sys/kernel/notes"
    try:
        return (root / place).read_bytes()
    except OSError:
        return b""
