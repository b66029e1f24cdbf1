"""What a QEMU command line says about the VM: UUID, name, vsock CID (pure).

QEMU's options take one value each; lists inside a value are `key=value,...` with `,,` for a comma
(qemu(1)), devices may be JSON objects. A process may rewrite its own command line, so this is identity
only under `hypervisor.provider = "proc"`, which is for development.
Two different answers to one question are none.
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from typing import Final, NamedTuple

MAX_NAME: Final = 256
MAX_JSON_BYTES: Final = 64 << 10
_CID: Final = re.compile(r"[0-9]{1,10}")
_LAST_CID: Final = 0xFFFFFFFE


class Said(NamedTuple):
    """`vm` and `name` are empty, `cid` is 0, where nothing or nothing unambiguous is said."""

    vm: str
    name: str
    cid: int
    run: int = 0
    """Number that libvirt gave to this run of the machine; 0 where nobody vouches."""


def options(data: bytes) -> list[tuple[str, str]]:
    """Options and values of /proc/PID/cmdline, whose arguments each end with NUL: QEMU takes `-x` and `--x`
    alike."""
    arguments = data.decode("utf-8", "backslashreplace").split("\0")
    return [
        (option.removeprefix("-").removeprefix("-"), value)
        for option, value in itertools.pairwise(arguments)
        if option.startswith("-")
    ]


def parse_claims(data: bytes) -> tuple[set[str], set[str], set[int]]:
    """All UUIDs (empty for one that is none), names and vsock CIDs that a command line says."""
    vms: set[str] = set()
    names: set[str] = set()
    cids: set[int] = set()
    for option, value in options(data):
        match option:
            case "uuid":
                vms.add(_uuid(value))
            case "name":
                names.add(_name(value))
            case "device":
                cids |= _cid(value)
    return vms, names, cids


def parse_command_line(data: bytes) -> Said:
    """Parses /proc/PID/cmdline."""
    vms, names, cids = parse_claims(data)
    return Said(
        vms.pop() if len(vms) == 1 else "",
        names.pop() if len(names) == 1 else "",
        cids.pop() if len(cids) == 1 else 0,
    )


def _uuid(value: str) -> str:
    try:
        return str(uuid.UUID(value)) if len(value) == 36 else ""
    except ValueError:
        return ""


def _pairs(value: str) -> list[str]:
    return [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]


def _name(value: str) -> str:
    parts = _pairs(value)
    for part in parts:
        if part.startswith("guest="):
            return part.removeprefix("guest=")[:MAX_NAME]
    return parts[0][:MAX_NAME] if "=" not in parts[0] else ""


def _cid(value: str) -> set[int]:
    texts: set[str] = set()
    if value.startswith("{"):
        if len(value) > MAX_JSON_BYTES or '"guest-cid"' not in value:
            return set()
        try:
            device = json.loads(value)
        except (ValueError, RecursionError):
            return set()
        cid = device.get("guest-cid")
        if isinstance(cid, str | int):
            texts.add(str(cid))
    else:
        texts |= {part.removeprefix("guest-cid=") for part in _pairs(value) if part.startswith("guest-cid=")}
    return {int(text) for text in texts if _CID.fullmatch(text) and 2 < int(text) <= _LAST_CID}
