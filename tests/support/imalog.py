"""IMA log entries, as the kernel writes them."""

from __future__ import annotations

import hashlib
import struct


def field(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def framed(template: bytes, body: bytes, *, pcr: int = 10, violation: bool = False) -> bytes:
    digest = bytes(20) if violation else hashlib.sha1(body).digest()
    return struct.pack("<I", pcr) + digest + field(template) + field(body)


def body_of(
    path: str, content: bytes = b"", *, template: str = "ima-ng", digest: bytes | None = None
) -> bytes:
    digest = hashlib.sha256(content).digest() if digest is None else digest
    label = b"ima:sha256:\0" if template.endswith("v2") else b"sha256:\0"
    parts = field(label + digest) + field(path.encode() + b"\0")
    return parts + (field(b"signature") if template in ("ima-sig", "ima-buf", "ima-sigv2") else b"")


def entry(
    path: str, content: bytes = b"", *, template: str = "ima-ng", pcr: int = 10, violation: bool = False
) -> bytes:
    body = body_of(path, content, template=template, digest=bytes(32) if violation else None)
    return framed(template.encode(), body, pcr=pcr, violation=violation)


def legacy(path: str, digest: bytes = b"\x11" * 20) -> bytes:
    head = struct.pack("<I", 10) + b"\x22" * 20 + field(b"ima")
    return head + digest + field(path.encode())
