"""`hostctl ledger`: the record of every use and every refusal.

What the vault says of entries is shown; what it claims of the whole is computed here, as somebody else would
(docs/ledger.md). With `--dir` no vault is needed.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from guestlib.errors import MalformedError
from hostd.admin.context import LONG_S, Context, made
from hostd.admin.render import ledger_lines, safe
from hostd.core.merkle import verify_consistency
from hostd.ipc import operating as adm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guestlib.attest.bundle import TrustBundle
    from hostd.admin import ledger_read

PAGE: Final = 1000
_FOLDER: Final = click.Path(path_type=Path, file_okay=False)
_FILE: Final = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.group()
def ledger() -> None:
    """The record of every use and every refusal."""


def _since(_context: object, _parameter: object, text: str | None) -> int:
    """UTC milliseconds; `2h` is two hours ago."""
    if text is None:
        return 0
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    try:
        if unit is not None and text[:-1].isdecimal():
            return int((time.time() - int(text[:-1]) * unit) * 1000)
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise click.BadParameter("a UTC time (2026-01-31T12:00) or an age (30m, 12h, 7d)") from None


@ledger.command("list")
@click.option("-n", "--count", type=click.IntRange(1, 100_000), default=20, show_default=True)
@click.option("--start", type=click.IntRange(0), help="First entry to look at; default: the last ones.")
@click.option("--tenant", help="Only of this tenant.")
@click.option("--principal", help='Only of this principal, as `VM::"…"`.')
@click.option("--event", help="Only this event (`operation`, `drift`, `pass`, …) or operation (`Encrypt`).")
@click.option("--since", callback=_since, metavar="TIME", help="UTC time (2026-01-31T12:00) or age (12h).")
@click.pass_obj
def ledger_list(
    context: Context,
    count: int,
    start: int | None,
    tenant: str | None,
    principal: str | None,
    event: str | None,
    since: int,
) -> None:
    """Entries of the ledger, oldest first."""

    def wanted(entry: dict[str, Any]) -> bool:
        return (
            (tenant is None or entry.get("tenant") == tenant)
            and (principal is None or entry.get("principal") == principal)
            and (event is None or event in (entry["event"], entry.get("op")))
            and entry["time"] >= since
        )

    pages = _Pages(context)
    found: list[dict[str, Any]] = []
    if start is None:
        for page in pages.backward(count):
            found = [*filter(wanted, page), *found][-count:]
            # Entries are in order of time, but for a clock that was set.
            if len(found) == count or page[0]["time"] < since:
                break
    else:
        for page in pages.forward(start):
            found = [*found, *filter(wanted, page)][:count]
            if len(found) == count:
                break
    context.show(
        {"entries": found, "size": pages.size, "root": pages.root},
        lambda: click.echo("\n".join(ledger_lines(found))),
    )


class _Pages:
    """Entries as the vault gives them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.size, self.root, self.first = 0, "", 0

    def _page(self, start: int, count: int, order: str = "from") -> tuple[int, list[dict[str, Any]]]:
        command = made(adm.ListLedger, start=start, count=count, order=order)
        page = self._context.ask(command, adm.LedgerPage)
        self.size, self.root, self.first = page.size, page.root, page.first
        return page.start, [msgspec.json.decode(line) for line in page.lines]

    def forward(self, start: int) -> Iterator[list[dict[str, Any]]]:
        while True:
            _, page = self._page(start, PAGE)
            if not page:
                return
            yield page
            start += len(page)

    def backward(self, count: int) -> Iterator[list[dict[str, Any]]]:
        start, _ = self._page(0, 1, "last")
        end = start + 1 if self.size else 0
        step = min(PAGE, max(count, 100))
        while end > self.first:
            start = max(self.first, end - step)
            page: list[dict[str, Any]] = []
            while len(page) < end - start:
                _, some = self._page(start + len(page), end - start - len(page))
                if not some:
                    return
                page += some
            yield page
            end, step = start, PAGE


@ledger.command("show")
@click.argument("entry", type=click.IntRange(0))
@click.pass_obj
def ledger_show(context: Context, entry: int) -> None:
    """Everything that one entry says."""
    page = context.ask(made(adm.ListLedger, start=entry, count=1), adm.LedgerPage)
    if not page.lines:
        raise click.UsageError(f"there is no entry {entry}; the ledger has {page.size}")
    said = msgspec.json.decode(page.lines[0])

    def render() -> None:
        for name, value in said.items():
            text = value if isinstance(value, str) else json.dumps(value)
            click.echo(f"{name:<15} {safe(text)}")

    context.show(said, render)


