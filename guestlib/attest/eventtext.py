"""Words for boot events: names of their types, and what their data says (pure). For people only.

Structures: TCG PC Client Platform Firmware Profile 1.06, sections 10.2 and 10.4; UEFI 2.10, section 10.3
(device paths). Data that does not fit its type's structure is shown as hex: nothing here is an error.
"""

from __future__ import annotations

import struct
from typing import Final

MAX_TEXT: Final = 200
_SHOWN_BYTES: Final = 24

_TYPES: Final = {
    0x00: "EV_PREBOOT_CERT",
    0x01: "EV_POST_CODE",
    0x03: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR",
    0x05: "EV_ACTION",
    0x06: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS",
    0x08: "EV_S_CRTM_VERSION",
    0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES",
    0x0C: "EV_COMPACT_HASH",
    0x0D: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA",
    0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO",
    0x12: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x13: "EV_POST_CODE2",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x8000000D: "EV_EFI_GPT_EVENT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}
VARIABLES: Final = frozenset({0x80000001, 0x80000002, 0x8000000C, 0x800000E0})
_IMAGES: Final = frozenset({0x80000003, 0x80000004, 0x80000005})
_NAMED: Final = frozenset({0x8000000A, 0x8000000B})
_VARIABLE: Final = struct.Struct("<16sQQ")
_IMAGE: Final = struct.Struct("<QQQQ")
_NODE: Final = struct.Struct("<BBH")
_TAGGED: Final = struct.Struct("<II")


def type_name(number: int) -> str:
    """`EV_IPL`; `type 0x…` for one this module does not know."""
    return _TYPES.get(number, f"type {number:#x}")


def describe(number: int, data: bytes) -> str:
    """What an event of type `number` says: printable, at most `MAX_TEXT` characters."""
    if number in VARIABLES:
        text = _variable(data)
    elif number in _IMAGES:
        text = _image(data)
    elif number in _NAMED and data and len(data) > data[0]:
        text = _words(data[1 : 1 + data[0]])
    elif number == 0x06 and len(data) > _TAGGED.size:
        text = _words(data[_TAGGED.size :])
    else:
        text = _words(data)
    return (text or _hex(data))[:MAX_TEXT]


def variable_content(data: bytes) -> bytes | None:
    """The content of a UEFI variable in its event; None if the data is no UEFI_VARIABLE_DATA."""
    if len(data) < _VARIABLE.size:
        return None
    _guid, characters, size = _VARIABLE.unpack_from(data)
    start = _VARIABLE.size + 2 * characters
    return data[start:] if start + size == len(data) else None


def _variable(data: bytes) -> str:
    if len(data) < _VARIABLE.size:
        return ""
    _guid, characters, _size = _VARIABLE.unpack_from(data)
    name = data[_VARIABLE.size : _VARIABLE.size + 2 * min(characters, MAX_TEXT)]
    return _words(name, "utf-16-le") if len(name) == 2 * characters else ""


def _image(data: bytes) -> str:
    if len(data) < _IMAGE.size:
        return ""
    _location, _length, _link, path_bytes = _IMAGE.unpack_from(data)
    path, at, names = data[_IMAGE.size :], 0, []
    if len(path) != path_bytes:
        return ""
    while len(path) - at >= _NODE.size:
        kind, sub, size = _NODE.unpack_from(path, at)
        if size < _NODE.size or len(path) - at < size:
            return ""
        body = path[at + _NODE.size : at + size]
        if (kind, sub) == (4, 4):
            names.append(_words(body, "utf-16-le"))
        elif (kind, sub) in ((4, 6), (4, 7)):  # firmware file, firmware volume: a GUID
            names.append(_guid_text(body))
        at += size
    return "/".join(filter(None, names))


def _guid_text(body: bytes) -> str:
    if len(body) != 16:
        return ""
    first, second, third = struct.unpack_from("<IHH", body)
    return f"{first:08x}-{second:04x}-{third:04x}-{body[8:10].hex()}-{body[10:].hex()}"


def _words(data: bytes, encoding: str = "") -> str:
    """The data as text, if it is printable; else empty. Without `encoding` it is taken as UTF-16 if half
    of its odd bytes are zero (nearly all that firmware says is ASCII), else as UTF-8."""
    odd = data[1::2]
    wide = len(data) % 2 == 0 and len(odd) > 0 and 2 * odd.count(0) > len(odd)
    try:
        text = data.decode(encoding or ("utf-16-le" if wide else "utf-8")).rstrip("\0")
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() else ""


def _hex(data: bytes) -> str:
    return data[:_SHOWN_BYTES].hex() + ("…" if len(data) > _SHOWN_BYTES else "")
