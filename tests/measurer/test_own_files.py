"""hostd's own files on a real filesystem: rounds, changes, and what legal change looks like."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Final

import pytest

from hostd.core.ownfiles import DROP_INS, OWN_PATHS, is_own
from hostd.core.reading_self import OwnFile
from hostd.measurer import own_files
from hostd.measurer.own_files import LOOKS, OwnFiles, Part, installation
from hostd.measurer.survey import survey

REPO: Final = Path(own_files.__file__).parents[2]


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def one_round(files: OwnFiles) -> dict[str, OwnFile]:
    """All files of one round, and that its parts follow each other."""
    found: dict[str, OwnFile] = {}
    number = count = 0
    while True:
        part: Part = files.read()
        number = number or part.number
        assert part.number == number
        assert part.position == count
        count += len(part.files)
        found |= {file.path: file for file in part.files}
        assert len(found) == count
        if part.complete:
            return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "opt"
    (root / "lib/sub").mkdir(parents=True)
    for name in ("a.py", "lib/b.py", "lib/sub/c.cpython-311.pyc", "lib/x.so", "lib/z.pth", "pyvenv.cfg"):
        (root / name).write_bytes(name.encode())
    (root / "tool").write_bytes(b"#!x")
    (root / "tool").chmod(0o755)
    (root / "notes.txt").write_bytes(b"not code")
    (tmp_path / "units.d").mkdir()
    (tmp_path / "hostd.toml").write_bytes(b"[x]")
    return tmp_path


def own(tree: Path) -> OwnFiles:
    return OwnFiles(
        [f"{tree}/opt/"],
        [f"{tree}/hostd.toml", f"{tree}/never.service"],
        [f"{tree}/units.d/", f"{tree}/none.d/"],
    )


def test_a_round_has_all_code_and_nothing_else(tree: Path) -> None:
    files = own(tree)
    expected = {
        f"{tree}/opt/{name}": sha(name.encode())
        for name in ("a.py", "lib/b.py", "lib/sub/c.cpython-311.pyc", "lib/x.so", "lib/z.pth", "pyvenv.cfg")
    }
    expected |= {f"{tree}/opt/tool": sha(b"#!x"), f"{tree}/hostd.toml": sha(b"[x]")}
    for _ in range(3):
        assert {path: file.sha256 for path, file in one_round(files).items()} == expected


def test_changes_are_seen_in_the_next_round(tree: Path) -> None:
    files = own(tree)
    before = one_round(files)
    target = tree / "opt/lib/b.py"
    target.write_bytes(b"changed")
    (tree / "opt/lib/new.pth").write_bytes(b"import os")
    (tree / "units.d/override.conf").write_bytes(b"[Service]")
    (tree / "opt/a.py").unlink()
    after = one_round(files)
    assert after[str(target)].sha256 == sha(b"changed")
    assert after.keys() - before.keys() == {f"{tree}/opt/lib/new.pth", f"{tree}/units.d/override.conf"}
    assert before.keys() - after.keys() == {f"{tree}/opt/a.py"}
    # The same size, and the time of change put back: the inode's own time still moves.
    info = target.stat()
    target.write_bytes(b"CHANGED")
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert one_round(files)[str(target)].sha256 == sha(b"CHANGED")
    # Replaced by another file, as package managers do.
    (tree / "opt/lib/b.new").write_bytes(b"replaced")
    (tree / "opt/lib/b.new").rename(target)
    assert one_round(files)[str(target)].sha256 == sha(b"replaced")


def test_content_is_read_again_although_nothing_of_the_file_moved(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a write below the filesystem does: simulated by a filesystem that does not tell."""
    files = own(tree)
    target = tree / "opt/lib/b.py"
    one_round(files)
    real = own_files._stamp
    kept = real(target.lstat())
    monkeypatch.setattr(own_files, "_stamp", lambda info: kept if info.st_ino == kept.inode else real(info))
    target.write_bytes(b"flipped")
    seen = [one_round(files)[str(target)].sha256 for _ in range(3)]
    assert seen[-1] == sha(b"flipped")


