"""Digests out of real .deb files, made here by dpkg-deb; and what apt tells its hooks."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from guestlib.errors import ConflictError, MalformedError, NotFoundError
from hostd.admin import manifest_packages
from hostd.admin.manifest_files import hash_files, hash_folders, kernel_path
from hostd.admin.manifest_packages import of_apt, read_deb, read_installed
from tests.support.deb import PROGRAM, deb

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@needs_dpkg
def test_code_of_a_package(tmp_path: Path) -> None:
    path = deb(tmp_path)
    found = read_deb(path)
    assert found.digests == {
        "/usr/bin/tool": sha256(PROGRAM),
        "/usr/bin/tool-again": sha256(PROGRAM),
        "/usr/bin/lib.so.1": sha256(b"library"),
        # Where the kernel will find it: /lib is a link on a merged /usr.
        os.path.realpath("/lib") + "/modules/6.1/m.ko.xz": sha256(b"module"),
    }
    source = found.source
    assert (source.name, source.version, source.architecture) == ("hostd-test-package", "1:2.0-1", "amd64")
    assert (source.how, source.sha256) == ("deb", sha256(path.read_bytes()))


@needs_dpkg
def test_a_package_that_apts_lists_have_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists are apt's; what they would say is put before apt-cache's place in the PATH."""
    path = deb(tmp_path)
    digest = sha256(path.read_bytes())
    fake = tmp_path / "bin/apt-cache"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n[ "$2" = "hostd-test-package:amd64=1:2.0-1" ] && echo "SHA256: {digest}"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    assert read_deb(path).source.how == "deb-archive"
    other = deb(tmp_path, program=PROGRAM + b"# changed")
    with pytest.raises(ConflictError, match=f"SHA-256 {digest}, this file has"):
        read_deb(other)
    assert read_deb(other, archive=False).source.how == "deb"


@needs_dpkg
def test_what_is_no_package(tmp_path: Path) -> None:
    path = tmp_path / "none.deb"
    for data in (b"", b"!<arch>\n", deb(tmp_path).read_bytes()[:-40]):
        path.write_bytes(data)
        with pytest.raises(MalformedError):
            read_deb(path)


@needs_dpkg
def test_an_installed_package() -> None:
    """dpkg itself: every Debian machine has it, and its files are as they were installed."""
    (found,) = read_installed("dpkg")
    assert found.source.how in ("installed", "deb", "deb-archive")
    assert found.digests["/usr/bin/dpkg"] == sha256(Path("/usr/bin/dpkg").read_bytes())
    with pytest.raises((NotFoundError, MalformedError)):
        read_installed("hostd-no-such-package")


@needs_dpkg
def test_an_installed_file_that_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "tool"
    program.write_bytes(PROGRAM)
    program.chmod(0o755)
    sums = [(str(program), hashlib.md5(PROGRAM, usedforsecurity=False).hexdigest())]
    monkeypatch.setattr(manifest_packages, "_sums", lambda _name, _architecture: sums)
    read = manifest_packages._read_disk
    assert read("p", "1", "amd64").digests == {str(program): sha256(PROGRAM)}
    program.write_bytes(PROGRAM + b"#")
    changed = read("p", "1", "amd64")
    assert changed.digests == {}
    assert changed.altered[0].startswith(f"{program}: p 1 has MD5 {sums[0][1]}, the disk ")
    program.unlink()
    assert read("p", "1", "amd64").digests == {}


HOOK = """\
VERSION 3
APT::Architecture=amd64
Dir::Cache=/var/cache/apt

qemu-system-x86 1:7.2+dfsg-7 amd64 none < 1:7.2+dfsg-8 amd64 none /var/cache/apt/archives/q_1%3a7.2_amd64.deb
qemu-system-x86 1:7.2+dfsg-7 amd64 none < 1:7.2+dfsg-8 amd64 none **CONFIGURE**
old 1 amd64 none > - - none **REMOVE**
local - - none < 1.0 all none /tmp/local.deb
"""
"""As apt 2.6 writes it."""


def test_what_apt_tells_its_hooks() -> None:
    debs = [Path("/var/cache/apt/archives/q_1%3a7.2_amd64.deb"), Path("/tmp/local.deb")]
    assert of_apt(HOOK.splitlines(keepends=True)) == debs
    assert of_apt(["/tmp/local.deb\n"]) == debs[1:]  # version 1
    for nothing in ([], ["VERSION 3\n"], ["VERSION 2\n", "a=b\n"], ["\n"], ["hello\n"]):
        assert of_apt(nothing) == []


def test_paths_as_the_kernel_names_them(tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    (tmp_path / "lib").symlink_to("usr")
    assert kernel_path(f"{tmp_path}/lib/not-there.so") == f"{tmp_path}/usr/not-there.so"
    (tmp_path / "usr/link").symlink_to("tool")
    assert kernel_path(f"{tmp_path}/lib/link") == f"{tmp_path}/usr/link"


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"text")
    (tmp_path / "a.py").write_bytes(b"code")
    (tmp_path / "link.py").symlink_to("a.py")
    assert hash_folders([tmp_path]) == {f"{tmp_path}/a.py": (sha256(b"code"),)}
    assert hash_files([tmp_path / "text"]) == {f"{tmp_path}/text": (sha256(b"text"),)}
    assert hash_files([tmp_path / "link.py"]) == {f"{tmp_path}/a.py": (sha256(b"code"),)}
