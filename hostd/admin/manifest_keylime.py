"""Reading a Keylime runtime policy (pure): what of it is reference values, and what is left out.

Its form is Keylime's `docs/user_guide/runtime_ima.rst` and `keylime/ima/ima.py`: `digests` maps a path to
accepted digests of any length; `excludes` are patterns of paths that are not checked. A policy in a DSSE
envelope is unpacked, its signature not verified: officers sign what comes out. hostd leaves no path
unchecked, so excludes are not taken over, nor are keys of IMA signatures (`verification-keys`, `keyrings`,
`ima-buf`).
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Final

import msgspec

from guestlib.errors import MalformedError

MAX_POLICY_BYTES: Final = 128 << 20
_ALGORITHMS: Final = {32: "md5", 40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}
"""Hexadecimal digits → algorithm. Keylime does not name it."""
_Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{32,128}\Z")]


class _Policy(msgspec.Struct):
    digests: dict[str, list[_Hex]]
    excludes: list[str] | None = None
    keyrings: dict[str, Any] | None = None
    ima_buf: dict[str, Any] | None = msgspec.field(default=None, name="ima-buf")
    verification_keys: str | None = msgspec.field(default=None, name="verification-keys")


class _Envelope(msgspec.Struct, rename="camel"):
    payload: str
    payload_type: str


class Imported(msgspec.Struct, frozen=True):
    """What was found. Digests that are not SHA-256 are of use for the kernel's log only."""

    files: dict[str, tuple[str, ...]]
    ima: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...]
    """What the policy says and a manifest cannot, for whoever reviews it."""


def parse_policy(data: bytes) -> Imported:
    """Raises:
    MalformedError: not a runtime policy.
    """
    if len(data) > MAX_POLICY_BYTES:
        raise MalformedError(f"the policy has over {MAX_POLICY_BYTES} bytes")
    try:
        plain = msgspec.json.decode(data)
        if isinstance(plain, dict) and "payloadType" in plain:
            envelope = msgspec.convert(plain, _Envelope)
            data = base64.b64decode(envelope.payload, validate=True)
        policy = msgspec.json.decode(data, type=_Policy)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not a Keylime runtime policy: {error}") from None
    files: dict[str, tuple[str, ...]] = {}
    ima: dict[str, tuple[str, ...]] = {}
    left_out = [f"exclude {pattern!r}" for pattern in policy.excludes or ()]
    for path, digests in sorted(policy.digests.items()):
        found = {digest.lower() for digest in digests}
        odd = {digest for digest in found if len(digest) not in _ALGORITHMS}
        left_out += [f"{path}: a digest of {len(digest)} digits" for digest in sorted(odd)]
        # Only a path of the filesystem is a file; others, such as boot_aggregate, are names in the log.
        whole = {d for d in found if len(d) == 64 and path.startswith("/")}
        named = {f"{_ALGORITHMS[len(d)]}:{d}" for d in found - odd - whole}
        if whole:
            files[path] = tuple(sorted(whole))
        if named:
            ima[path] = tuple(sorted(named))
    for name, value in (
        ("keyrings", policy.keyrings),
        ("ima-buf", policy.ima_buf),
        ("verification-keys", policy.verification_keys),
    ):
        if value:
            left_out.append(f"{name}: IMA signatures are not used")
    return Imported(files, ima, tuple(left_out))