def test_links_and_what_cannot_be_read(tree: Path) -> None:
    (tree / "opt/link.py").symlink_to("/etc/passwd")
    (tree / "opt/python3").symlink_to("/usr/bin/python3")
    (tree / "hostd.toml").unlink()
    (tree / "hostd.toml").symlink_to("/dev/null")
    os.mkfifo(tree / "opt/pipe.py")
    found = one_round(own(tree))
    assert found[f"{tree}/opt/link.py"].sha256 == b""
    assert found[f"{tree}/hostd.toml"].sha256 == b""
    assert found[f"{tree}/opt/pipe.py"].sha256 == b""
    assert f"{tree}/opt/python3" not in found


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own the files")
def test_who_may_write(tree: Path) -> None:
    files = own(tree)
    target, folder = tree / "opt/lib/b.py", tree / "opt/lib/sub"
    assert all(file.guarded for file in one_round(files).values())
    for mode in (0o664, 0o646):
        target.chmod(mode)
        assert not one_round(files)[str(target)].guarded
    target.chmod(0o640)
    assert one_round(files)[str(target)].guarded
    os.chown(target, 1234, -1)
    assert not one_round(files)[str(target)].guarded
    os.chown(target, 0, 990)
    assert one_round(files)[str(target)].guarded
    folder.chmod(0o777)
    assert not one_round(files)[f"{folder}/c.cpython-311.pyc"].guarded


def test_replacing_files_all_the_time_names_nothing_unreadable(tree: Path) -> None:
    """An upgrade: files are replaced by renaming while they are read."""
    stop = threading.Event()
    target, other = tree / "opt/lib/b.py", tree / "opt/lib/.b"

    def replace() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            other.write_bytes(b"old" if number % 2 else b"new")
            other.rename(target)
            stop.wait(0.005)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        files = own(tree)
        seen = {one_round(files)[str(target)].sha256 for _ in range(100)}
    finally:
        stop.set()
        thread.join()
    assert seen <= {sha(b"lib/b.py"), sha(b"old"), sha(b"new")}


def test_a_reading_is_bounded(tree: Path) -> None:
    for number in range(300):
        (tree / f"opt/lib/m{number}.py").write_bytes(b"x" * number)
    files = own(tree)
    assert len(one_round(files)) == 308
    parts = []
    while not parts or not parts[-1].complete:
        parts.append(files.read())
    assert len(parts) > 308 // LOOKS
    assert max(len(part.files) for part in parts) <= LOOKS


def test_readings_that_come_often_each_do_a_share_and_the_rounds_are_whole(tree: Path) -> None:
    for number in range(300):
        (tree / f"opt/lib/m{number}.py").write_bytes(b"x" * number)
    files = own(tree)
    assert len(one_round(files)) == 308
    tenth = Sharing(files, 0.1)
    assert len(one_round(tenth)) == 308
    # A reading may do what those before it left undone, and its looks are at other things too.
    assert tenth.readings >= 308 // LOOKS * 10 - 10

    # Content is read again as well: this change leaves no trace in what the filesystem says.
    target = tree / "opt/lib/m250.py"
    info = os.stat(target)
    target.write_bytes(b"y" * 250)
    known = files._known[str(target)]
    files._known[str(target)] = known._replace(stamp=own_files._stamp(os.stat(target)))
    assert info.st_size == 250
    for _ in range(1000):
        if one_round(tenth)[str(target)].sha256 == sha(b"y" * 250):
            break
    else:
        raise AssertionError("its content was never read again")


class Sharing(OwnFiles):
    """Reads another one's files with a share of the work in each reading."""

    def __init__(self, files: OwnFiles, share: float) -> None:
        self._files = files
        self._share = share
        self.readings = 0

    def read(self, share: float = 1.0) -> Part:
        self.readings += 1
        return self._files.read(self._share)


def test_this_very_checkout_agrees_with_a_survey_of_it() -> None:
    roots = installation()
    assert any(str(REPO).startswith(root.rstrip("/")) or root.startswith(str(REPO)) for root in roots)
    found = {path: file.sha256 for path, file in one_round(OwnFiles(roots)).items()}
    surveyed: dict[str, bytes] = {}
    for part in survey(roots):
        surveyed |= part or {}
    assert {p for p in found if p.endswith(".py")} == {p for p in surveyed if p.endswith(".py")}
    assert found[str(REPO / "hostd/__init__.py")] == surveyed[str(REPO / "hostd/__init__.py")]


def test_which_paths_are_own() -> None:
    roots = ("/opt/hostd/",)
    for path in ("/opt/hostd/x", "/etc/hostd/hostd.toml", "/etc/systemd/system/hostd-vault.service"):
        assert is_own(path, roots)
    assert is_own("/etc/systemd/system/hostd-vault.service.d/x.conf", roots)
    for path in ("/opt/hostd2/x", "/etc/systemd/system/ssh.service", "/usr/bin/python3", ""):
        assert not is_own(path, roots)
    assert "/etc/ima/ima-policy" in OWN_PATHS
    assert all(folder.endswith(".d/") for folder in DROP_INS)
