"""What a QEMU command line says the machine is made of (pure); for `hypervisor.provider = "proc"` only.

There nobody vouches but the process itself, so this is for development. It names what
`hostd.measurer.domain_xml` names, by the same words, as far as a command line tells: firmware, kernel, host
devices, sockets and files.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Final

from hostd.core.reading_domain import MAX_ARGUMENT, MAX_PARTS, DomainPart
from hostd.measurer.commandline import MAX_JSON_BYTES, options, parse_command_line
from hostd.measurer.domain_xml import MAX_LABEL, Definition, MalformedDomainError

if TYPE_CHECKING:
    from collections.abc import Iterator

_BOOT: Final = {"kernel": "kernel", "initrd": "initrd", "dtb": "dtb", "append": "cmdline", "bios": "loader",
                "pflash": "loader"}  # fmt: skip
_NETS: Final = {"user": "user", "tap": "ethernet", "bridge": "bridge", "hubport": "network"}
_KIND: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def definition_of(data: bytes, *, emulator: str, accel: str) -> Definition:
    """The machine that /proc/PID/cmdline describes.

    Raises:
        MalformedDomainError: it says more than the bounds allow.
    """
    said = parse_command_line(data)
    pairs = options(data)
    boot, devices, memory = set(_boot(pairs)), set(_devices(pairs)), set(_memory(pairs))
    if max(len(boot), len(devices)) > MAX_PARTS:
        raise MalformedDomainError(f"over {MAX_PARTS} devices or files")
    machine = next((_words(value) for option, value in pairs if option in ("machine", "M")), {})
    return Definition(
        said.vm,
        said.name,
        "kvm" if accel == "kvm" else "qemu",
        emulator,
        machine.get("type", machine.get("", ""))[:MAX_LABEL],
        tuple(sorted(boot)),
        (),
        (),
        said.cid,
        (),
        tuple(sorted(memory)),
        tuple(sorted(devices)),
        hashlib.sha256(data).digest(),
    )


def _boot(pairs: list[tuple[str, str]]) -> Iterator[DomainPart]:
    for option, value in pairs:
        words = _words(value)
        if option in _BOOT:
            yield _part(_BOOT[option], value)
        elif option == "drive" and words.get("if") == "pflash":
            yield _part("loader" if words.get("readonly") == "on" else "nvram", words.get("file", ""))
        elif option == "acpitable":
            yield _part("acpi", words.get("file") or words.get("data", ""))
        elif option == "option-rom":
            yield _part("rom", words.get("file") or words.get("", ""))
        elif option == "device" and words.get("romfile"):
            yield _part("rom", words["romfile"])


def _devices(pairs: list[tuple[str, str]]) -> Iterator[DomainPart]:
    for option, value in pairs:
        words = _words(value)
        first = words.get("driver") or words.get("type") or words.get("", "")
        match option:
            case "device" if first.startswith("vfio"):
                yield _part("hostdev:pci", words.get("host") or words.get("sysfsdev", ""))
            case "device" if first.startswith("vhost-vsock"):
                yield _part("vsock", "")
            case "device" if first.startswith(("vhost-user", "ivshmem", "usb-host", "scsi-generic")):
                yield _part(f"device:{first}", words.get("chardev", ""))
            case "chardev":
                kind = "unix" if first == "socket" and "path" in words else first
                reaches = kind not in ("pty", "null", "vc", "stdio", "spicevmc", "ringbuf")
                yield _part(f"chardev:{kind}", _target(words) if reaches else "")
            case "serial" | "parallel" | "monitor" | "qmp" | "debugcon" if ":" in value:
                kind, _, target = value.partition(":")
                yield _part(f"{option}:{kind}", target.partition(",")[0])
            case "fsdev" | "virtfs":
                yield _part("filesystem:mount", words.get("path", ""))
            case "netdev" | "nic":
                yield _part(f"interface:{_NETS.get(first, first)}", "")
            case "tpmdev":
                yield _part(f"tpm:{first}", words.get("path", "") if first != "emulator" else "")
            case "incoming" | "plugin" | "readconfig" | "gdb":
                yield _part(option, value)
            case _:
                pass


def _memory(pairs: list[tuple[str, str]]) -> Iterator[str]:
    for option, value in pairs:
        words = _words(value)
        kind = words.get("qom-type") or words.get("", "")
        if option == "mem-path" or (option == "object" and kind == "memory-backend-file"):
            yield "source:file"
        elif option == "object" and kind == "memory-backend-memfd":
            yield "source:memfd"
        if option == "object" and words.get("share") in ("on", "true", "True"):
            yield "access:shared"


def _target(words: dict[str, str]) -> str:
    return words.get("path") or f"{words.get('host', '')}:{words.get('port', '')}"


def _words(value: str) -> dict[str, str]:
    """`a,key=value,...`, or a JSON object; a first word without `=` stands under the empty key."""
    if value.startswith("{") and len(value) <= MAX_JSON_BYTES:
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return {}
        return {key: str(item) for key, item in found.items() if isinstance(item, str | int)}
    words: dict[str, str] = {}
    for number, part in enumerate(value.replace(",,", "\0").split(",")):
        name, equals, text = part.partition("=")
        if equals:
            words.setdefault(name, text.replace("\0", ","))
        elif number == 0:
            words[""] = name.replace("\0", ",")
    return words


def _part(kind: str, target: str) -> DomainPart:
    if len(target) > MAX_ARGUMENT:
        raise MalformedDomainError(f"a text of over {MAX_ARGUMENT} characters")
    head, _, tail = kind.partition(":")
    safe = "".join(letter if letter in _KIND else "_" for letter in tail)
    return DomainPart(f"{head}:{safe}"[:64] if tail else head, target)
