"""Reading of component `self`: hostd's own processes and files.

The files are read in rounds: each reading has the next few, in an order that the measurer chooses, until
all have been read; then the next round begins. Each reading has one of the processes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_process import ProcessReading
from hostd.core.reading_types import Count, Label, Name, Struct

MAX_FILES = 2048
"""In one reading."""
MAX_OWN_FILES = 65536
"""In one round; an installation has some 2,500."""


class OwnFile(Struct, frozen=True):
    """A file of hostd's own, as it is on disk."""

    path: Name
    sha256: Annotated[bytes, msgspec.Meta(max_length=32)]
    """Of its content, 32 bytes; empty: it cannot be read, or is no regular file."""
    guarded: bool
    """Whether only root may write it, and its folder."""


class SelfReading(Struct, frozen=True, tag="self"):
    """hostd's own processes and files."""

    manager: Label
    """Who says which processes are hostd's: `systemd` (control groups of its units), or `supervisor`
    (`hostd run`: its descendants that run the same interpreter)."""
    roots: Annotated[tuple[Name, ...], msgspec.Meta(max_length=8)]
    """Installation folders, each ends in `/`."""
    roles: Annotated[tuple[tuple[Label, Count], ...], msgspec.Meta(max_length=16)]
    """Role → how many processes it has, in this order: measurer, vault, gateway, metrics."""
    strangers: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]
    """Processes among them that run another program than hostd's interpreter, for over three seconds."""
    process: ProcessReading | None
    """One of them, in turn. None: those that were to be read had just ended."""
    number: Count
    """Of the round, from 1."""
    position: Count
    """How many files of this round came in readings before this one."""
    files: Annotated[tuple[OwnFile, ...], msgspec.Meta(max_length=MAX_FILES)]
    complete: bool
    """Whether these are the last files of the round."""
