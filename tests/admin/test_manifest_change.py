"""`hostctl manifest`: an update is made into a document, on files of this machine and without a vault."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from hostd.admin.hostctl import cli
from hostd.core.manifest import new_document
from hostd.core.reference import ANY_HOST, Reference, encode_reference, parse_reference
from hostd.platform.hostname import this_host


def hostctl(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["--json", "manifest", *map(str, arguments)])


def made(path: Path, *arguments: object) -> Reference:
    done = hostctl(*arguments, "-o", path)
    assert done.exit_code == 0, done.output
    return parse_reference(path.read_bytes())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder as it is installed, with its manifest beside it."""
    folder = tmp_path / "opt"
    for name in ("a.py", "b.py", "sub/c.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (tmp_path / "other.py").write_bytes(b"other")
    made(tmp_path / "base.json", "create", "--folder", folder, "--file", tmp_path / "other.py")
    return folder


def test_a_folder_is_approved_with_what_it_lacks(installed: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "a.py").write_bytes(b"a.py")
    (new / "b.py").write_bytes(b"changed")
    (new / "d.py").write_bytes(b"d")
    base = ("approve-next", tmp_path / "base.json")
    found = made(tmp_path / "next.json", *base, "--folder", new, "--as", f"{installed}/")
    assert found.next == {
        f"{installed}/b.py": (digest(b"changed"),),
        f"{installed}/d.py": (digest(b"d"),),
    }
    assert found.leaving == {f"{installed}/sub/c.py"}
    assert f"{tmp_path}/other.py" in found.files
    # Without a path it is for the folder where it stands.
    (installed / "a.py").unlink()
    assert made(tmp_path / "there.json", *base, "--folder", installed).leaving == {f"{installed}/a.py"}


def test_one_file_is_removed(installed: Path, tmp_path: Path) -> None:
    path = f"{installed}/b.py"
    found = made(tmp_path / "next.json", "approve-next", tmp_path / "base.json", "--remove", path)
    assert (found.remove, found.next) == ((path,), {})
    refused = hostctl(
        "approve-next", tmp_path / "base.json", "--remove", "/no/such", "-o", tmp_path / "none.json"
    )
    assert "/no/such: the manifest has no such file to remove" in str(refused.exception)
    done = made(tmp_path / "done.json", "retire", tmp_path / "next.json")
    assert path not in done.files
    assert done.remove is msgspec.UNSET


def test_commands_count_alike(installed: Path, tmp_path: Path) -> None:
    path = tmp_path / "next.json"
    done = hostctl(
        *("approve-next", tmp_path / "base.json", "--remove", installed / "b.py"),
        *("--file", tmp_path / "base.json", "--retire-after", 3, "-o", path),
    )
    told = json.loads(done.output)
    assert {name: told[name] for name in ("files", "next", "retire", "remove")} == {
        "files": 4, "next": 1, "retire": 1, "remove": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options", [[], ["--as", "/x"], ["--folder", "/etc", "--file", "/etc/passwd", "--as", "/x"]], ids=str
)
def test_what_is_not_said(tmp_path: Path, installed: Path, options: list[str]) -> None:
    assert hostctl("approve-next", tmp_path / "base.json", *options, "-o", tmp_path / "x").exit_code != 0
    assert not (tmp_path / "x").exists()


# ── Which host ────────────────────────────────────────────────────────────────────────────────────


def test_which_host_it_is_for(tmp_path: Path) -> None:
    assert made(tmp_path / "a.json", "create").host == this_host()
    assert made(tmp_path / "b.json", "create", "--host", "kvm2").host == "kvm2"
    everywhere = tmp_path / "c.json"
    assert made(everywhere, "create", "--host", "*").host == ANY_HOST
    # A successor is for whom its base is for, unless it is said, and a document that is filled too.
    assert made(tmp_path / "d.json", "create", "--on", everywhere).host == ANY_HOST
    assert made(tmp_path / "e.json", "create", "--on", everywhere, "--host", "kvm2").host == "kvm2"
    assert made(tmp_path / "f.json", "create", "--into", everywhere).host == ANY_HOST
    assert made(tmp_path / "g.json", "create", "--into", everywhere, "--host", "kvm2").host == "kvm2"


def test_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(encode_reference(new_document(created=1, host="kvm\x1b2", base=None)))
    done = CliRunner().invoke(
        cli, ["manifest", "create", "--into", str(path), "-o", str(tmp_path / "b.json")]
    )
    assert "for host kvm\\x1b2: 0 files; digests: 0 next, 0 to retire; 0 files to remove" in done.output
