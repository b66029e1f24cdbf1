"""Owner of /proc/PID: a handle that cannot slip to another process, and parsers of what it shows.

`ProcessHandle` holds the directory /proc/PID open. The kernel binds it to that one process: once the
process has ended every read through it fails, even if the number is in use again. `maps` and
`pagemap` are opened anew for each reading, because an open one stays with the memory it was opened on
when the process executes another program (fs/proc/task_mmu.c, `proc_maps_open`).

The parsers are pure and strict: bytes that the kernel's formats do not give are a
`MalformedProcError` (proc(5); fs/proc/array.c `do_task_stat`; fs/proc/task_mmu.c `show_map_vma`).

Needs CAP_SYS_PTRACE for processes of other users.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Final, NamedTuple

MAX_STAT_BYTES: Final = 4096
MAX_MAPS_BYTES: Final = 16 << 20
"""65530 mappings (vm.max_map_count) of some 100 bytes, with room; over it the process is not read."""
MAX_VMAS: Final = 65536
"""vm.max_map_count allows 65530."""
MAX_STATUS_BYTES: Final = 64 << 10
MAX_COMMAND_LINE_BYTES: Final = 256 << 10
"""QEMU under libvirt has some 5 kB."""
_CHUNK: Final = 128 << 10
_KERNEL_HALF: Final = 1 << 63
"""[vsyscall] is listed there; it is a page of the kernel, not of the process."""
_GONE: Final = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV})


class MalformedProcError(Exception):
    """What /proc gave is not of its documented form, or over the bound."""


class ProcessGoneError(Exception):
    """The process has ended."""


class Stat(NamedTuple):
    """/proc/PID/stat, as far as it tells one process, and one program in it, from another."""

    state: str
    start_time: int
    """Clock ticks after boot, field 22."""
    image: tuple[int, ...]
    """Addresses that every exec sets anew (fields 26-28 and 45-51): code, data, brk, arguments."""

    @property
    def ended(self) -> bool:
        return self.state in ("Z", "X", "x")


class Vma(NamedTuple):
    """One line of /proc/PID/maps."""

    start: int
    end: int
    protection: int
    """`hostd.core.readings.READ | WRITE | EXEC`."""
    shared: bool
    offset: int
    device: str
    """`fd:01`; with the inode it names the file, whatever its path is by now."""
    inode: int
    """0: anonymous."""
    name: str


def parse_stat(data: bytes) -> Stat:
    """Parses /proc/PID/stat. The command name may hold spaces and parentheses: the last one closes it."""
    head, bracket, tail = data.rpartition(b")")
    fields = tail.split()
    if not bracket or b"(" not in head or not data.endswith(b"\n") or len(fields) < 49:
        raise MalformedProcError("stat: too few fields")
    try:
        numbers = [int(field) for field in fields[1:]]
        state = fields[0].decode("ascii")
    except ValueError:
        raise MalformedProcError("stat: a field is no number") from None
    # numbers[0] is field 4.
    return Stat(state, numbers[18], (*numbers[22:25], *numbers[41:48]))


_LINE: Final = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-])([sp]) ([0-9a-f]{1,16}) "
    rb"([0-9a-f]{2,4}:[0-9a-f]{2,8}) ([0-9]{1,20})(?: +([^\n]+)|[ ]*)\n"
)
_PROTECTION: Final = {
    bytes((r, w, x)): (r != 45) << 2 | (w != 45) << 1 | (x != 45)
    for r in b"r-" for w in b"w-" for x in b"x-"
}  # fmt: skip


def parse_maps(data: bytes) -> list[Vma]:
    """Parses /proc/PID/maps; gives the mappings that are executable or of a file, in address order."""
    found: list[Vma] = []
    position = 0
    floor = 0
    for match in _LINE.finditer(data):
        if match.start() != position:
            break
        position = match.end()
        low, high, bits, sharing, offset, device, inode_text, name = match.groups()
        start, end = int(low, 16), int(high, 16)
        if start < floor or end <= start or start & 4095 or end & 4095:
            raise MalformedProcError("maps: addresses out of order")
        floor = end
        inode = int(inode_text)
        if (inode or bits[2] == 120) and start < _KERNEL_HALF:
            found.append(
                Vma(
                    start, end, _PROTECTION[bits], sharing == b"s", int(offset, 16), device.decode(), inode,
                    readable(name or b""),
                )
            )  # fmt: skip
    if position != len(data):
        raise MalformedProcError("maps: a line is not of the kernel's form")
    return found


def parse_uid(status: bytes) -> int:
    """The effective uid in /proc/PID/status (the directory's owner is root once a process changed user)."""
    match = re.search(rb"^Uid:\t(\d{1,10})\t(\d{1,10})\t(\d{1,10})\t(\d{1,10})$", status, re.MULTILINE)
    if match is None:
        raise MalformedProcError("status: no Uid line")
    return int(match[2])


def readable(text: bytes) -> str:
    """Bytes of a name as text that can be sent and printed; what is not UTF-8 becomes `\\xNN`."""
    return text.decode("utf-8", "backslashreplace")


class ProcessHandle:
    """An open /proc/PID.

    Raises (also from each method):
        ProcessGoneError: there is no such process, or it has ended.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _gone(error) from error

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Opens an entry of the directory; the caller closes it."""
        try:
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise _gone(error) from error

    def read(self, name: str, limit: int) -> bytes:
        """The whole of an entry.

        Raises:
            MalformedProcError: more than `limit` bytes.
        """
        fd = self.open(name)
        try:
            parts: list[bytes] = []
            left = limit + 1
            while left > 0:
                part = os.read(fd, min(left, _CHUNK))
                if not part:
                    return b"".join(parts)
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise _gone(error) from error
        finally:
            os.close(fd)
        raise MalformedProcError(f"{name}: over {limit} bytes")

    def read_once(self, name: str, limit: int) -> bytes:
        """An entry that the kernel writes as one record (`single_open` in fs/proc): one read gives it all.

        Raises:
            MalformedProcError: `limit` bytes or more.
        """
        fd = self.open(name)
        try:
            data = os.read(fd, limit)
        except OSError as error:
            raise _gone(error) from error
        finally:
            os.close(fd)
        if len(data) == limit:
            raise MalformedProcError(f"{name}: over {limit} bytes")
        return data

    def stat(self) -> Stat:
        return parse_stat(self.read_once("stat", MAX_STAT_BYTES))

    def link(self, name: str) -> str:
        """Target of a link, `exe` or `fd/3` say."""
        try:
            return readable(os.fsencode(os.readlink(name, dir_fd=self._fd)))
        except OSError as error:
            raise _gone(error) from error

    def list(self, name: str) -> list[str]:
        fd = self.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.listdir(fd)
        except OSError as error:
            raise _gone(error) from error
        finally:
            os.close(fd)

    def device_of(self, name: str) -> int | None:
        """Device number of the character device that a link leads to; None if it leads to none."""
        try:
            info = os.stat(name, dir_fd=self._fd)
        except OSError as error:
            raise _gone(error) from error
        return info.st_rdev or None

    def close(self) -> None:
        os.close(self._fd)


def _gone(error: OSError) -> Exception:
    if error.errno in _GONE:
        return ProcessGoneError(error.strerror or "gone")
    return error
