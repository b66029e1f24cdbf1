"""Makes a VM stand still while its hypervisor process is read (`gate.freeze`).

Through the cgroup v2 freezer of the scope that libvirt put the VM into (the kernel's
Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze"). `frozen 1` never comes on Linux 6.1, because kernel
threads of vhost and KVM are in the scope and do not freeze; so each user thread is looked at: one that is
frozen sleeps in the function that takes signals (kernel/signal.c). What does not stand still within
`WAIT_S` is read as it runs, and the answer says so. vhost goes on moving data for a frozen VM.

The state before is restored whatever happens. A scope that is frozen already is its operator's, and is left
alone. A scope is noted in a file of the run directory before it is frozen: `thaw_left` thaws what a
measurer that was killed left behind, at the next start and when systemd has seen the end of this one
(ExecStopPost).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostd.platform.procfs import MalformedProcError, ProcessGoneError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    from hostd.platform.procfs import ProcessHandle

ROOT: Final = Path("/sys/fs/cgroup")
NOTE: Final = "measurer.frozen"
WAIT_S: Final = 0.008
"""Measured: half stand still after 0.04 ms, 99 of 100 after 4.9."""
STEP_S: Final = 0.0001
MAX_CGROUP_BYTES: Final = 16 << 10
STOPPED: Final = frozenset({b"get_signal", b"do_freezer_trap"})
"""Where a frozen thread sleeps (/proc/PID/task/TID/wchan)."""
_SCOPE: Final = re.compile(r"/machine\.slice/(?:[\w.@:\\-]+\.slice/)*machine-qemu[\w.@:\\-]*\.scope")


class Freezer:
    """Freezes the scopes of virtual machines, one at a time."""

    def __init__(
        self, mode: Literal["never", "on-suspicion", "always"], run: Path, *, root: Path = ROOT
    ) -> None:
        self.mode = mode
        self._note = run / NOTE
        self._root = root
        self._said = False

    @contextlib.contextmanager
    def still(self, handle: ProcessHandle) -> Iterator[str]:
        """Freezes the process's scope meanwhile. Gives how that went, for people: `frozen`, or why not.

        Raises:
            ProcessGoneError: the process has ended.
        """
        try:
            scope = self._root / scope_of(handle.read("cgroup", MAX_CGROUP_BYTES))[1:]
            switch = scope / "cgroup.freeze"
            before = switch.read_text().strip()
        except (ValueError, MalformedProcError, OSError) as error:
            yield f"not frozen: {error}"[:64]
            return
        if before != "0":
            yield "frozen by others"
            return
        try:
            self._write_note(scope)
            switch.write_text("1")
        except OSError as error:
            self._say(f"cannot freeze {scope}: {error}")
            self._thaw(switch)
            yield f"not frozen: {error.strerror}"[:64]
            return
        try:
            yield "frozen" if _stands_still(handle) else "not frozen in time"
        finally:
            self._thaw(switch)

    def _write_note(self, scope: Path) -> None:
        # Others may write to the run directory: a file of theirs, or a link, is not written through.
        self._note.unlink(missing_ok=True)
        fd = os.open(self._note, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(str(scope.relative_to(self._root)))

    def _thaw(self, switch: Path) -> None:
        try:
            switch.write_text("0")
        except FileNotFoundError:
            pass  # the VM has ended
        except OSError as error:
            # The note stays: whoever comes next tries again.
            self._say(f"cannot thaw {switch.parent}: {error}")
            return
        self._note.unlink(missing_ok=True)

    def _say(self, text: str) -> None:
        if not self._said:
            self._said = True
            print(f"hostd measurer: {text}", file=sys.stderr, flush=True)


def scope_of(cgroup: bytes) -> str:
    """The VM's scope in /proc/PID/cgroup, absolute under the cgroup mount.

    Raises:
        ValueError: it is in no scope of a machine. Nothing else is ever frozen.
    """
    for line in cgroup.decode("utf-8", "replace").splitlines():
        hierarchy, _, path = line.partition("::")
        found = _SCOPE.match(path)
        if hierarchy == "0" and found is not None and path[found.end() :][:1] in ("", "/"):
            if ".." in path.split("/"):
                break
            return found[0]
    raise ValueError("in no machine's scope")


def _stands_still(handle: ProcessHandle) -> bool:
    """Waits until every thread of the process stands still, `WAIT_S` at most."""
    until = time.monotonic() + WAIT_S
    while True:
        if all(_stopped(handle, name) for name in handle.list("task")):
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(STEP_S)


def _stopped(handle: ProcessHandle, thread: str) -> bool:
    try:
        return handle.read(f"task/{thread}/wchan", 128) in STOPPED
    except (ProcessGoneError, OSError):
        return True  # a thread that has ended


def thaw_left(run: Path, *, root: Path = ROOT) -> str:
    """Thaws what a measurer that was killed left frozen; which scope that was, empty if none.

    Raises:
        OSError: it cannot be thawed. The note stays.
    """
    note = run / NOTE
    try:
        fd = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with open(fd, "rb") as file:
        own = os.fstat(fd).st_uid == os.geteuid()
        text = file.read(MAX_CGROUP_BYTES)
    try:
        scope = scope_of(b"0::/" + text)[1:] if own else ""
    except ValueError:
        scope = ""
    if scope:
        with contextlib.suppress(FileNotFoundError):
            (root / scope / "cgroup.freeze").write_text("0")
    note.unlink(missing_ok=True)
    return scope
