"""hostctl channel: the CA of the certificates that guests see."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from hostd.admin.context import made
from hostd.ipc.channel_ca import CaLine, ChannelReport, RotateChannel, ShowChannel

if TYPE_CHECKING:
    from hostd.admin.context import Context


def _date(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%MZ}"


def _lines(ca: CaLine, name: str) -> tuple[str, str]:
    return f"{name:<8} {ca.digest}", f"{'':<8} since {_date(ca.not_before)}, until {_date(ca.not_after)}"


def _show(context: Context, report: ChannelReport) -> None:
    def render() -> None:
        click.echo("\n".join(_lines(report.ca, "CA")))
        click.echo(f"renews   {_date(report.renews)}")
        click.echo(f"issued   {report.issued} certificates since the vault's start")
        if report.next is not None:
            click.echo("\n".join(_lines(report.next, "next")))

    context.show(report, render)


@click.group()
def channel() -> None:
    """The CA of the certificates that guests see."""


@channel.command("show")
@click.pass_obj
def channel_show(context: Context) -> None:
    """The channel CA in force: its key's digest, since when and until when, certificates issued."""
    _show(context, context.ask(ShowChannel(), ChannelReport))


@channel.command("rotate")
@click.option("--prepare", is_flag=True, help="Make the next CA and show it in bundles; change nothing else.")
@click.option("--commit", is_flag=True, help="Put the prepared CA into force.")
@click.pass_obj
def channel_rotate(context: Context, prepare: bool, commit: bool) -> None:
    """Put another channel CA into force.

    Open connections go on; new ones get a certificate by the new CA. Trust bundles that pin the CA before
    accept no new connection: with --prepare, new bundles (`hostctl trust bundle`) accept both, and --commit
    follows when every guest has one. With neither, a new CA at once, and what was prepared is forgotten.
    """
    if prepare and commit:
        raise click.UsageError("--prepare or --commit, not both")
    step = "prepare" if prepare else "commit" if commit else "now"
    _show(context, context.ask(made(RotateChannel, step=step), ChannelReport))
