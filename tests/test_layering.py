"""The import graph is the privilege graph: read from the source, statement by statement.

What a role really has loaded, through others too, is `test_imports.py`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("guestlib/**/*.py"), *ROOT.glob("hostd/**/*.py")])

ROLES = ("measurer", "vault", "gateway", "admin", "metrics")
DISPATCHERS = {"hostd/__main__.py", "hostd/supervisor.py"}
BETWEEN_ROLES = {("hostd/admin/setup.py", "hostd.vault.store"), ("hostd/admin/setup.py", "hostd.vault.heads")}
"""Setup makes the vault's empty store, before there is a vault."""

PURE = ("hostd/core/*", "guestlib/wire/*")
IO_MODULES = {
    *("asyncio", "ctypes", "fcntl", "glob", "http", "io", "logging", "mmap", "multiprocessing", "os"),
    *("pathlib", "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3"),
    *("ssl", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid"),
}
"""Also what gives time or randomness: both are arguments in pure code."""

OWNERS = {
    "click": ("hostd/admin/*",),
    "cryptography": (
        *("guestlib/attest/*", "guestlib/filestream.py", "hostd/admin/hostca.py"),
        *("hostd/vault/primitives.py", "hostd/vault/channelca.py"),
        *("hostd/vault/evidence.py", "hostd/measurer/tags.py"),
        *("hostd/platform/tpm*.py", "hostd/platform/swtpm.py"),
    ),
    "libvirt": ("hostd/measurer/*",),
    "lz4": ("hostd/platform/bzimage.py",),
    "msgspec": ("hostd/*",),
    "prometheus_client": ("hostd/metrics.py",),
    "psutil": ("hostd/measurer/*",),
    "pyroute2": ("hostd/measurer/*",),
    "pyseccomp": ("hostd/platform/confine.py",),
    "rich": ("hostd/admin/*",),
    "sqlite3": ("hostd/vault/store.py",),
    "tpm2_pytss": ("hostd/platform/tpm*.py",),
    "zstandard": ("hostd/platform/bzimage.py",),
}
"""Library → the only files that may name it. A third-party library that is not here is not used."""

FORBIDDEN_MODULES = {"cPickle", "dill", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@dataclass(frozen=True)
class Import:
    """One imported module, full name. `runtime` is false under `if TYPE_CHECKING:`."""

    file: str
    module: str
    runtime: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def statements(node: ast.AST, runtime: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, runtime
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for part in child.body:
                yield part, False
            for part in child.orelse:
                yield part, runtime
        else:
            yield from statements(child, runtime)


def imports_of(path: str, source: str) -> Iterator[Import]:
    for node, runtime in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, alias.name, runtime)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            # `from hostd import vault` names a module; where it is a class the extra name is harmless.
            yield Import(path, node.module, runtime)
            for alias in node.names:
                yield Import(path, f"{node.module}.{alias.name}", runtime)


ALL = [i for path in SOURCES for i in imports_of(path.relative_to(ROOT).as_posix(), path.read_text())]


def role_of(name: str) -> str | None:
    """The role of a file (`hostd/vault/gate.py`) or module (`hostd.vault.gate`)."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == "hostd" and len(parts) > 1 and parts[1] in ROLES else None


# ── The rules; each returns what breaks it ────────────────────────────────────────────────────────


def guestlib_imports_hostd(found: list[Import]) -> list[Import]:
    """Types included: the guest's package must make sense alone."""
    return [i for i in found if i.file.startswith("guestlib/") and i.top == "hostd"]


def roles_import_each_other(found: list[Import]) -> list[Import]:
    return [
        i
        for i in found
        if (there := role_of(i.module)) is not None
        and (here := role_of(i.file)) != there
        and not (here is None and i.file in DISPATCHERS)
        and not any(i.file == f and (i.module + ".").startswith(m + ".") for f, m in BETWEEN_ROLES)
    ]


def pure_code_does_io(found: list[Import]) -> list[Import]:
    return [
        i
        for i in found
        if i.runtime
        and any(fnmatch(i.file, p) for p in PURE)
        and (
            i.top in IO_MODULES or (i.top == "hostd" and i.module.split(".")[1:2] not in (["core"], ["ipc"]))
        )
    ]


def library_without_its_owner(found: list[Import]) -> list[Import]:
    def wrong(i: Import) -> bool:
        if i.top in OWNERS:
            return not any(fnmatch(i.file, pattern) for pattern in OWNERS[i.top])
        return i.top not in {*sys.stdlib_module_names, "guestlib", "hostd"}

    return [i for i in found if wrong(i)]


def forbidden_modules(found: list[Import]) -> list[Import]:
    return [i for i in found if i.top in FORBIDDEN_MODULES]


def platform_knows_roles(found: list[Import]) -> list[Import]:
    """core, ipc and platform are below the roles: they import none, and core nothing above it."""
    below = ("hostd/core/*", "hostd/ipc/*", "hostd/platform/*")
    return [
        i
        for i in found
        if any(fnmatch(i.file, p) for p in below)
        and (
            role_of(i.module) or (i.file.startswith("hostd/core/") and i.module.startswith("hostd.platform"))
        )
    ]


RULES = (
    guestlib_imports_hostd,
    roles_import_each_other,
    pure_code_does_io,
    library_without_its_owner,
    forbidden_modules,
    platform_knows_roles,
)


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: object) -> None:
    assert callable(rule)
    assert rule(ALL) == []


BREACHES = [
    (guestlib_imports_hostd, "guestlib/client.py", "from hostd import config"),
    (guestlib_imports_hostd, "guestlib/client.py", "if TYPE_CHECKING:\n    import hostd.config"),
    (
        roles_import_each_other,
        "hostd/gateway/worker.py",
        "def f():\n    from hostd.vault.keyring import Keyring",
    ),
    (roles_import_each_other, "hostd/gateway/worker.py", "from hostd import vault"),
    (roles_import_each_other, "hostd/vault/gate.py", "import hostd.measurer.scan"),
    (roles_import_each_other, "hostd/metrics.py", "from hostd.vault import counters"),
    (roles_import_each_other, "hostd/vault/gate.py", "from hostd.metrics import run"),
    (roles_import_each_other, "hostd/config.py", "from hostd.vault import store"),
    (roles_import_each_other, "hostd/admin/setup.py", "from hostd.vault.keyring import Keyring"),
    (roles_import_each_other, "hostd/admin/hostctl.py", "from hostd.vault.store import Store"),
    (pure_code_does_io, "hostd/core/keys.py", "import time"),
    (pure_code_does_io, "hostd/core/keys.py", "from os import urandom"),
    (pure_code_does_io, "guestlib/wire/codec.py", "import socket as s"),
    (pure_code_does_io, "hostd/core/keys.py", "from hostd.platform import procfs"),
    (library_without_its_owner, "hostd/vault/keyring.py", "from cryptography.fernet import Fernet"),
    (library_without_its_owner, "hostd/vault/vault.py", "import tpm2_pytss"),
    (library_without_its_owner, "hostd/ipc/loop.py", "import requests"),
    (library_without_its_owner, "guestlib/client.py", "import msgspec"),
    (library_without_its_owner, "guestlib/link.py", "import cryptography"),
    (forbidden_modules, "hostd/vault/store.py", "import pickle"),
    (platform_knows_roles, "hostd/platform/confine.py", "from hostd.vault import store"),
    (platform_knows_roles, "hostd/core/keys.py", "from hostd.platform import procfs"),
]


@pytest.mark.parametrize(("rule", "file", "source"), BREACHES)
def test_each_rule_sees_a_breach(rule: object, file: str, source: str) -> None:
    assert callable(rule)
    assert rule(list(imports_of(file, source)))


def calls_of(source: str) -> set[str]:
    return {
        node.func.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    } | {
        f"{node.func.value.id}.{node.func.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_evaluated(path: Path) -> None:
    calls = calls_of(path.read_text())
    assert not calls & FORBIDDEN_CALLS
    assert not calls & {"os.system", "os.popen", "importlib.import_module", "builtins.eval", "builtins.exec"}


def test_calls_are_found() -> None:
    assert calls_of("def f():\n    return eval('1') + os.system('x')") == {"eval", "os.system"}


def test_no_command_goes_through_a_shell() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.keyword) and node.arg == "shell"), path


def test_the_sources_were_found() -> None:
    files = {i.file for i in ALL}
    assert {"guestlib/client.py", "hostd/vault/gate.py", "hostd/core/merkle.py"} <= files
    # Every role is there, and every owner pattern still names a file.
    for role in ROLES:
        assert any(role_of(f) == role for f in files), role
    for patterns in OWNERS.values():
        for pattern in patterns:
            assert any(fnmatch(path.relative_to(ROOT).as_posix(), pattern) for path in SOURCES), pattern
