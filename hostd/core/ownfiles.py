"""Which files are hostd's own (pure): a survey names them, and component `self` holds the host to them.

The installation folder counts whole, as far as a file there holds code (`hostd.core.codefile`); of the
system's folders these few files, and whatever stands in a drop-in folder of a unit. A file that is missing
because it was never there is no matter: the reference values have none.
"""

from __future__ import annotations

from typing import Final

UNITS: Final = (
    "hostd.target",
    *(f"hostd-{role}.service" for role in ("measurer", "vault", "gateway", "metrics")),
)
_UNIT_FOLDERS: Final = ("/etc/systemd/system", "/usr/lib/systemd/system")
_CONTROL_FOLDERS: Final = (
    *("/run/systemd/system", "/etc/systemd/system.control", "/run/systemd/system.control"),
    "/run/systemd/transient",
)
OWN_PATHS: Final = (
    "/etc/hostd/hostd.toml",
    "/etc/ima/ima-policy",
    "/usr/lib/sysusers.d/hostd.conf",
    "/usr/lib/tmpfiles.d/hostd.conf",
    *(f"{folder}/{unit}" for folder in (*_UNIT_FOLDERS, *_CONTROL_FOLDERS) for unit in UNITS),
)
"""Files outside the installation folder: configuration, IMA policy, units, users."""
DROP_INS: Final = tuple(
    f"{folder}/{unit}.d/"
    for folder in (*_UNIT_FOLDERS, *_CONTROL_FOLDERS)
    for unit in (*UNITS, "hostd-.service")
)
"""Folders whose every file changes a unit of hostd's (systemd.unit(5))."""


def is_own(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a path of the reference values is hostd's own, installed under `roots` (each ends in `/`)."""
    return path in _OWN or path.startswith((*roots, *DROP_INS))


_OWN: Final = frozenset(OWN_PATHS)
