"""Changes one byte of a running QEMU's code in L1, as root there can, so that QEMU goes on working.

``xor eax,eax`` has two encodings, ``31 c0`` and ``33 c0``. The first found before a ``ret`` and padding,
from the middle of the code on, is turned into the second: the processor does the same, and no one but a
measurement can tell. Other bytes are found in the same way; those would crash the demonstration.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from qemu.host import LabHost

# Runs in L1. Arguments: pid, then address and byte (hexadecimal) to put back, if that is the job.
_SCRIPT: Final = r"""
import json, sys
pid = int(sys.argv[1])
with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
    def write(address, byte):
        memory.seek(address)
        old = memory.read(1)
        memory.seek(address)
        memory.write(bytes([byte]))
        memory.seek(address)
        return {"address": address, "old": old[0], "new": memory.read(1)[0]}
    if len(sys.argv) > 2:
        print(json.dumps(write(int(sys.argv[2], 16), int(sys.argv[3], 16))))
        sys.exit()
    for line in open(f"/proc/{pid}/maps"):
        place, mode, offset, _device, _inode, *name = line.split()
        if mode == "r-xp" and name and name[0].startswith("/usr/bin/qemu-system-"):
            break
    else:
        sys.exit("no code of QEMU is mapped")
    start, end = (int(part, 16) for part in place.split("-"))
    middle = (start + end) // 2
    memory.seek(middle)
    code = memory.read(end - middle)
    at = code.find(b"\x31\xc0\xc3\x0f\x1f")
    if at < 0:
        sys.exit("no suitable instruction")
    result = write(middle + at, 0x33)
    result.update(file=name[0], offset=middle + at - start + int(offset, 16))
    print(json.dumps(result))
"""


@dataclass(frozen=True, slots=True)
class Patch:
    """One changed byte."""

    pid: int
    file: str
    offset: int  # in the file
    address: int  # in the process
    old: int
    new: int


def patch_code(host: LabHost, pid: int) -> Patch:
    """Change one byte of the code of QEMU's process ``pid``."""
    said = json.loads(host.run(["python3", "-c", _SCRIPT, str(pid)]).stdout)
    return Patch(pid=pid, **said)


def put_back(host: LabHost, patch: Patch) -> None:
    """Write the old byte again. The page stays a private copy of the file's."""
    host.run(["python3", "-c", _SCRIPT, str(patch.pid), f"{patch.address:x}", f"{patch.old:x}"])
