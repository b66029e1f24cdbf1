"""Reference values: what good looks like, as one versioned document that officers sign (pure).

A document is canonical JSON (keys sorted, no spaces, digests sorted): bytes that do not encode back to
themselves are refused, so that its digest, SHA-256 over those bytes, identifies it. Paths are as the
kernel names files (`d_path`).

A file's digest goes through three stages: `next` (approved, not yet seen), `files` (in use), and `retire`
(a time from which it is accepted no more). A path in `remove` is one that an approved update takes away: as
long as the file is there its digest counts, and nobody misses it. `at` gives the document as it is in force
at a moment; judges get that. Nothing here is trusted because it parses: who signed it is
`guestlib.attest.sshsig`'s question.
"""

from __future__ import annotations

import hashlib
import itertools
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import msgspec

from hostd.core.reading_types import Label, Name
from hostd.core.rule_boot import BootRule
from hostd.core.rule_domain import DomainRule
from hostd.core.rule_kernel import KernelRule
from hostd.core.rule_part import Hex256, Part
from hostd.core.rule_posture import PostureRule

FORMAT: Final = "hostd-reference/2"
OLD_FORMAT: Final = b'"format":"hostd-reference/1"'
NAMESPACE: Final = "hostd-manifest"
"""What officers sign documents for: `ssh-keygen -Y sign -n`."""
MAX_REFERENCE_BYTES: Final = 16 << 20
"""Some 120,000 files; a Debian host has 15,000 and 2-3 MB."""
ANY_HOST: Final = "*"
"""In the place of a host's name: the document is for every host."""
DELETED: Final = " (deleted)"
"""What the kernel appends to the path of a file that was removed or replaced."""

Digest = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9:_-]{1,32}:([0-9a-f]{2}){1,64}\Z")]
"""`sha256:<hex>`, with the algorithm as IMA names it."""
Version = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
UnixTime = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799)]
"""Seconds; up to the year 9999, so that each is a date."""
Origin = Literal["deb-archive", "deb", "installed", "files", "host", "keylime"]
"""How digests were obtained: `deb-archive`, a .deb whose SHA-256 apt's verified lists have; `deb`, another
.deb; `installed`, installed files that agree with dpkg's own sums; `files`, files given by hand; `host`, a
running host as it was; `keylime`, another system's policy."""


class MalformedReferenceError(Exception):
    """The bytes are not a reference document in its one form."""


class WrongHostError(Exception):
    """The document is for another host; the text names both."""


class Source(Part, frozen=True):
    """Where digests came from, for whoever reviews or audits the document."""

    name: Label
    """Package, file or host."""
    how: Origin
    version: Label = ""
    architecture: Label = ""
    sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """Of the .deb or the imported file."""


