"""`hostctl manifest`: commands that carry an update through. None of them puts anything into force."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from guestlib.errors import HostdError
from hostd.admin.context import Context
from hostd.admin.manifest_files import IN_FORCE, hash_files, hash_folder, kernel_path, load, write
from hostd.admin.manifest_make import FILE, FOLDER, now, of_packages, origin_notes, output, tell, well_formed
from hostd.admin.manifest_packages import of_apt
from hostd.core.manifest import DAY_S, approve_next, merged
from hostd.core.manifest import retire as retired
from hostd.core.reference import Source
from hostd.ipc.manifest_status import ManifestReport, ManifestStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

DAYS: Final = click.IntRange(0, 3650)
PROPOSED_DAYS: Final = 14
"""How long a proposal lets old builds run: VMs are to be restarted or moved away by then."""
REMOVE_HELP: Final = "A file of hostd's own that will be gone (again for more)."


@click.command("approve-next")
@click.argument("base")
@output
@click.option("--deb", "debs", type=FILE, multiple=True, help="A .deb file that will be installed.")
@click.option("--file", "files", type=FILE, multiple=True, help="A file that will replace one of its path.")
@click.option("--folder", type=FOLDER, help="All that will be in its folder; what it lacks will be gone.")
@click.option("--as", "path_as", metavar="PATH", help="Of one --file, or of --folder: the path it will have.")
@click.option("--remove", "removals", multiple=True, metavar="PATH", help=REMOVE_HELP)
@click.option("--retire-after", type=DAYS, metavar="DAYS", help="Old digests of the same paths end then.")
@click.option("--no-archive", is_flag=True, help="Do not compare with apt's lists.")
@click.pass_obj
def approve(
    context: Context,
    base: str,
    output: Path,
    debs: tuple[Path, ...],
    files: tuple[Path, ...],
    folder: Path | None,
    path_as: str | None,
    removals: tuple[str, ...],
    retire_after: int | None,
    no_archive: bool,
) -> None:
    """Accept new builds besides those that BASE accepts (a file, or `@`: in force)."""
    if not debs and not files and not removals and folder is None:
        raise click.UsageError("name --deb, --file, --folder or --remove")
    if path_as is not None and len(files) + (folder is not None) != 1:
        raise click.UsageError("--as goes with one --file, or with --folder")
    before = load(context, base)
    digests, sources = of_packages((), debs, archive=not no_archive)
    by_hand = hash_files(files)
    gone = {*map(kernel_path, removals)}
    if folder is not None:
        place, inside = hash_folder(folder, path_as)
        by_hand.update(inside)
        gone |= {path for path in before.files if path.startswith(place) and path not in inside}
        sources.append(Source(str(folder)[:256], "files"))
    elif path_as is not None:
        by_hand = {kernel_path(path_as): next(iter(by_hand.values()))}
    sources += [Source(str(path)[:256], "files") for path in files]
    reference = well_formed(
        lambda: approve_next(
            before,
            merged(digests, by_hand),
            created=now(),
            sources=sources,
            retire_after_s=None if retire_after is None else retire_after * DAY_S,
            removals=gone,
        )
    )
    tell(context, output, reference, *origin_notes(sources))


@click.command()
@click.argument("base")
@output
@click.option("--path", "paths", multiple=True, help="Only this path (again for more).")
@click.option(
    "--unseen",
    is_flag=True,
    help="End what this host has not used since its boot, of paths that it does use.",
)
@click.option("--after", type=DAYS, metavar="DAYS", default=0, help="Not now, but after so many days.")
@click.pass_obj
def retire(
    context: Context, base: str, output: Path, paths: tuple[str, ...], unseen: bool, after: int
) -> None:
    """End an update: what was next in BASE (a file, or `@`: in force) is in use, and what it replaced
    ends."""
    seen = context.ask(ManifestStatus(), ManifestReport).seen if unseen else None
    reference = well_formed(
        lambda: retired(
            load(context, base), created=now(), paths=paths or None, seen=seen, after_s=after * DAY_S
        )
    )
    tell(context, output, reference)


@click.command()
@click.option("--deb", "debs", type=FILE, multiple=True, help="A .deb file that will be installed.")
@click.option("--apt", "by_apt", is_flag=True, help="As apt's hook: files on standard input; never fails.")
@click.option("--retire-after", type=DAYS, metavar="DAYS", default=PROPOSED_DAYS, show_default=True)
@click.pass_obj
def propose(context: Context, debs: tuple[Path, ...], by_apt: bool, retire_after: int) -> None:
    """Prepare the manifest that packages to be installed need, on top of the one in force, for officers to
    sign."""
    if not by_apt:
        _propose(context, debs, retire_after)
        return
    try:
        _propose(context, of_apt(sys.stdin), retire_after)
    except (HostdError, OSError, ValueError) as error:
        click.echo(f"hostd: no manifest was proposed: {error}", err=True)


def _propose(context: Context, debs: Iterable[Path], retire_after: int) -> None:
    base = load(context, IN_FORCE)
    digests, sources = of_packages((), debs, archive=False)
    unknown = {
        path: values
        for path, values in digests.items()
        if not set(values) <= set(base.at(now()).expected(path))
    }
    if not unknown:
        click.echo("hostd: the manifest in force knows these packages", err=True)
        return
    reference = well_formed(
        lambda: approve_next(
            base, unknown, created=now(), sources=sources, retire_after_s=retire_after * DAY_S
        )
    )
    folder = context.config.state / "proposals"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{reference.version}.json"
    write(path, reference)
    click.echo(
        f"hostd: {len(unknown)} files of {len(sources)} packages are not in the manifest in force\n"
        f"hostd: review:   hostctl manifest diff {IN_FORCE} {path}\n"
        f"hostd: each officer:   hostctl manifest sign {path} -k KEY\n"
        f"hostd: then:   hostctl manifest install {path}",
        err=True,
    )