@ledger.command("prove")
@click.argument("entry", type=click.IntRange(0), required=False)
@click.option("--check", type=_FILE, help="Verify such a document instead; needs --trust, and no vault.")
@click.option("--trust", type=_FILE, help="The trust bundle to verify with.")
@click.pass_obj
def ledger_prove(context: Context, entry: int | None, check: Path | None, trust: Path | None) -> None:
    """Write a document that proves that an entry is in the ledger: JSON, to be verified anywhere."""
    if check is not None:
        if trust is None or entry is not None:
            raise click.UsageError("--check FILE needs --trust FILE, and no entry")
        from hostd.admin.ledger_read import verify_proof

        try:
            document = msgspec.json.decode(check.read_bytes())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedError(f"proof: {error}") from error
        vouched = verify_proof(document, _bundle(trust))
        click.echo(f"entry {document['index']} is in the ledger; signed by: {', '.join(vouched)}")
        return
    if entry is None:
        raise click.UsageError("which entry?")
    from hostd.admin.ledger_read import Proof

    found = context.ask(adm.ProveLedger(entry), adm.LedgerProof)
    proof = Proof(found.index, found.line.decode(), found.proof, found.checkpoint.decode())
    click.echo(msgspec.json.format(msgspec.json.encode(proof), indent=2))


@ledger.command("consistency")
@click.argument("old", type=click.IntRange(1))
@click.argument("new", type=click.IntRange(1))
@click.pass_obj
def ledger_consistency(context: Context, old: int, new: int) -> None:
    """The proof that the ledger of NEW entries begins with the ledger of OLD entries (sizes)."""
    found = context.ask(adm.LedgerConsistency(old, new), adm.ConsistencyProof)
    verify_consistency(found.old, found.old_root, found.new, found.new_root, found.proof)
    document = {
        "format": "hostd-ledger-consistency/1",
        "old": found.old,
        "old_root": _base64(found.old_root),
        "new": found.new,
        "new_root": _base64(found.new_root),
        "proof": [_base64(node) for node in found.proof],
    }
    click.echo(json.dumps(document, indent=2))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@ledger.command("checkpoint")
@click.option("--key", is_flag=True, help="The key that verifies it instead, as signed notes write keys.")
@click.pass_obj
def ledger_checkpoint(context: Context, key: bool) -> None:
    """The newest checkpoint: a C2SP signed note that witnesses and log tools read."""
    found = context.ask(adm.LedgerCheckpoint(), adm.Checkpoint)
    context.show(found, lambda: click.echo(found.key + "\n" if key else found.note, nl=False))


@ledger.command("verify")
@click.option("--dir", "folder", type=_FOLDER, help="An export, archive or state directory; needs no vault.")
@click.option("--trust", type=_FILE, help="With --dir: the trust bundle whose keys must have signed.")
@click.pass_obj
def ledger_verify(context: Context, folder: Path | None, trust: Path | None) -> None:
    """Compare every entry with what was recorded; says which one is not. Exit code 4 if one is not."""
    if (folder is None) != (trust is None):
        raise click.UsageError("--dir and --trust go together")
    if folder is not None and trust is not None:
        from hostd.admin.ledger_read import verify

        read = verify(folder, _bundle(trust))
        context.show(read, lambda: click.echo(_told(read)))
        problem = read.problem
    else:
        found = context.ask(adm.VerifyLedger(), adm.LedgerVerified, LONG_S)
        archived = f" (the first {found.first} are archived)" if found.first else ""
        fine = f"{found.entries} entries agree with the head {found.root}{archived}"
        context.show(found, lambda: click.echo(safe(found.problem) or fine))
        problem = found.problem
    if problem:
        sys.exit(4)


def _told(found: ledger_read.Verified) -> str:
    if found.problem:
        return safe(found.problem)
    before = f" (entries before {found.first} are not here: an archive has them)" if found.first else ""
    after = f" (and {found.later} after them that no signature here covers)" if found.later else ""
    by = ", ".join(found.vouched)
    return f"{found.entries} entries lead to the signed root{before}{after}; signed by: {by}"


@ledger.command("export")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option("--archive", type=_FOLDER, help="Where archived entries are.")
@click.pass_obj
def ledger_export(context: Context, folder: Path, archive: Path | None) -> None:
    """Write the ledger as C2SP tlog-tiles: tiles, entry bundles and a checkpoint."""
    from hostd.admin.ledger_read import archived_lines
    from hostd.admin.ledger_write import export

    held = context.ask(adm.ListSegments(), adm.SegmentList)
    first = (*held.starts, held.end)[0]
    older = None
    if first:
        if archive is None:
            raise click.UsageError(f"the first {first} entries are archived: --archive DIR says where")
        older = archived_lines(archive, first)
    count = export(_ask(context), folder, older, first)
    click.echo(f"{count} entries in {folder}")


@ledger.command("archive")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option(
    "--keep", type=click.IntRange(0), default=1, show_default=True, help="Closed segments that stay."
)
@click.pass_obj
def ledger_archive(context: Context, folder: Path, keep: int) -> None:
    """Move closed segments to a folder, with a checkpoint and the proof that the ledger goes on from them."""
    from hostd.admin import ledger_write

    first, end = ledger_write.archive(_ask(context), folder, keep)
    click.echo(f"entries {first} to {end - 1} are in {folder}")


def _bundle(path: Path) -> TrustBundle:
    """Imported when it is needed, as all that verifies signatures: the other commands start without."""
    from guestlib.attest.bundle import parse_bundle

    return parse_bundle(path.read_bytes())


def _ask(context: Context) -> Callable[[adm.LedgerCommand, type], object]:
    return lambda command, result: context.ask(command, result)
