"""tpm2-pytss is built without FAPI: what the build is shown, and what is looked at afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import tpm2_pytss

from qemu import lean_pytss


def known(part: str, env: dict[str, str]) -> bool:
    return subprocess.run(["pkg-config", "--exists", part], env=env, check=False).returncode == 0


def test_the_build_finds_everything_but_what_is_left_out(tmp_path: Path) -> None:
    env = lean_pytss.without_fapi(tmp_path)
    for part in ("tss2-esys", "tss2-sys", "tss2-mu", "tss2-rc", "tss2-tctildr"):
        assert known(part, env), part
    for part in lean_pytss.LEFT_OUT:
        assert not known(part, env), part


def test_an_earlier_folder_comes_first_and_is_filtered_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, links = tmp_path / "own", tmp_path / "links"
    own.mkdir()
    links.mkdir()
    for name in ("tss2-esys", "tss2-fapi"):
        (own / f"{name}.pc").write_text(f"Name: {name}\nDescription: ours\nVersion: 99\n")
    monkeypatch.setenv("PKG_CONFIG_PATH", str(own))
    env = lean_pytss.without_fapi(links)
    asked = ["pkg-config", "--modversion", "tss2-esys"]
    assert subprocess.run(asked, env=env, check=True, capture_output=True).stdout == b"99\n"
    assert not known("tss2-fapi", env)


def test_a_build_with_fapi_is_told_from_one_without() -> None:
    assert lean_pytss.is_lean(b"\x7fELF libtss2-esys.so.0 libtss2-mu.so.0 Fapi")
    for library in lean_pytss.LEFT_OUT:
        assert not lean_pytss.is_lean(b"\x7fELF libtss2-esys.so.0\0lib" + library.encode() + b".so.1\0")


def test_the_version_is_the_projects() -> None:
    assert lean_pytss.requirement().startswith("tpm2-pytss>=")


def test_what_is_installed_is_lean() -> None:
    extensions = list(Path(tpm2_pytss.__file__).parent.glob("_libtpm2_pytss*.so"))
    assert extensions
    for extension in extensions:
        assert lean_pytss.is_lean(extension.read_bytes()), "run qemu/lean_pytss.py --install"
    assert lean_pytss.installed()


def test_another_version_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_pytss, "requirement", lambda: "tpm2-pytss>=99")
    assert not lean_pytss.installed()
