"""Digests of the code in Debian packages: from .deb files, and of installed packages.

A .deb is opened by dpkg-deb, so that every compression it knows is read. Its SHA-256 is compared with that of
apt's package lists, which apt verified when it fetched them: equal, the digests are what the archive
shipped. A package that is installed and of which no .deb is there is read from the disk, and every file
must have the MD5 sum that dpkg recorded; that proves consistency, not origin, and the manifest says so.

Symbolic links hold no code. A diverted file is where dpkg-divert puts it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from guestlib.errors import ConflictError, MalformedError, NotFoundError
from hostd.admin.manifest_files import CHUNK_BYTES, digest_of, kernel_path
from hostd.core.codefile import holds_code
from hostd.core.reference import Source

if TYPE_CHECKING:
    from collections.abc import Iterable

CACHE: Final = Path("/var/cache/apt/archives")
INFO: Final = Path("/var/lib/dpkg/info")
"""Where dpkg keeps the sums of what it installed (dpkg-query(1), --control-path)."""
TOOL_S: Final = 300.0
"""For one call of dpkg or apt."""
MAX_FILE_BYTES: Final = 4 << 30
"""One file in a package."""


@dataclass(slots=True)
class Contents:
    """What one package brings: path → SHA-256 in hex."""

    source: Source
    digests: dict[str, str] = field(default_factory=dict)
    altered: list[str] = field(default_factory=list)
    """Installed files that are not what the package installed, each with what it has; not in `digests`."""


def read_deb(path: Path, *, archive: bool = True) -> Contents:
    """Code in a .deb file. `archive` false: apt's lists are not asked.

    Raises:
        ConflictError: apt's lists name the same package and version with another SHA-256.
        MalformedError: not a .deb.
        NotFoundError: dpkg-deb is not installed.
    """
    fields = dict(
        line.split(": ", 1)
        for line in _run("dpkg-deb", "-f", str(path), "Package", "Version", "Architecture").splitlines()
        if ": " in line
    )
    try:
        name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
    except KeyError as error:
        raise MalformedError(f"{path}: a package without {error}") from None
    digest = digest_of(str(path))
    listed = _listed(name, version, architecture) if archive else set()
    if listed and digest not in listed:
        raise ConflictError(
            f"{path}: apt's lists have {name} {version} with SHA-256 {' or '.join(sorted(listed))}, "
            f"this file has {digest}; `--no-archive` takes it all the same"
        )
    how = "deb-archive" if listed else "deb"
    contents = Contents(Source(name, how, version, architecture, digest))  # type: ignore[arg-type]
    diverted = _diversions(name)
    argv = [_tool("dpkg-deb"), "--fsys-tarfile", str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            _read_tar(process.stdout, contents, diverted)
        except (tarfile.TarError, EOFError) as error:
            raise MalformedError(f"{path}: {error}") from error
        finally:
            process.stdout.close()
            code = process.wait()
    if code:
        raise MalformedError(f"{path}: dpkg-deb cannot read it")
    return contents


def _read_tar(stream: IO[bytes], contents: Contents, diverted: dict[str, str]) -> None:
    hashed: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = "/" + member.name.removeprefix(".").lstrip("/")
            if member.islnk():
                digest = hashed.get("/" + member.linkname.removeprefix(".").lstrip("/"))
            elif member.isreg() and member.size <= MAX_FILE_BYTES:
                file = archive.extractfile(member)
                assert file is not None
                digest = hashed[name] = _sha256(file)
            else:
                continue
            if digest is not None and holds_code(os.path.basename(name).encode(), member.mode):
                contents.digests[kernel_path(diverted.get(name, name))] = digest
        while stream.read(CHUNK_BYTES):  # the archive's padding: dpkg-deb must not die of a closed pipe
            pass


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def read_installed(*packages: str, archive: bool = True) -> list[Contents]:
    """Code of installed packages (none named: of all), in each architecture that is installed: from apt's
    cache of .deb files if the very version is there, else from the disk.

    Raises:
        NotFoundError: not installed.
    """
    form = "${Package}\t${Version}\t${Architecture}\t${db:Status-Abbrev}\n"
    found = []
    for line in _run("dpkg-query", "-W", "-f", form, *packages).splitlines():
        name, version, architecture, status = line.split("\t")
        if status[1:2] == "i":
            cached = CACHE / f"{name}_{version.replace(':', '%3a')}_{architecture}.deb"
            if cached.is_file():
                found.append(read_deb(cached, archive=archive))
            else:
                found.append(_read_disk(name, version, architecture))
    if not found:
        raise NotFoundError(f"not installed: {' '.join(packages)}")
    return found


def _read_disk(name: str, version: str, architecture: str) -> Contents:
    contents = Contents(Source(name, "installed", version, architecture))
    diverted = _diversions(name)
    for path, expected in _sums(name, architecture):
        where = kernel_path(diverted.get(path, path))
        try:
            info = os.lstat(where)
        except FileNotFoundError:
            continue  # left out on purpose (dpkg's path-exclude), or removed: it cannot run
        if not stat.S_ISREG(info.st_mode) or not holds_code(
            os.fsencode(os.path.basename(where)), info.st_mode
        ):
            continue
        data = Path(where).read_bytes()
        seen = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if seen != expected:
            contents.altered.append(f"{where}: {name} {version} has MD5 {expected}, the disk {seen}")
            continue
        contents.digests[where] = hashlib.sha256(data).hexdigest()
    return contents


def _sums(name: str, architecture: str) -> list[tuple[str, str]]:
    for stem in (name, f"{name}:{architecture}"):
        sums = INFO / f"{stem}.md5sums"
        if sums.exists():
            lines = sums.read_text("utf-8").splitlines()
            return [("/" + line[34:].lstrip("/"), line[:32]) for line in lines if len(line) > 34]
    return []  # a package without files has no sums


def _diversions(package: str) -> dict[str, str]:
    """Where dpkg puts files of this package that somebody diverted."""
    found = {}
    for line in _diverted().splitlines():
        words = line.removeprefix("local ").split(" ")
        if words[:2] == ["diversion", "of"] and len(words) >= 5 and words[-2:] != ["by", package]:
            found[words[2]] = words[4]
    return found


@functools.cache
def _diverted() -> str:
    return _run("dpkg-divert", "--list", check=False)


def _listed(name: str, version: str, architecture: str) -> set[str]:
    if shutil.which("apt-cache") is None:
        return set()
    text = _run("apt-cache", "show", f"{name}:{architecture}={version}", check=False)
    if not text and architecture == "all":
        text = _run("apt-cache", "show", f"{name}={version}", check=False)
    return {line.split()[1] for line in text.splitlines() if line.startswith("SHA256: ")}


def of_apt(lines: Iterable[str]) -> list[Path]:
    """The .deb files that apt is about to install, as it tells its `DPkg::Pre-Install-Pkgs` hooks: paths
    alone (version 1), or (2 and 3) `VERSION n`, the configuration, an empty line, and a line for each
    package, the file last, `**CONFIGURE**` or `**REMOVE**` where there is none."""
    rows = [line.rstrip("\n") for line in lines]
    if rows and rows[0].startswith("VERSION "):
        rows = rows[rows.index("") + 1 :] if "" in rows else []
        rows = [row.rsplit(" ", 1)[-1] for row in rows]
    return [Path(row) for row in rows if row.startswith("/") and row.endswith(".deb")]


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise NotFoundError(f"{name} is not installed: packages of this machine cannot be read")
    return found


def _run(*argv: str, check: bool = True) -> str:
    """Standard output of a tool; empty if it failed and `check` is false."""
    done = subprocess.run(
        [_tool(argv[0]), *argv[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=TOOL_S,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    if done.returncode != 0 and check:
        reason = done.stderr.strip().splitlines()
        raise MalformedError(f"{argv[0]}: {reason[-1] if reason else f'exit code {done.returncode}'}")
    return done.stdout if done.returncode == 0 else ""
