"""`hostd-guest file encrypt | decrypt`: files of any size, and pipes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO, Final

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from guestlib.client import Client
    from guestlib.files import Transferred

PAUSE_S: Final = 0.2
"""Between two lines of progress."""


def add(commands: Any, run: Callable[..., None]) -> None:
    """`encrypt` and `decrypt` among the sub-commands; `run` is called with client and options."""
    for name in ("encrypt", "decrypt"):
        text = f"{name} a file segment by segment, in constant memory"
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, offline=False, encrypting=name == "encrypt")
        if name == "encrypt":
            sub.add_argument("key", metavar="KEY", help="key id or alias/NAME")
            sub.add_argument(
                "--segment-bits", type=int, default=18, metavar="N", help="segments of 2^N bytes, 12 to 20"
            )
        else:
            sub.add_argument("--key", help="accept only what this key encrypted")
        sub.add_argument("file", nargs="?", default="-", metavar="FILE", help="default: standard input")
        sub.add_argument("--aad", action="append", default=[], metavar="NAME=VALUE")
        sub.add_argument("--quiet", action="store_true", help="no progress on the terminal")
        sub.add_argument(
            "-o", "--out", default="-", metavar="FILE",
            help="written whole or not at all, mode 0600 (default: standard output, segment by segment)",
        )  # fmt: skip


def run(client: Client, o: argparse.Namespace, aad: Mapping[str, str]) -> Transferred:
    """One of the two commands.

    Raises:
        ValueError: a file cannot be used.
        HostdError: as `guestlib.files`.
    """
    # Only here: it needs `cryptography`, the other commands do not.
    from guestlib import files

    with _ends(o, files.replacing) as (source, target, progress):
        if o.encrypting:
            bits = o.segment_bits
            return files.encrypt_stream(
                client, o.key, source, target, aad, segment_bits=bits, progress=progress
            )
        return files.decrypt_stream(client, source, target, aad, key=o.key, progress=progress)


@contextlib.contextmanager
def _ends(
    o: argparse.Namespace, replacing: Callable[[str], contextlib.AbstractContextManager[BinaryIO]]
) -> Iterator[tuple[BinaryIO, BinaryIO, Callable[[int], None] | None]]:
    """Source, target and progress of a command."""
    try:
        with contextlib.ExitStack() as stack:
            source = sys.stdin.buffer if o.file == "-" else stack.enter_context(open(o.file, "rb"))
            if o.out != "-":
                target = stack.enter_context(replacing(o.out))
            elif o.encrypting and sys.stdout.isatty():
                raise ValueError("an encrypted file is nothing for a terminal: give --out FILE, or a pipe")
            else:
                target = sys.stdout.buffer
            shown = not o.quiet and sys.stderr.isatty()
            progress = stack.enter_context(_shown(o.file)) if shown else None
            yield source, target, progress
            if o.out == "-":
                target.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ValueError(f"{error.filename or 'file'}: {error.strerror or error}") from error


@contextlib.contextmanager
def _shown(name: str) -> Iterator[Callable[[int], None]]:
    """Progress as one line of the terminal, taken away at the end."""
    total = os.stat(name).st_size if name != "-" else 0
    last = 0.0

    def progress(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PAUSE_S:
            last = now
            of = f" of {total / 2**20:.0f}" if total else ""
            sys.stderr.write(f"\r{done / 2**20:.0f}{of} MiB\x1b[K")
            sys.stderr.flush()

    try:
        yield progress
    finally:
        sys.stderr.write("\r\x1b[K")
