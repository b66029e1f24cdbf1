"""Programs of the build machine: tools run to their end, and children that must not outlive us."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qemu.errors import BuildError, MissingToolError

PACKAGE_OF: Final = {
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "swtpm": "swtpm",
}
TAIL: Final = 3000  # characters of a failed tool's output to show


_quiet = False


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, ``step`` says nothing: someone else tells what is going on."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say on standard error what is being done, and afterwards how long it took."""
    start = time.monotonic()
    said = not _quiet
    if said:
        print(f"lab: {what} ...", file=sys.stderr, flush=True)
    yield
    if said:
        print(f"lab: {what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def require_tools(*names: str) -> None:
    """Raise ``MissingToolError``, naming the Debian packages to install, if any of them is missing."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        packages = sorted({PACKAGE_OF.get(name, name) for name in missing})
        raise MissingToolError(
            f"not installed: {', '.join(missing)}", hint=f"apt-get install {' '.join(packages)}"
        )


def run_tool(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    stdin: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a tool and return its standard output; ``BuildError`` shows what it said."""
    name = Path(argv[0]).name
    if not isinstance(argv[0], Path):
        require_tools(argv[0])
    try:
        ended = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{name} took over {timeout:g} s") from error
    if ended.returncode != 0:
        said = (ended.stdout + ended.stderr).strip()[-TAIL:]
        raise BuildError(f"{name} ended with {ended.returncode}:\n{said}")
    return ended.stdout


def spawn(argv: Sequence[str | Path], log: Path, keep_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a child that dies with us, however we die, and that a Ctrl-C at the terminal spares.

    The kernel ties the child to the *thread* that starts it (prctl(2), PR_SET_PDEATHSIG): start
    machines from a thread that lives as long as they do.
    """
    require_tools("setpriv", str(argv[0]))
    with log.open("ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=keep_fds,
        )


def tail(path: Path, length: int = TAIL) -> str:
    """The end of a text file, for an error message; control characters made harmless."""
    try:
        data = path.read_bytes()[-length:]
    except FileNotFoundError:
        return "(nothing)"
    text = data.decode(errors="replace")
    return "".join(c for c in text if c == "\n" or c.isprintable()).strip() or "(nothing)"
