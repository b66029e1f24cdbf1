"""What the running kernel allows: taint, modules, lockdown and the like, from /proc and /sys.

What this kernel does not have is None (or empty); what it has and does not let us read is an error, so
that the two are never the same. Sources: Documentation/admin-guide/sysctl/kernel.rst, tainted-kernels.rst,
kernel_lockdown(7).

Needs CAP_SYS_ADMIN or DAC override for the list of kernel probes (debugfs); the rest is open to all.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Final

from hostd.core.readings import PostureReading

MAX_BYTES: Final = 1 << 20
MAX_MODULES: Final = 2048
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV})
_LOCKDOWN: Final = re.compile(r"\[([a-z]+)\]")


class PostureError(Exception):
    """The kernel gave something that cannot be made out."""


class PostureProbe:
    """Reads the posture below `root` (`/`, but for tests)."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def read(self) -> PostureReading:
        """One reading.

        Raises:
            OSError: a file is there and cannot be read.
            PostureError: a file does not hold what it should.
        """
        uname = os.uname()
        modules = self._text("proc/modules") or ""
        names = tuple(sorted(line.split(" ", 1)[0][:64] for line in modules.splitlines()))
        if len(names) > MAX_MODULES:
            raise PostureError(f"over {MAX_MODULES} modules")
        enforce = self._text("sys/module/module/parameters/sig_enforce")
        taint = self._number("proc/sys/kernel/tainted")
        if taint is None:
            raise PostureError("the kernel does not tell its taint")
        return PostureReading(
            kernel=f"{uname.release} {uname.version}"[:256],
            command_line=(self._text("proc/cmdline") or "").strip()[:4096],
            taint=taint,
            lockdown=self._lockdown(),
            modules=names,
            modules_disabled=self._number("proc/sys/kernel/modules_disabled"),
            signature_enforced=None if enforce is None else enforce.strip() == "Y",
            kexec_load_disabled=self._number("proc/sys/kernel/kexec_load_disabled"),
            ptrace_scope=self._number("proc/sys/kernel/yama/ptrace_scope"),
            kprobes=self._kprobes(),
        )

    def _text(self, path: str) -> str | None:
        try:
            fd = os.open(self._root / path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _MISSING:
                return None
            raise
        try:
            parts: list[bytes] = []
            left = MAX_BYTES
            while part := os.read(fd, left):
                parts.append(part)
                left -= len(part)
                if left <= 0:
                    raise PostureError(f"/{path}: over {MAX_BYTES} bytes")
            return b"".join(parts).decode("utf-8", "backslashreplace")
        finally:
            os.close(fd)

    def _number(self, path: str) -> int | None:
        text = self._text(path)
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,18}\n?", text):
            raise PostureError(f"/{path}: not a number")
        return int(text)

    def _lockdown(self) -> str:
        text = self._text("sys/kernel/security/lockdown")
        if text is None:
            return ""
        match = _LOCKDOWN.search(text)
        if match is None:
            raise PostureError("/sys/kernel/security/lockdown: no mode in brackets")
        return match[1][:32]

    def _kprobes(self) -> int:
        try:
            text = self._text("sys/kernel/debug/kprobes/list")
        except PermissionError:
            return -1
        return -1 if text is None else len(text.splitlines())
