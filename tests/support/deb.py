"""A small Debian package, made by the real dpkg-deb."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = b"#!/bin/sh\necho one\n"


def deb(directory: Path, *, program: bytes = PROGRAM, name: str = "hostd-test-package") -> Path:
    """A package with a program under two names, a library, a module, a link and a text."""
    tree = directory / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for folder in ("DEBIAN", "usr/bin", "lib/modules/6.1", "usr/share/doc"):
        (tree / folder).mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1:2.0-1\nArchitecture: amd64\nMaintainer: a <a@example.org>\n"
    (tree / "DEBIAN/control").write_text(control + "Description: for a test\n")
    (tree / "usr/bin/tool").write_bytes(program)
    (tree / "usr/bin/tool").chmod(0o755)
    os.link(tree / "usr/bin/tool", tree / "usr/bin/tool-again")
    (tree / "usr/bin/link").symlink_to("tool")
    (tree / "usr/bin/lib.so.1").write_bytes(b"library")
    (tree / "lib/modules/6.1/m.ko.xz").write_bytes(b"module")
    (tree / "usr/share/doc/text").write_bytes(b"no code")
    made = directory / "made.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(made)], check=True, capture_output=True
    )
    return made