class Reference(Part, frozen=True):
    """One reference document.

    Raises:
        ValueError: a list is not sorted, or a path has no digest.
    """

    format: Literal["hostd-reference/2"]
    version: Version
    """Grows with every document that comes into force."""
    created: UnixTime
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    """Name of the host that it was reviewed for (`gethostname(2)`), or `ANY_HOST`."""
    previous: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """Digest of the document that this one was made from; it only follows that one. Empty: none."""
    files: dict[Name, tuple[Hex256, ...]] = msgspec.field(default_factory=dict)
    """Path → SHA-256 of the whole file."""
    next: dict[Name, tuple[Hex256, ...]] = msgspec.field(default_factory=dict)
    """Path → digests approved and not yet seen. Accepted like those of `files`."""
    retire: dict[Name, dict[Hex256, UnixTime]] = msgspec.field(default_factory=dict)
    """Path → digest → time from which it is not accepted any more."""
    remove: tuple[Name, ...] | msgspec.UnsetType = msgspec.UNSET
    """Paths of hostd's own files that may be missing: an approved update takes them away. Left out where
    there are none, so that documents without it keep their bytes."""
    ima: dict[Name, tuple[Digest, ...]] = msgspec.field(default_factory=dict)
    """Path → digests that the kernel's log may show besides those of `files`: of files inside the
    initramfs, say, or in another algorithm."""
    sources: tuple[Source, ...] = ()
    posture: PostureRule | None = None
    boot: BootRule | None = None
    kernel: KernelRule | None = None
    domain: DomainRule | None = None
    """None, here and above: there are no reference values, and the component is absent."""

    def __post_init__(self) -> None:
        lists = [*self.files.items(), *self.next.items(), *self.ima.items()]
        if self.posture is not None:
            lists.append(("modules", self.posture.modules))
        if self.remove is not msgspec.UNSET:
            if not self.remove:
                raise ValueError("remove: no path")
            lists.append(("remove", self.remove))
        for name, values in lists:
            if any(a >= b for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name}: not sorted, or a value twice")
        for path, digests in (*self.files.items(), *self.next.items(), *self.ima.items()):
            if not digests:
                raise ValueError(f"{path}: no digest")
        for path, times in self.retire.items():
            if not times:
                raise ValueError(f"{path}: nothing to retire")

    @property
    def leaving(self) -> frozenset[str]:
        """Paths of `remove`."""
        return frozenset() if self.remove is msgspec.UNSET else frozenset(self.remove)

    def expected(self, path: str) -> tuple[str, ...]:
        """Digests accepted for a mapped file, by the path the kernel gives; empty if there are none."""
        return self._accepted(path) or self._accepted(path.removesuffix(DELETED))

    def _accepted(self, path: str) -> tuple[str, ...]:
        known, coming = self.files.get(path, ()), self.next.get(path)
        return known if coming is None else tuple(sorted({*known, *coming}))

    def retired(self, path: str, digest: str) -> int | None:
        """Since when a digest that was accepted for a mapped file is not (unix time); None if it never
        was, or still is."""
        if digest in self.expected(path):
            return None
        times = self.retire.get(path) or self.retire.get(path.removesuffix(DELETED)) or {}
        return times.get(digest)

    def measured(self, path: str) -> tuple[str, ...]:
        """Digests accepted in the kernel's measurement log, as `algorithm:hex`.

        A retired digest is one of them as long as the document names it: the log is of the past, and
        tells what ran while it was still accepted.
        """
        digests = {*self._accepted(path), *self.retire.get(path, ())}
        return (*(f"sha256:{digest}" for digest in sorted(digests)), *self.ima.get(path, ()))

    def at(self, now: int) -> Reference:
        """The document as it is in force at `now` (unix time): without what is retired by then."""
        due = {
            path: {digest for digest, when in times.items() if when <= now}
            for path, times in self.retire.items()
        }
        if not any(due.values()):
            return self
        return msgspec.structs.replace(self, files=_without(self.files, due), next=_without(self.next, due))

    def next_change(self, now: int) -> int | None:
        """The next time after `now` at which a digest retires; None if none does."""
        return min((when for t in self.retire.values() for when in t.values() if when > now), default=None)


def _without(digests: dict[str, tuple[str, ...]], due: dict[str, set[str]]) -> dict[str, tuple[str, ...]]:
    left = {path: tuple(d for d in values if d not in due.get(path, ())) for path, values in digests.items()}
    return {path: values for path, values in left.items() if values}


def check_host(reference: Reference, host: str) -> None:
    """Whether the document is for the host of this name, exactly, or for all.

    Raises:
        WrongHostError: it is for another.
    """
    if reference.host not in (host, ANY_HOST):
        raise WrongHostError(f"it is for host {reference.host!r}, and this one is {host!r}")


def date_of(unix: int) -> str:
    """The date and minute of a unix time, as findings and hostctl show them."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")


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
        if OLD_FORMAT in data:
            text = "hostd-reference/1 is no longer read: make a new one with `hostctl manifest from-host`"
            raise MalformedReferenceError(text) from None
        raise MalformedReferenceError(str(error)) from None
    if encode_reference(reference) != data:
        raise MalformedReferenceError("not in canonical form")
    return reference


def reference_digest(reference: Reference) -> bytes:
    """SHA-256 over the canonical bytes: the document's identity."""
    return hashlib.sha256(encode_reference(reference)).digest()
