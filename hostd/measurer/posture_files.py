"""Small files of /proc and /sys that are read again and again, each through one open descriptor.

Reading such a file at offset 0 makes the kernel print it anew (fs/seq_file.c; kernfs; proc_sysctl). A file
of a module that was unloaded gives ENODEV, and is opened again.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 16
_PAGE: Final = 4096
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV})
_CLOSED: Final = frozenset({errno.EACCES, errno.EPERM})


class PostureError(Exception):
    """The kernel gave something that cannot be made out."""


class KeptFile:
    """One file. `page`: it gives all it has with one read of a page (sysctl, sysfs attribute).

    `optional`: being refused is the same as it not being there (tracefs under lockdown).
    """

    def __init__(self, path: Path, *, page: bool = True, optional: bool = False) -> None:
        self.path = path
        self._page = page
        self._optional = optional
        self._fd = -1

    def read(self) -> bytes | None:
        """What the file holds now; None: it is not there.

        Raises:
            OSError: it is there and cannot be read.
            PostureError: it holds over 1 MiB.
        """
        try:
            if self._fd >= 0:
                try:
                    return self._whole()
                except OSError as error:
                    if error.errno not in _MISSING:
                        raise
                    self.close()
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._whole()
        except OSError as error:
            if error.errno in _MISSING or (self._optional and error.errno in _CLOSED):
                return None
            raise

    def text(self) -> str | None:
        data = self.read()
        return None if data is None else data.decode("utf-8", "backslashreplace")

    def number(self) -> int | None:
        """A decimal number.

        Raises:
            PostureError: it is none.
        """
        data = self.read()
        if data is None:
            return None
        digits = data.removesuffix(b"\n")
        if not digits.isdigit() or len(digits) > 18:
            raise PostureError(f"{self.path}: not a number")
        return int(digits)

    def _whole(self) -> bytes:
        if self._page:
            data = os.pread(self._fd, 2 * _PAGE, 0)
            if len(data) < _PAGE:
                return data
        parts: list[bytes] = []
        size = 0
        while part := os.pread(self._fd, _CHUNK, size):
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise PostureError(f"{self.path}: over {MAX_BYTES} bytes")
        return b"".join(parts)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class Parameters:
    """All parameters of some kernel modules, as `module.parameter`."""

    def __init__(self, root: Path, modules: tuple[str, ...], *, most: int) -> None:
        self._directories = {module: root / "sys/module" / module / "parameters" for module in modules}
        self._files: dict[str, dict[str, KeptFile]] = {}
        self._most = most

    def read(self) -> tuple[tuple[str, str], ...]:
        """(name, value), sorted. A module that is not loaded has none.

        Raises:
            OSError: a parameter is there and cannot be read.
            PostureError: more than `most`.
        """
        found: list[tuple[str, str]] = []
        for module in self._directories:
            values = self._of(module, self._files.get(module, {}))
            if values is None:
                # Never seen, or loaded again since: its parameters may be others.
                self._forget(module)
                self._files[module] = self._listed(module)
                values = self._of(module, self._files[module]) or []
            found += values
        if len(found) > self._most:
            raise PostureError(f"over {self._most} parameters of modules")
        return tuple(sorted(found))

    def _of(self, module: str, files: dict[str, KeptFile]) -> list[tuple[str, str]] | None:
        """None: one of them is gone, or there is none."""
        values: list[tuple[str, str]] = []
        for name, file in files.items():
            text = file.text()
            if text is None:
                return None
            values.append((f"{module}.{name}"[:256], text.rstrip("\n")[:128]))
        return values or None

    def _listed(self, module: str) -> dict[str, KeptFile]:
        try:
            names = sorted(os.listdir(self._directories[module]))
        except OSError as error:
            if error.errno in _MISSING:
                return {}
            raise
        files = {name: KeptFile(self._directories[module] / name) for name in names[: self._most + 1]}
        # Some are only for writing.
        return {name: file for name, file in files.items() if file.path.stat().st_mode & 0o444}

    def _forget(self, module: str) -> None:
        for file in self._files.pop(module, {}).values():
            file.close()

    def close(self) -> None:
        for module in list(self._files):
            self._forget(module)
