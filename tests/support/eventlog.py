"""Boot event logs: that of the lab's own boot, and made by hand."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

LAB_LOG = (Path(__file__).parents[1] / "data" / "boot-event-log.ovmf.bin").read_bytes()
"""Of a QEMU guest with OVMF that starts kernel and initrd directly (Linux 6.1, swtpm)."""
LAB_COMMAND_LINE = "root=/dev/vda rw console=ttyS0 panic=-1 ima_policy=tcb ima_hash=sha256 initrd=initrd"
LAB_PCRS = {
    0: "1119fe2cc2550e9294b01a6355bfeb7ac1507139f07c0afec49f6644002acca9",
    1: "8e9d1fe23131f12d6a523e9c32eb3223d4dc25e14eb5fd60163e7ba8de0f248c",
    2: "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969",
    3: "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969",
    4: "f83621c714444426499cfe61fe1f1fda6115a724b6415528e0d0c41f3cbd120f",
    5: "a5ceb755d043f32431d63e39f5161464620a3437280494b5850dc1b47cc074e0",
    6: "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969",
    7: "65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e534eb3068",
    8: "00" * 32,
    9: "819fca86aabb3ddc3170852ba30c744644af07419cd58f8312996088e0eda389",
    14: "00" * 32,
}
"""What its TPM said at the same time (/sys/class/tpm/tpm0/pcr-sha256)."""
SEALED = {pcr: bytes.fromhex(value) for pcr, value in LAB_PCRS.items()}


def header(algorithms: tuple[tuple[int, int], ...] = ((4, 20), (11, 32)), *, vendor: bytes = b"") -> bytes:
    spec = struct.pack("<16sIBBBBI", b"Spec ID Event03\0", 0, 0, 2, 0, 2, len(algorithms))
    spec += b"".join(struct.pack("<HH", *pair) for pair in algorithms) + bytes([len(vendor)]) + vendor
    return struct.pack("<II20sI", 0, 3, bytes(20), len(spec)) + spec


def event(pcr: int, type_: int, data: bytes, *, hashed: bytes | None = None) -> bytes:
    """An event with SHA-1 and SHA-256 digests; `hashed` is what they are of, `data` if not given."""
    over = data if hashed is None else hashed
    digests = struct.pack("<H", 4) + hashlib.sha1(over).digest()
    digests += struct.pack("<H", 11) + hashlib.sha256(over).digest()
    return struct.pack("<III", pcr, type_, 2) + digests + struct.pack("<I", len(data)) + data


def locality(value: int, *, pcr: int = 0) -> bytes:
    return event(pcr, 3, b"StartupLocality\0" + bytes([value]), hashed=b"")
