"""Builds tpm2-pytss without FAPI: `lean_pytss.py DIR` puts the wheel into DIR, `lean_pytss.py --install`
installs it for this interpreter, if no such build is there.

tpm2-pytss is compiled against whatever of tpm2-tss the machine has headers of. With FAPI, which hostd does
not use, come curl, LDAP, Kerberos and more, as libraries in the vault's process. Whether FAPI is there is
asked of pkg-config, so the build gets a folder of its files without FAPI's. A wheel that pip built before, or
finds elsewhere, is not taken, and what was built is looked at.

Needs a C compiler, pkg-config, the headers of tpm2-tss, and a package index for the source.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Final

NAME: Final = "tpm2-pytss"
LEFT_OUT: Final = ("tss2-fapi", "tss2-policy", "tss2-tcti-spi-helper")
"""Parts of tpm2-tss that tpm2-pytss can do without, as pkg-config names them."""
UNWANTED: Final = tuple(f"lib{part}".encode() for part in LEFT_OUT)
"""What a build that has them names in its list of needed libraries."""
PROJECT: Final = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirement() -> str:
    """The version that the project asks for, as pip takes it."""
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["host"]
    (found,) = (line for line in extras if line.startswith(NAME))
    return str(found)


def is_lean(extension: bytes) -> bool:
    """Whether a compiled module needs none of what was to be left out."""
    return not any(name in extension for name in UNWANTED)


def installed() -> bool:
    """Whether a lean build, of a version that will do, is in this environment."""
    try:
        # A dependency of tpm2-pytss' own: without it there is nothing to keep.
        from packaging.requirements import Requirement

        if not Requirement(requirement()).specifier.contains(importlib.metadata.version(NAME)):
            return False
    except ImportError:
        return False
    spec = importlib.util.find_spec("tpm2_pytss")
    if spec is None or spec.origin is None:
        return False
    extensions = list(Path(spec.origin).parent.glob("_libtpm2_pytss*.so"))
    return bool(extensions) and all(is_lean(path.read_bytes()) for path in extensions)


def without_fapi(folder: Path) -> dict[str, str]:
    """An environment in which pkg-config finds everything but `LEFT_OUT`, by links in `folder`."""
    asked = ["pkg-config", "--variable", "pc_path", "pkg-config"]
    own = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    searched = (os.environ.get("PKG_CONFIG_PATH", ""), os.environ.get("PKG_CONFIG_LIBDIR", own))
    for place in filter(None, ":".join(searched).split(":")):
        for file in Path(place).glob("*.pc"):
            link = folder / file.name
            if file.stem not in LEFT_OUT and not link.is_symlink():
                link.symlink_to(file.resolve())
    return {**os.environ, "PKG_CONFIG_PATH": "", "PKG_CONFIG_LIBDIR": str(folder)}


def pip(*words: str, env: dict[str, str] | None = None) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-input")
    subprocess.run([sys.executable, "-m", "pip", *words, *options], check=True, env=env)


def build(folder: Path) -> Path:
    """The wheel, made in `folder`.

    Raises:
        SystemExit: what was built is not lean.
    """
    with tempfile.TemporaryDirectory(prefix="lean-pytss-") as scratch:
        # Without a cache: pip takes a wheel that it once built from the same source, however it was built.
        source = ("--no-deps", "--no-binary", NAME, "--no-cache-dir", "--wheel-dir", scratch)
        links = Path(scratch, "pkg-config")
        links.mkdir()
        pip("wheel", *source, requirement(), env=without_fapi(links))
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            extensions = [packed.read(name) for name in packed.namelist() if name.endswith(".so")]
        if not extensions or not all(map(is_lean, extensions)):
            raise SystemExit(f"error: {wheel.name} was built with FAPI all the same")
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / wheel.name
        target.write_bytes(wheel.read_bytes())
        return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds tpm2-pytss without FAPI.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="where the wheel is put")
    where.add_argument("--install", action="store_true", help="install it for this interpreter")
    arguments = parser.parse_args()
    if not arguments.install:
        print(build(arguments.folder))
    elif not installed():
        with tempfile.TemporaryDirectory(prefix="lean-pytss-") as scratch:
            # Its dependencies are the project's to install.
            pip("install", "--no-deps", "--force-reinstall", "--no-index", str(build(Path(scratch))))


if __name__ == "__main__":
    main()
