"""What the process of each role has really loaded, through whatever others import.

Each role's entry is imported in an interpreter of its own, isolated as the role is; `sys.modules`
then says which libraries and which other roles' code are in reach of whoever takes it over.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROLES = {"hostd.admin", "hostd.gateway", "hostd.measurer", "hostd.metrics", "hostd.vault"}
COMPANIONS = {
    "click": {"click"},
    "cryptography": {"cryptography", "_cffi_backend", "_openssl", "typing_extensions"},
    "libvirt": {"libvirt", "libvirtmod", "libvirtaio"},
    "msgspec": {"msgspec", "typing_extensions"},
    "rich": {"rich", "pygments", "markdown_it", "mdurl"},
    "tpm2_pytss": {"tpm2_pytss", "cffi", "pycparser"},
}
"""What a library brings along."""


@dataclass(frozen=True)
class Entry:
    """An entry point, the third-party libraries it may load, and modules it must not."""

    modules: tuple[str, ...]
    role: str
    libraries: frozenset[str] = frozenset()
    never: frozenset[str] = field(default_factory=frozenset)


def libraries(*names: str) -> frozenset[str]:
    """`msgspec` is what every role speaks; the rest is named."""
    return frozenset().union(*(COMPANIONS.get(name, {name}) for name in ("msgspec", *names)))


ENTRIES = {
    "vault": Entry(
        ("hostd.vault.main",),
        "hostd.vault",
        libraries("cryptography", "tpm2_pytss"),
        frozenset({"guestlib.client", "guestlib.link"}),
    ),
    "mint": Entry(
        ("hostd.vault.mint",),
        "hostd.vault",
        libraries("cryptography"),
        frozenset({"sqlite3", "hostd.vault.store", "hostd.vault.keyring"}),
    ),
    "measurer": Entry(
        ("hostd.measurer.main",),
        "hostd.measurer",
        libraries("cryptography", "libvirt", "psutil", "pyroute2"),
        frozenset({"sqlite3", "guestlib.client"}),
    ),
    "gateway": Entry(
        ("hostd.gateway.main",),
        "hostd.gateway",
        libraries("pyseccomp"),
        frozenset({"sqlite3", "guestlib.client", "guestlib.attest"}),
    ),
    "worker": Entry(
        ("hostd.gateway.worker",),
        "hostd.gateway",
        libraries("pyseccomp"),
        frozenset({"sqlite3", "guestlib.client", "guestlib.attest", "multiprocessing", "urllib.request"}),
    ),
    "metrics": Entry(
        ("hostd.metrics",),
        "hostd.metrics",
        libraries("prometheus_client"),
        frozenset({"sqlite3", "guestlib.attest", "guestlib.client"}),
    ),
    "supervisor": Entry(
        ("hostd.supervisor",),
        "",
        libraries(),
        frozenset({"sqlite3"}),
    ),
    "program": Entry(("hostd.__main__",), "", libraries(), frozenset({"sqlite3", "subprocess", "ssl"})),
    "hostctl": Entry(
        ("hostd.admin.hostctl",),
        "hostd.admin",
        libraries("click", "rich"),
        frozenset({"sqlite3", "ssl"}),
    ),
    "guest": Entry(
        ("guestlib.client", "guestlib.errors", "guestlib.wire.messages", "guestlib.wire.session"),
        "",
        frozenset(),
        frozenset({"hostd", "guestlib.attest.verifier", "sqlite3"}),
    ),
    "guest command": Entry(("guestlib.cli",), "", frozenset(), frozenset({"hostd", "sqlite3"})),
    "auditor": Entry(
        ("guestlib.attest.verifier", "guestlib.attest.evidence", "guestlib.attest.bundle"),
        "",
        frozenset(COMPANIONS["cryptography"]),
        frozenset({"hostd", "guestlib.client", "guestlib.link", "sqlite3"}),
    ),
}


@cache
def loaded(*modules: str) -> frozenset[str]:
    """Full names in sys.modules after importing these, and nothing before."""
    program = (
        "import sys; before = set(sys.modules); sys.path.append(sys.argv[1])\n"
        "for name in sys.argv[2:]: __import__(name)\n"
        "print('\\n'.join(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(ROOT), *modules],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return frozenset(done.stdout.split())


def third_party(modules: frozenset[str]) -> set[str]:
    tops = {name.partition(".")[0].partition("-")[0] for name in modules}
    own = {"guestlib", "hostd", "__editable___hostd_0_1_0_finder", "__mp_main__"}
    return {
        top
        for top in tops - own - set(sys.stdlib_module_names)
        if not top.startswith(("_sysconfigdata", "_distutils_hack"))
    }


@pytest.mark.parametrize("name", ENTRIES)
def test_a_role_loads_its_own_libraries_only(name: str) -> None:
    entry = ENTRIES[name]
    assert third_party(loaded(*entry.modules)) <= entry.libraries


@pytest.mark.parametrize("name", ENTRIES)
def test_no_role_loads_another(name: str) -> None:
    entry = ENTRIES[name]
    found = loaded(*entry.modules)
    assert {r for r in ROLES if r in found} <= ({entry.role} if entry.role else set())
    assert not {m for m in found if any(m == n or m.startswith(n + ".") for n in entry.never)}


def test_the_check_sees_what_is_loaded() -> None:
    """The lists above would be worth nothing if nothing was ever seen."""
    vault = loaded(*ENTRIES["vault"].modules)
    assert {"cryptography", "tpm2_pytss", "msgspec"} <= third_party(vault)
    assert {"sqlite3", "hostd.vault.gate", "hostd.core.keys"} <= vault
    assert "libvirt" not in third_party(vault)
    assert "prometheus_client" in third_party(loaded(*ENTRIES["metrics"].modules))
    assert "click" in third_party(loaded(*ENTRIES["hostctl"].modules))


def test_the_entries_are_those_of_the_program() -> None:
    """A role that is new in the program is not forgotten here."""
    source = (ROOT / "hostd/__main__.py").read_text()
    for role in ("vault", "measurer", "gateway"):
        assert f"from hostd.{role}.main import run" in source
        assert ENTRIES[role].modules == (f"hostd.{role}.main",)
    assert "from hostd.metrics import run" in source
