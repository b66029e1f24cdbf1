"""What every command of hostctl shares: the configuration, the vault's answers, and how they are shown."""

from __future__ import annotations

import json
import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import msgspec

from hostd.admin.link import Link, plain
from hostd.admin.render import safe
from hostd.config import load_config
from hostd.ipc import operating as adm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from rich.console import Console

    from hostd.config import Config

T = TypeVar("T")
WIDE: Final = 250
"""Columns of what goes to a file or another program: nothing is cut."""
ANSWER_S: Final = 30.0
SLACK_S: Final = 5.0
LONG_S: Final = 900.0
"""A survey of a whole system on a slow machine."""


def uuid(value: str) -> str:
    """A VM's UUID, in lower case as the kernel and libvirt write it.

    Raises:
        click.BadParameter: it is none.
    """
    try:
        return msgspec.convert(value.lower(), adm.Uuid)
    except msgspec.ValidationError:
        raise click.BadParameter(f"{value!r} is no VM's UUID; `hostctl vm list` shows them") from None


class Context:
    """One run of hostctl."""

    def __init__(self, config_path: Path, as_json: bool) -> None:
        self._config_path = config_path
        self.as_json = as_json

    @cached_property
    def config(self) -> Config:
        """Read when a command needs it: an officer signs where there is no hostd.

        Raises:
            ConfigError: it cannot be used.
        """
        return load_config(self._config_path)

    @cached_property
    def out(self) -> Console:
        """For tables and colours; imported when there is one to show: it takes a quarter of the start."""
        from rich.console import Console

        return Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)

    def ask(
        self, command: adm.GatedCommand | adm.UngatedCommand, result: type[T], timeout_s: float = ANSWER_S
    ) -> T:
        """The vault's answer. It is waited for longer than the vault lets a command wait at its gate.

        Raises:
            HostdError: the vault's refusal, or no answer.
        """
        link = Link(self.config, timeout_s=max(timeout_s, self.config.gate.deadline_s + SLACK_S))
        try:
            return link.ask(command, result)
        finally:
            link.close()

    def show(self, value: Any, render: Callable[[], None]) -> None:
        """The answer as it came with `--json`, else rendered."""
        if self.as_json:
            click.echo(json.dumps(plain(value), indent=2, default=_jsonable))
        else:
            render()

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(safe(cell)) for cell in row))
        self.out.print(table)


def made(command: type[T], **fields: object) -> T:
    """A command with its limits checked here, so that the mistake is shown where it was made."""
    made = command(**fields)
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=command)
    except msgspec.ValidationError as error:
        raise click.UsageError(str(error)) from None


def _jsonable(value: object) -> object:
    return bytes(value).hex() if isinstance(value, bytes | memoryview) else str(value)
