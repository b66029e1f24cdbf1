"""`hostctl manifest`: commands that make a manifest. None of them puts anything into force."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from guestlib.errors import ConflictError, MalformedError
from hostd.admin.context import LONG_S, Context
from hostd.admin.manifest_files import (
    IN_FORCE,
    hash_files,
    hash_folders,
    load,
    read,
    write,
)
from hostd.admin.manifest_keylime import MAX_POLICY_BYTES, parse_policy
from hostd.admin.manifest_packages import (
    Contents,
    read_deb,
    read_installed,
)
from hostd.admin.manifest_show import host_text
from hostd.admin.render import safe
from hostd.core.manifest import checked, counts, diff, merged, new_document, ordered
from hostd.core.reference import ANY_HOST, Reference, Source, parse_reference
from hostd.ipc import operating as adm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDER: Final = click.Path(path_type=Path, exists=True, file_okay=False)
DAYS: Final = click.IntRange(0, 3650)

HOST_HELP: Final = f"Name of the host that it is for; '{ANY_HOST}': every host."

output = click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
chain = (
    click.option("--host", metavar="NAME", help=HOST_HELP + " Default: BASE's, or this machine's."),
    click.option("--on", metavar="BASE", help=f"The manifest that it is to follow (`{IN_FORCE}`: in force)."),
    click.option("--into", type=FILE, help="Put the digests into this one that nobody has signed yet."),
)


def chained(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(chain):
        command = option(command)
    return command


def tell(context: Context, path: Path, reference: Reference, *notes: str) -> None:
    """Writes the document, and says what it is and how to go on."""
    digest = write(path, reference)
    counted = counts(reference, now())
    value = {
        "file": str(path),
        "digest": digest,
        "version": reference.version,
        "host": reference.host,
        **msgspec.structs.asdict(counted),
        "notes": list(notes),
    }

    def render() -> None:
        for note in notes:
            click.echo(f"note: {note}", err=True)
        click.echo(
            f"wrote {path}: version {reference.version} for {host_text(reference)}: {counted}\n"
            f"digest {digest}\nreview it, then: hostctl manifest sign {path} -k KEY; "
            f"hostctl manifest install {path}"
        )

    context.show(value, render)


def now() -> int:
    return int(time.time())


def well_formed(make: Callable[[], Reference]) -> Reference:
    try:
        return make()
    except ValueError as error:
        raise MalformedError(str(error)) from None


def _document(
    context: Context,
    digests: Mapping[str, Iterable[str]],
    sources: Iterable[Source],
    *,
    host: str | None,
    on: str | None,
    into: Path | None,
    **parts: Any,
) -> Reference:
    """A new document with these files; `into` keeps everything else of a document that is in the making. It
    is for `host`; None: for that of the other document, or this machine."""
    files = merged(digests)
    if into is not None:
        if on is not None:
            raise click.UsageError("--on and --into exclude each other")
        before = load(context, str(into))
        changed = msgspec.structs.replace(
            before,
            host=before.host if host is None else host,
            files=files,
            sources=ordered((*before.sources, *sources)),
            **parts,
        )
        return well_formed(lambda: checked(changed))
    base = None if on is None else load(context, on)
    name = host or (os.uname().nodename if base is None else base.host)
    return well_formed(
        lambda: new_document(created=now(), host=name, base=base, sources=sources, files=files, **parts)
    )


def of_packages(
    names: Iterable[str],
    debs: Iterable[Path],
    *,
    archive: bool,
    installed: bool = False,
    without_altered: bool = False,
) -> tuple[dict[str, tuple[str, ...]], list[Source]]:
    found: list[Contents] = [read_deb(path, archive=archive) for path in debs]
    for name in names:
        found += read_installed(name, archive=archive)
    if installed:
        found += read_installed(archive=archive)
    altered = [line for item in found for line in item.altered]
    for line in altered:
        click.echo(f"altered: {safe(line)}", err=True)
    if altered and not without_altered:
        raise ConflictError(
            f"{len(altered)} files are not what their packages installed; `--without-altered` leaves them out"
        )
    digests = merged(*({path: (digest,) for path, digest in item.digests.items()} for item in found))
    return digests, [item.source for item in found]


def origin_notes(sources: Iterable[Source]) -> list[str]:
    """What a reviewer should know about the digests' origin."""
    found = list(sources)
    counts = {how: sum(1 for s in found if s.how == how) for how in ("deb-archive", "deb", "installed")}
    texts = {
        "deb-archive": "from .deb files that apt's lists have",
        "deb": "from .deb files that no list of apt's has",
        "installed": "from installed files that agree with dpkg's own sums",
    }
    return [f"{count} packages {texts[how]}" for how, count in counts.items() if count]


