"""How hostctl shows a whole manifest to people: part by part, safe for a terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from hostd.admin.render import safe
from hostd.core.manifest import counts
from hostd.core.reference import ANY_HOST, date_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hostd.core.reference import Reference, Source

_RULES = ("posture", "boot", "kernel", "domain")


def host_text(reference: Reference) -> str:
    """Which hosts it is for."""
    return "every host" if reference.host == ANY_HOST else f"host {safe(reference.host)}"


def document_lines(reference: Reference, digest: str, now: int) -> Iterator[str]:
    """Everything that the document says, for reading; `digest` is its own, in hex, `now` the unix time.

    Nothing is left out: a path has a line for each digest, a rule is shown as the document has it, indented.
    """
    yield f"version {reference.version} for {host_text(reference)}, made {date_of(reference.created)}"
    yield f"digest   {digest}"
    yield f"follows  {reference.previous or 'none'}"
    yield str(counts(reference, now))
    yield from _part("files", reference.files)
    yield from _part("next", reference.next)
    times = {
        path: [f"{digest}  {date_of(when)}" for digest, when in sorted(values.items(), key=lambda v: v[1])]
        for path, values in reference.retire.items()
    }
    yield from _part("retire", times)
    yield from _part("remove", {path: ["may be missing"] for path in reference.leaving})
    yield from _part("ima", reference.ima)
    if reference.sources:
        yield from ("", "sources")
        yield from (f"  {safe(source_text(source))}" for source in reference.sources)
    for name in _RULES:
        rule = getattr(reference, name)
        yield ""
        if rule is None:
            yield f"{name}: no reference values"
            continue
        text = json.dumps(msgspec.to_builtins(rule), indent=2, sort_keys=True, ensure_ascii=False)
        yield f"{name} {safe(text.splitlines()[0])}"
        yield from (safe(line) for line in text.splitlines()[1:])


def source_text(source: Source) -> str:
    """A source in one line, without what it does not say."""
    return " ".join(
        filter(None, (source.name, source.version, source.architecture, source.how, source.sha256))
    )


def _part(name: str, values: Mapping[str, tuple[str, ...] | list[str]]) -> Iterator[str]:
    if values:
        yield from ("", name)
    for path, lines in sorted(values.items()):
        yield from (f"  {safe(path)}  {safe(line)}" for line in lines)
