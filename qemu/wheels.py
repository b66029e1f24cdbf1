"""Builds hostd for L1 on the build machine: pip under emulation would take minutes.

Three steps, the first two cached by ``pyproject.toml``: a wheelhouse with every dependency (two are
compiled, against the build machine's libvirt and libtss2, without its FAPI); ``/opt/hostd`` with the
dependencies, a virtual environment that works at that path in L1; and the project, built on every call.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qemu.cache import build_once, cache_root, key_of
from qemu.errors import MissingToolError
from qemu.process import run_tool, step

PREFIX: Final = "/opt/hostd"  # where the virtual environment lives in L1
PYTHON_OF_L1: Final = (3, 11)
SITE_PACKAGES: Final = "lib/python3.11/site-packages"
PIP_LIMIT: Final = 1800  # seconds
_PIP_ENV: Final = {"PIP_ROOT_USER_ACTION": "ignore"}
VENV_CONFIG: Final = "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n"
GUEST_NEEDS: Final = ("cryptography", "cffi", "pycparser")  # beside guestlib, in a guest's initramfs
LEAN_PYTSS: Final = Path(__file__).with_name("lean_pytss.py")
SOURCES: Final = ("pyproject.toml", "README.md", "LICENSE", "hostd", "guestlib")


def build_trees(repo: Path, work: Path) -> tuple[Path, Path]:
    """Build the project at ``repo``; return its files as two tar archives for L1's root folder.

    The first is cached and holds the dependencies; the second, made in ``work``, the project, its
    console scripts and its ``systemd`` folder (at ``/opt/hostd/systemd``).
    """
    dependencies = ensure_dependencies(repo)
    tree = work / "tree"
    prefix = tree / PREFIX.lstrip("/")
    with step("building hostd"):
        wheel = _project_wheel(repo, work)
        _install(prefix, [str(wheel)], "--no-deps")
    if (repo / "systemd").is_dir():
        shutil.copytree(repo / "systemd", prefix / "systemd")
    return dependencies / "opt.tar", _pack(tree, work / "project.tar")


def guest_packages(repo: Path, work: Path) -> Path:
    """A site-packages folder for a guest's initramfs: guestlib, and what attestation needs."""
    house = _wheelhouse(repo)
    folder = work / "guest-packages"
    with step("building guestlib for guests"):
        options = ("--no-index", f"--find-links={house}", "--no-deps", "--target", folder)
        _pip("install", "--no-compile", *options, *GUEST_NEEDS)
        shutil.copytree(repo / "guestlib", folder / "guestlib", ignore=shutil.ignore_patterns("__pycache__"))
        _compile(folder, "unchecked-hash")  # see guest-base.sh
    return folder


def _wheelhouse(repo: Path) -> Path:
    """A folder of wheels: the ``[host]`` extra's dependencies, direct and indirect."""

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch, step("building the wheels of the dependencies"):
            source = _copy(repo, Path(scratch, "source"))
            run_tool([_python(), "-P", LEAN_PYTSS, Path(scratch, "lean")], timeout=PIP_LIMIT, env=_PIP_ENV)
            (lean,) = Path(scratch, "lean").glob("*.whl")
            # This very wheel, whatever pip finds or built before.
            only = Path(scratch, "constraints.txt")
            only.write_text(f"tpm2-pytss @ {lean.as_uri()}\n")
            _pip("wheel", "--constraint", only, "--wheel-dir", folder, f"{source}[host]")
        for own in folder.glob("hostd-*.whl"):
            own.unlink()

    return build_once("wheels", _key(repo), build)


def ensure_dependencies(repo: Path) -> Path:
    """A folder with ``opt.tar``: the virtual environment with all but the project."""

    def build(folder: Path) -> None:
        tree = folder / "tree"
        prefix = tree / PREFIX.lstrip("/")
        with step("staging the dependencies"):
            _install(prefix, [str(wheel) for wheel in sorted(house.glob("*.whl"))], "--no-deps")
            (prefix / "pyvenv.cfg").write_text(VENV_CONFIG)
            for name in ("python3", "python"):
                (prefix / "bin" / name).symlink_to("/usr/bin/python3")
            _pack(tree, folder / "opt.tar")
            shutil.rmtree(tree)

    house = _wheelhouse(repo)
    return build_once("venv", _key(repo), build)


def _key(repo: Path) -> str:
    return key_of([str(PYTHON_OF_L1)], [repo / "pyproject.toml", Path(__file__), LEAN_PYTSS])


def _project_wheel(repo: Path, work: Path) -> Path:
    source = _copy(repo, work / "source")
    _pip("wheel", "--no-deps", "--wheel-dir", work / "wheel", source)
    (wheel,) = (work / "wheel").glob("hostd-*.whl")
    return wheel


def _copy(repo: Path, to: Path) -> Path:
    """Copy the sources: a build in place would leave its droppings in the checkout."""
    to.mkdir(exist_ok=True)
    for name in SOURCES:
        origin = repo / name
        if origin.is_dir():
            shutil.copytree(origin, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif origin.exists():
            shutil.copyfile(origin, to / name)
    if not (to / "README.md").exists():
        (to / "README.md").write_text("")  # pyproject.toml names it
    return to


def _install(prefix: Path, wheels: Iterable[str], *options: str) -> None:
    """Install wheels below ``prefix``, as they are to be found at ``PREFIX`` in L1."""
    _pip("install", "--no-index", "--no-compile", "--ignore-installed", "--prefix", prefix, *options, *wheels)
    first = f"#!{PREFIX}/bin/python3\n".encode()
    for script in (prefix / "bin").iterdir():
        head, _, rest = script.read_bytes().partition(b"\n")
        if head.startswith(b"#!") and b"python" in head:
            script.write_bytes(first + rest)
    _compile(prefix / SITE_PACKAGES, "timestamp", f"{PREFIX}/{SITE_PACKAGES}")


def _compile(folder: Path, invalidation: str, shown_as: str = "") -> None:
    """Byte-compile: L1 runs the same minor version of Python, and shares its bytecode's number."""
    shown = ("-d", shown_as) if shown_as else ()
    mode = ("-q", "-j", "0", "--invalidation-mode", invalidation)
    run_tool([_python(), "-m", "compileall", *mode, *shown, folder], timeout=300)


def _pip(verb: str, *words: str | Path) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-input")
    env = {**_PIP_ENV, "PIP_CACHE_DIR": str(cache_root() / "pip")}
    run_tool([_python(), "-m", "pip", verb, *options, *words], timeout=PIP_LIMIT, env=env)


def _python() -> Path:
    """An interpreter of L1's minor version, with pip: ours, or one on PATH."""
    if sys.version_info[:2] == PYTHON_OF_L1:
        return Path(sys.executable)
    found = shutil.which("python3.11")
    if found is None:
        raise MissingToolError("building for the lab needs Python 3.11, as its Debian 12 has")
    return Path(found)


def _pack(tree: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w") as packed:
        packed.add(tree, arcname=".")
    return archive
