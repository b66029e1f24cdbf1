"""Making and changing reference documents (pure): from a host, for an update, and what differs.

Every function returns a new document that has not been signed by anybody. A changed one has the next
version and names the one that it was made from. `digests` map a path to SHA-256 values in hex.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hostd.core.reference import (
    DELETED,
    FORMAT,
    MalformedReferenceError,
    Reference,
    Source,
    encode_reference,
    parse_reference,
    reference_digest,
)
from hostd.core.rule_posture import propose_posture

if TYPE_CHECKING:
    from guestlib.attest.imalog import Entry
    from hostd.core.readings import FileIdentity, PostureReading
    from hostd.core.rule_boot import BootRule
    from hostd.core.rule_domain import DomainRule
    from hostd.core.rule_kernel import KernelRule

Digests = Mapping[str, Iterable[str]]
DAY_S: Final = 86_400


def checked(reference: Reference) -> Reference:
    """The document as whoever reads it will see it.

    Raises:
        ValueError: a value is out of the document's bounds.
    """
    try:
        return parse_reference(encode_reference(reference))
    except MalformedReferenceError as error:
        raise ValueError(str(error)) from error


def sorted_digests(digests: Digests) -> dict[str, tuple[str, ...]]:
    """Path → digests, as a document holds them; paths without any are left out."""
    found = {path: tuple(sorted(set(values))) for path, values in digests.items()}
    return {path: values for path, values in found.items() if values}


def merged(*parts: Digests) -> dict[str, tuple[str, ...]]:
    """All digests of all parts."""
    found: dict[str, set[str]] = {}
    for part in parts:
        for path, values in part.items():
            found.setdefault(path, set()).update(values)
    return sorted_digests(found)


def new_document(
    *, created: int, host: str, base: Reference | None, sources: Iterable[Source] = (), **parts: Any
) -> Reference:
    """A document with these parts. With `base` it follows that one, and nothing else is taken from it.

    Raises:
        ValueError: a value is out of the document's bounds.
    """
    return checked(
        Reference(
            format=FORMAT,
            version=1 if base is None else base.version + 1,
            created=created,
            host=host,
            previous="" if base is None else reference_digest(base).hex(),
            sources=ordered(sources),
            **parts,
        )
    )


def ordered(sources: Iterable[Source]) -> tuple[Source, ...]:
    """Sources sorted, each once."""
    return tuple(sorted(set(sources), key=lambda s: (s.name, s.version, s.architecture, s.how, s.sha256)))


def from_host(
    *,
    created: int,
    host: str,
    posture: PostureReading | None,
    files: Iterable[FileIdentity],
    survey: Mapping[str, bytes],
    log: Iterable[Entry],
    base: Reference | None = None,
    boot: BootRule | None = None,
    kernel: KernelRule | None = None,
    domain: DomainRule | None = None,
) -> Reference:
    """A document that accepts the host as it is now, for an officer to review.

    `files` are identities of what hypervisor processes map, `survey` digests of what is on disk (path →
    SHA-256, 32 bytes), `log` the kernel's measurements so far. Violations are not made acceptable. What
    `base`, the document in force, says of the coming and going of digests and files stays said.

    Raises:
        ValueError: a value is out of the document's bounds.
    """
    digests = merged(
        {path: (digest.hex(),) for path, digest in survey.items()},
        *({item.path.removesuffix(DELETED): (item.sha256.hex(),)} for item in files),
    )
    measured: dict[str, set[str]] = {}
    for entry in log:
        known = entry.algorithm == "sha256" and entry.digest.hex() in digests.get(entry.path, ())
        if entry.path and entry.digest and not entry.violation and not known:
            measured.setdefault(entry.path, set()).add(entry.content)
    coming: dict[str, tuple[str, ...]] = {}
    retire: dict[str, dict[str, int]] = {}
    leaving: frozenset[str] = frozenset()
    if base is not None:
        leaving = base.leaving & digests.keys()
        coming = {path: tuple(set(v) - set(digests.get(path, ()))) for path, v in base.next.items()}
        retire = base.retire
    return new_document(
        created=created,
        host=host,
        base=base,
        sources=(Source(name=host, how="host"),),
        files=digests,
        next=sorted_digests(coming),
        retire=retire,
        remove=_removals(leaving),
        ima=sorted_digests(measured),
        posture=None if posture is None else propose_posture(posture),
        boot=boot,
        kernel=kernel,
        domain=domain,
    )


def _removals(paths: Iterable[str]) -> tuple[str, ...] | msgspec.UnsetType:
    return tuple(sorted(paths)) or msgspec.UNSET


def _changed(base: Reference, created: int, **parts: Any) -> Reference:
    digest = reference_digest(base).hex()
    return checked(
        msgspec.structs.replace(base, version=base.version + 1, created=created, previous=digest, **parts)
    )


def approve_next(
    base: Reference,
    digests: Digests,
    *,
    created: int,
    sources: Iterable[Source] = (),
    retire_after_s: int | None = None,
    removals: Iterable[str] = (),
) -> Reference:
    """`base` with these digests as `next`; with `retire_after_s` all others of the same paths retire so
    long after `created`, and those of `removals` too. A digest that was to retire, or whose file was to be
    removed, and that is approved again stays.

    Raises:
        ValueError: a value is out of the document's bounds, or a file to be removed is unknown to `base` or
            among `digests`.
    """
    wanted = sorted_digests(digests)
    gone = frozenset(removals)
    for path in sorted(gone):
        if path in wanted:
            raise ValueError(f"{path}: it cannot be removed and replaced at once")
        if path not in base.files and path not in base.next:
            raise ValueError(f"{path}: the manifest has no such file to remove")
    coming = merged(base.next, {p: set(v) - set(base.files.get(p, ())) for p, v in wanted.items()})
    retire = {
        path: {digest: when for digest, when in times.items() if digest not in wanted.get(path, ())}
        for path, times in base.retire.items()
    }
    if retire_after_s is not None:
        for path, values in {**wanted, **dict.fromkeys(gone, ())}.items():
            for old in {*base.files.get(path, ()), *base.next.get(path, ())} - set(values):
                times = retire.setdefault(path, {})
                times[old] = min(created + retire_after_s, times.get(old, created + retire_after_s))
    return _changed(
        base,
        created,
        next=coming,
        retire={path: times for path, times in retire.items() if times},
        remove=_removals((base.leaving - wanted.keys()) | gone),
        sources=ordered((*base.sources, *sources)),
    )


def retire(
    base: Reference,
    *,
    created: int,
    paths: Iterable[str] | None = None,
    seen: Mapping[str, Iterable[str]] | None = None,
    after_s: int = 0,
) -> Reference:
    """`base` after an update: `next` digests become `files`, and the old digests of the same paths retire
    `after_s` after `created`; so do all digests of files that were to be removed. Digests whose time has
    come leave the document's `files`; their entry in `retire` stays, so that a finding can say since when.

    `paths` limits it to those; None: all paths that have a `next`. With `seen` (path → digests in use on
    the host) only digests that nobody uses retire, of every path that has several, and only a `next`
    that was seen counts as arrived. A file to be removed of which nothing was seen counts as removed.

    Raises:
        ValueError: nothing would change, or a value is out of the document's bounds.
    """
    files = {path: set(values) for path, values in base.files.items()}
    coming = {path: set(values) for path, values in base.next.items()}
    times = {path: dict(values) for path, values in base.retire.items()}
    unused = 0
    several = {path for path, values in files.items() if len(values) > 1}
    candidates = sorted({*coming, *several, *base.leaving}) if paths is None else list(paths)
    for path in candidates:
        used = None if seen is None else set(seen.get(path, ()))
        arrived = {d for d in coming.get(path, ()) if used is None or d in used}
        if path in base.leaving:
            if used:
                continue  # it is still in use
            arrived, old = set(), files.get(path, set()) | coming.get(path, set())
        elif seen is None:
            old = files.get(path, set()) - arrived if arrived else set()
        else:
            old = files.get(path, set()) - (used or set())
            if old == files.get(path, set()) and not arrived:
                unused += 1
                continue  # nothing of this path is in use: that says nothing about which one is old
        files.setdefault(path, set()).update(arrived)
        coming[path] = coming.get(path, set()) - arrived
        for digest in old:
            when = created + after_s
            known = times.setdefault(path, {})
            known[digest] = min(when, known.get(digest, when))
    for path, values in times.items():
        gone = {digest for digest, when in values.items() if when <= created}
        files[path] = files.get(path, set()) - gone
        coming[path] = coming.get(path, set()) - gone
    parts: dict[str, Any] = {
        "files": sorted_digests(files),
        "next": sorted_digests(coming),
        "retire": {path: values for path, values in times.items() if values},
        "remove": _removals(path for path in base.leaving if files.get(path) or coming.get(path)),
    }
    if all(getattr(base, name) == value for name, value in parts.items()):
        raise ValueError(_nothing(len(candidates), unused if seen is not None else None))
    return _changed(base, created, **parts)


def _nothing(candidates: int, unused: int | None) -> str:
    """Why nothing retires; `unused` of the paths are not in use at all (None: nobody asked for that)."""
    if not candidates:
        return (
            "nothing to retire: no path has several digests, or one that is next, and none is to be removed"
        )
    if unused is None:
        return "nothing to retire: no `next` digest replaces one, and no file is to be removed"
    return (
        f"nothing to retire: {candidates} paths have several digests; of {unused} of them this host has used "
        "none, which does not tell which one is old, and of the others all that could end are in use"
    )


class Counts(msgspec.Struct, frozen=True):
    """How much a document says, counted the same way wherever it is shown."""

    files: int
    """Paths that have a digest in use."""
    next: int
    """Digests approved and not yet in use."""
    retire: int
    """Digests whose time is still to come."""
    remove: int
    """Files that may be missing."""

    def __str__(self) -> str:
        digests = f"digests: {self.next} next, {self.retire} to retire"
        return f"{self.files} files; {digests}; {self.remove} files to remove"


def counts(reference: Reference, now: int) -> Counts:
    """Of a document at `now` (unix time)."""
    return Counts(
        files=len(reference.files),
        next=sum(map(len, reference.next.values())),
        retire=sum(when > now for times in reference.retire.values() for when in times.values()),
        remove=len(reference.leaving),
    )


class Difference(msgspec.Struct, frozen=True):
    """One thing in which two documents differ."""

    part: str
    """`files`, `next`, `retire`, `remove`, `ima`, `posture`, …"""
    what: str
    """`added`, `removed`, `changed`."""
    name: str
    """Path or key."""
    before: str
    after: str
    """Times are dates in UTC, as ISO 8601 writes them."""


def diff(a: Reference, b: Reference) -> tuple[Difference, ...]:
    """What `b` says otherwise than `a`, part by part, sorted; empty if they say the same."""
    left, right = msgspec.to_builtins(a), msgspec.to_builtins(b)
    found: list[Difference] = []
    for part in Reference.__struct_fields__:
        before, after = (_shown(part, side.get(part)) for side in (left, right))
        if isinstance(before, dict) and isinstance(after, dict):
            for name in sorted({*before, *after}):
                if before.get(name) != after.get(name):
                    found.append(_difference(part, name, before.get(name), after.get(name)))
        elif before != after:
            found.append(_difference(part, part, before, after))
    return tuple(found)


def _shown(part: str, value: Any) -> Any:
    """What a part holds, as it is compared: lists by their items, times as dates."""
    match part:
        case "sources":
            return {_source(source): "there" for source in value}
        case "remove":
            return dict.fromkeys(value or (), "may be missing")
        case "created":
            return _date(value)
        case "retire":
            return {path: {d: _date(when) for d, when in times.items()} for path, times in value.items()}
    return value


def _date(unix: int) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _source(source: dict[str, str]) -> str:
    return " ".join(
        source[key] for key in ("name", "version", "architecture", "how", "sha256") if source[key]
    )


def _difference(part: str, name: str, before: object, after: object) -> Difference:
    what = "added" if before is None else "removed" if after is None else "changed"
    return Difference(part, what, name, _text(before), _text(after))


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return str(value)