@click.command()
@output
@chained
@click.option("--file", "files", type=FILE, multiple=True, help="A file, whatever it holds.")
@click.option("--folder", "folders", type=FOLDER, multiple=True, help="All code under a folder.")
@click.pass_obj
def create(
    context: Context,
    output: Path,
    host: str | None,
    on: str | None,
    into: Path | None,
    files: tuple[Path, ...],
    folders: tuple[Path, ...],
) -> None:
    """Make a manifest from files of this machine (or an empty one)."""
    digests = merged(hash_files(files), hash_folders(folders))
    sources = [Source(str(path)[:256], "files") for path in (*files, *folders)]
    tell(context, output, _document(context, digests, sources, host=host, on=on, into=into))


@click.command("from-packages")
@click.argument("packages", metavar="[PKG]...", nargs=-1)
@output
@chained
@click.option("--deb", "debs", type=FILE, multiple=True, help="A .deb file.")
@click.option("--installed", is_flag=True, help="All packages that are installed.")
@click.option("--no-archive", is_flag=True, help="Do not compare with apt's lists.")
@click.option("--without-altered", is_flag=True, help="Leave out files that somebody changed on the disk.")
@click.pass_obj
def from_packages(
    context: Context,
    packages: tuple[str, ...],
    output: Path,
    host: str | None,
    on: str | None,
    into: Path | None,
    debs: tuple[Path, ...],
    installed: bool,
    no_archive: bool,
    without_altered: bool,
) -> None:
    """Make a manifest of the code in Debian packages, as the packages say it is."""
    if not packages and not debs and not installed:
        raise click.UsageError("name packages, --deb files or --installed")
    digests, sources = of_packages(
        packages, debs, archive=not no_archive, installed=installed, without_altered=without_altered
    )
    reference = _document(context, digests, sources, host=host, on=on, into=into)
    tell(context, output, reference, *origin_notes(sources))


@click.command("import-keylime")
@click.argument("policy", type=FILE)
@output
@chained
@click.pass_obj
def import_keylime(
    context: Context, policy: Path, output: Path, host: str | None, on: str | None, into: Path | None
) -> None:
    """Make a manifest from a Keylime runtime policy (JSON)."""
    data = read(policy, MAX_POLICY_BYTES)
    found = parse_policy(data)
    source = Source(policy.name[:256], "keylime", sha256=hashlib.sha256(data).hexdigest())
    reference = _document(context, found.files, [source], host=host, on=on, into=into, ima=found.ima)
    tell(context, output, reference, *(f"left out: {text}" for text in found.left_out))


@click.command("from-host")
@output
@click.option("--host", metavar="NAME", help=HOST_HELP + " Default: the vault's.")
@click.pass_obj
def from_host(context: Context, output: Path, host: str | None) -> None:
    """Read this host as it is, through the vault, into a manifest for review."""
    click.echo("reading files, processes and the kernel; this takes a while …", err=True)
    document = context.ask(adm.CaptureManifest(), adm.Document, LONG_S).document
    reference = parse_reference(document)
    if host is not None:
        named = msgspec.structs.replace(reference, host=host)
        reference = well_formed(lambda: checked(named))
    tell(context, output, reference)


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.pass_obj
def compare(context: Context, a: str, b: str) -> None:
    """What manifest B says otherwise than A (files, or `@`: in force). Exit code 1 if something differs."""
    found = diff(load(context, a), load(context, b))
    signs = {"added": "+", "removed": "-", "changed": "~"}

    def render() -> None:
        for item in found:
            name = "" if item.name == item.part else f" {safe(item.name)}"
            click.echo(f"{signs[item.what]} {item.part}{name}")
            for sign, text in (("-", item.before), ("+", item.after)):
                if text:
                    click.echo(f"    {sign} {safe(text)}")
        if not found:
            click.echo("no difference")

    context.show(found, render)
    if found:
        sys.exit(1)
