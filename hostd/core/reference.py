"""Reference values: what a reviewed host looked like, as one versioned document (pure).

A document is canonical JSON (keys sorted, no spaces, digests sorted): bytes that do not encode back to
themselves are refused, so that its digest, SHA-256 over those bytes, identifies it. Paths are as the
kernel names files (`d_path`). A path may have several digests: the version that runs, and an approved
next one.

`build_baseline` takes what the measurer read of a host; an officer reviews and approves the result.
Nothing here is trusted because it parses.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from hostd.core.reading_types import Name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from guestlib.attest.imalog import Entry
    from hostd.core.readings import FileIdentity, PostureReading

FORMAT: Final = "hostd-reference/1"
MAX_REFERENCE_BYTES: Final = 128 << 20
"""A million files; a Debian host has some 15,000."""
DELETED: Final = " (deleted)"
"""What the kernel appends to the path of a file that was removed or replaced."""

Hex256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9:_-]{1,32}:([0-9a-f]{2}){1,64}\Z")]
"""`sha256:<hex>`, with the algorithm as IMA names it."""
Version = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Switch = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class MalformedReferenceError(Exception):
    """The bytes are not a reference document in its one form."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the document's parts."""


class PostureRule(_Part, frozen=True):
    """Posture of the reviewed host. The kernel and its command line must be equal; everything else must
    be at least as strict. None: the reviewed host did not say, so anything is."""

    kernel: str
    command_line: str
    taint: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    lockdown: Literal["", "none", "integrity", "confidentiality"]
    modules: tuple[str, ...]
    modules_disabled: Switch | None
    signature_enforced: bool | None
    kexec_load_disabled: Switch | None
    ptrace_scope: Switch | None
    kprobes: Annotated[int, msgspec.Meta(ge=-1, le=2**31)]
    """-1: they could not be listed."""


class Reference(_Part, frozen=True):
    """One reference document.

    Raises:
        ValueError: a list is not sorted, or a path has no digest.
    """

    format: Literal["hostd-reference/1"]
    version: Version
    created: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    """Unix time, seconds."""
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    posture: PostureRule
    files: dict[Name, tuple[Hex256, ...]]
    """Path → SHA-256 of the whole file."""
    ima: dict[Name, tuple[Digest, ...]]
    """Path → digests that the kernel's log may show besides those of `files`: of files inside the
    initramfs, say, or in another algorithm."""

    def __post_init__(self) -> None:
        lists = [("modules", self.posture.modules), *self.files.items(), *self.ima.items()]
        for name, values in lists:
            if any(a >= b for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name}: not sorted, or a value twice")
        for path, digests in (*self.files.items(), *self.ima.items()):
            if not digests:
                raise ValueError(f"{path}: no digest")

    def expected(self, path: str) -> tuple[str, ...]:
        """Digests accepted for a mapped file, by the path the kernel gives; empty if there are none."""
        return self.files.get(path) or self.files.get(path.removesuffix(DELETED)) or ()

    def measured(self, path: str) -> tuple[str, ...]:
        """Digests accepted in the kernel's measurement log, as `algorithm:hex`."""
        return (*(f"sha256:{digest}" for digest in self.files.get(path, ())), *self.ima.get(path, ()))


_decoder: Final = msgspec.json.Decoder(Reference)


def encode_reference(reference: Reference) -> bytes:
    """The document's one encoding."""
    return msgspec.json.encode(reference, order="sorted")


def parse_reference(data: bytes) -> Reference:
    """Parses a document.

    Raises:
        MalformedReferenceError: too large, not of the form, or not the canonical bytes of what it says.
    """
    if len(data) > MAX_REFERENCE_BYTES:
        raise MalformedReferenceError(f"over {MAX_REFERENCE_BYTES} bytes")
    try:
        reference = _decoder.decode(data)
    except (ValueError, RecursionError) as error:
        raise MalformedReferenceError(str(error)) from None
    if encode_reference(reference) != data:
        raise MalformedReferenceError("not in canonical form")
    return reference


def reference_digest(reference: Reference) -> bytes:
    """SHA-256 over the canonical bytes: the document's identity."""
    return hashlib.sha256(encode_reference(reference)).digest()


def build_baseline(
    *,
    version: int,
    created: int,
    host: str,
    posture: PostureReading,
    files: Iterable[FileIdentity],
    survey: Mapping[str, bytes],
    log: Iterable[Entry],
) -> Reference:
    """A document that accepts the host as it is now, for an officer to review.

    `files` are identities of what hypervisor processes map, `survey` digests of what is on disk (path →
    SHA-256, 32 bytes), `log` the kernel's measurements so far. Violations are not made acceptable.

    Raises:
        ValueError: a value is out of the document's bounds.
    """
    digests: dict[str, set[str]] = {}
    for path, digest in survey.items():
        digests.setdefault(path, set()).add(digest.hex())
    for identity in files:
        digests.setdefault(identity.path.removesuffix(DELETED), set()).add(identity.sha256.hex())
    measured: dict[str, set[str]] = {}
    for entry in log:
        known = entry.algorithm == "sha256" and entry.digest.hex() in digests.get(entry.path, ())
        if entry.path and entry.digest and not entry.violation and not known:
            measured.setdefault(entry.path, set()).add(entry.content)
    reference = Reference(
        format="hostd-reference/1",
        version=version,
        created=created,
        host=host,
        posture=_rule(posture),
        files={path: tuple(sorted(values)) for path, values in digests.items()},
        ima={path: tuple(sorted(values)) for path, values in measured.items()},
    )
    try:
        return parse_reference(encode_reference(reference))
    except MalformedReferenceError as error:
        raise ValueError(str(error)) from error


def _rule(posture: PostureReading) -> PostureRule:
    if posture.lockdown not in ("", "none", "integrity", "confidentiality"):
        raise ValueError(f"unknown lockdown mode {posture.lockdown!r}")
    return PostureRule(
        kernel=posture.kernel,
        command_line=posture.command_line,
        taint=posture.taint,
        lockdown=posture.lockdown,  # type: ignore[arg-type]
        modules=tuple(sorted(set(posture.modules))),
        modules_disabled=posture.modules_disabled,
        signature_enforced=posture.signature_enforced,
        kexec_load_disabled=posture.kexec_load_disabled,
        ptrace_scope=posture.ptrace_scope,
        kprobes=posture.kprobes,
    )
