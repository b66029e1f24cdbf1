"""Posture, IMA, survey, tags, libvirt, holders of vsock: each probe on real files."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from guestlib.attest.imalog import parse_entries
from hostd.core.readings import ImaReading, Missing
from hostd.measurer.directory import Directory
from hostd.measurer.holders import GRACE_S, Holders
from hostd.measurer.ima import ImaProbe
from hostd.measurer.posture import PostureError, PostureProbe
from hostd.measurer.survey import survey
from hostd.measurer.tags import PIECE_BYTES, Tagger
from hostd.platform.notify import READY, WATCHDOG, notify, watchdog_interval
from tests.support.imalog import entry


def test_own_posture() -> None:
    reading = PostureProbe().read()
    assert reading.kernel.startswith(os.uname().release)
    assert reading.command_line == Path("/proc/cmdline").read_text().strip()
    assert reading.modules == tuple(sorted(reading.modules))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, text in {
        "proc/cmdline": "root=/dev/vda rw\n",
        "proc/modules": "kvm 1 1 kvm_amd, Live 0x0\nahci 1 0 - Live 0x0\n",
        "proc/sys/kernel/tainted": "4096\n",
        "proc/sys/kernel/modules_disabled": "0\n",
        "proc/sys/kernel/kexec_load_disabled": "1\n",
        "proc/sys/kernel/yama/ptrace_scope": "3\n",
        "sys/module/module/parameters/sig_enforce": "Y\n",
        "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
        "sys/kernel/debug/kprobes/list": "ffff k svm_vcpu_run+0x0\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_posture(root: Path) -> None:
    reading = PostureProbe(root).read()
    assert reading.modules == ("ahci", "kvm")
    assert (reading.taint, reading.lockdown, reading.ptrace_scope) == (4096, "integrity", 3)
    assert (reading.modules_disabled, reading.kexec_load_disabled) == (0, 1)
    assert reading.signature_enforced is True
    assert reading.kprobes == ("kprobe at svm_vcpu_run+0x0",)


def test_posture_that_is_not_there(tmp_path: Path, root: Path) -> None:
    for path in (
        "proc/modules", "proc/sys/kernel/modules_disabled", "proc/sys/kernel/kexec_load_disabled",
        "proc/sys/kernel/yama/ptrace_scope", "sys/module/module/parameters/sig_enforce",
        "sys/kernel/security/lockdown", "sys/kernel/debug/kprobes/list",
    ):  # fmt: skip
        (root / path).unlink()
    reading = PostureProbe(root).read()
    assert reading.modules == ()
    assert reading.lockdown == ""
    assert reading.kprobes is None
    assert {reading.modules_disabled, reading.kexec_load_disabled, reading.ptrace_scope} == {None}
    assert reading.signature_enforced is None


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("proc/sys/kernel/tainted", "x"),
        ("proc/sys/kernel/tainted", ""),
        ("sys/kernel/security/lockdown", "none"),
        ("proc/cmdline", "x" * (2 << 20)),
        ("proc/modules", "a\n" * 3000),
    ],
)
def test_posture_refuses(root: Path, path: str, text: str) -> None:
    (root / path).write_text(text)
    with pytest.raises(PostureError):
        PostureProbe(root).read()


def test_ima_absent(tmp_path: Path) -> None:
    assert ImaProbe(tmp_path / "none").read(0) == Missing(
        "this kernel keeps no measurement log (IMA)", absent=True
    )


def test_ima_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, second = entry("/usr/bin/a") + entry("/usr/bin/b"), entry("/usr/bin/c")
    log.write_bytes(first)
    probe = ImaProbe(log)
    reading = probe.read(0)
    assert isinstance(reading, ImaReading)
    assert (reading.offset, reading.data, reading.more) == (0, first, False)
    assert len(reading.boot_id) == 36
    with log.open("ab") as file:
        file.write(second[:10])
    assert isinstance(probe.read(len(first)), Missing)
    with log.open("ab") as file:
        file.write(second[10:])
    reading = probe.read(len(first))
    assert isinstance(reading, ImaReading)
    assert reading.data == second
    reading = probe.read(len(first) + len(second))
    assert isinstance(reading, ImaReading)
    assert reading.data == b""
    # A vault that started again.
    reading = probe.read(0)
    assert isinstance(reading, ImaReading)
    assert reading.data == first + second
    assert isinstance(probe.read(1 << 40), Missing)
    assert isinstance(probe.read(len(first) + len(second) + 1), Missing)
    probe.close()


def test_ima_large_log_comes_in_parts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    whole = b"".join(entry(f"/usr/lib/{number:0200}") for number in range(8000))
    assert len(whole) > 2 << 20
    log.write_bytes(whole)
    probe = ImaProbe(log)
    got, more = b"", True
    while more:
        reading = probe.read(len(got))
        assert isinstance(reading, ImaReading)
        assert 0 < len(reading.data) <= 1 << 20
        assert parse_entries(reading.data)[-1].end == len(reading.data)
        got += reading.data
        more = reading.more
    assert got == whole
    probe.close()


def test_ima_garbage(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\xff" * 100)
    probe = ImaProbe(log)
    reading = probe.read(0)
    assert isinstance(reading, Missing)
    assert not reading.absent
    probe.close()


def test_survey_takes_code(tmp_path: Path) -> None:
    for name, mode in (
        ("run", 0o755),
        ("lib.so.1.2", 0o644),
        ("m.ko.xz", 0o644),
        ("a.py", 0o644),
        ("b.txt", 0o644),
    ):
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).chmod(mode)
    os.link(tmp_path / "run", tmp_path / "other")
    (tmp_path / "link.so").symlink_to(tmp_path / "run")
    os.mkfifo(tmp_path / "pipe.so")
    found: dict[str, bytes] = {}
    for part in survey([str(tmp_path), str(tmp_path / "missing")]):
        found |= part or {}
    assert {Path(path).name for path in found} == {"run", "other", "lib.so.1.2", "m.ko.xz", "a.py"}
    assert found[str(tmp_path / "run")] == found[str(tmp_path / "other")]


def test_tags() -> None:
    tagger = Tagger()
    long = bytes(range(256)) * (PIECE_BYTES // 256) + b"tail"
    assert tagger.tag(long) == tagger.tag(bytearray(long)) == tagger.tag(memoryview(long))
    assert len(tagger.tag(long)) == 16
    for at in (0, PIECE_BYTES - 1, PIECE_BYTES, len(long) - 1):
        changed = bytearray(long)
        changed[at] ^= 1
        assert tagger.tag(changed) != tagger.tag(long)
    assert tagger.tag(long) != tagger.tag(long + b"\0")
    assert tagger.tag(b"") != tagger.tag(b"\0")
    assert Tagger().tag(long) != tagger.tag(long)


def test_libvirt_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("libvirt")
    directory = Directory(f"test://{tmp_path}/none.xml", tmp_path)
    assert directory.ask(frozenset({(1, 1)}), 5.0) == {}
    assert directory.error


def test_libvirt_vouches_for_the_pid_it_wrote(tmp_path: Path) -> None:
    pytest.importorskip("libvirt")
    node = tmp_path / "node.xml"
    node.write_text(
        "<node><domain type='test'><name>web1</name><uuid>11111111-2222-3333-4444-555555555555</uuid>"
        "<memory>8192</memory><os><type>hvm</type></os></domain>"
        "<domain type='test'><name>nopid</name><memory>8192</memory><os><type>hvm</type></os></domain></node>"
    )
    (tmp_path / "web1.pid").write_text("4242\n")
    directory = Directory(f"test://{node}", tmp_path)
    answer = directory.ask(frozenset({(4242, 7), (4243, 8)}), 5.0)
    assert directory.error == ""
    said = answer[4242, 7]
    assert said is not None
    assert (said.vm, said.name, said.cid) == ("11111111-2222-3333-4444-555555555555", "web1", 0)
    assert answer[4243, 8] is None
    (tmp_path / "web1.pid").write_text("not a pid")
    time.sleep(0.05)
    assert directory.ask(frozenset({(4242, 7)}), 5.0) == {(4242, 7): None}


def test_holder_is_reported_after_its_grace() -> None:
    device = os.stat("/dev/full").st_rdev
    now = 100.0
    holders = Holders(device, lambda: now)
    with (
        Path("/dev/full").open("rb") as held,
        subprocess.Popen(["/bin/sleep", "60"], stdin=held) as process,
    ):
        held.close()
        try:
            for _ in range(200):
                assert holders.unknown(set()) == ()
            now += GRACE_S
            assert holders.unknown(set()) == (f"pid {process.pid} ({os.path.realpath('/bin/sleep')})",)
            assert holders.unknown({process.pid}) == ()
        finally:
            process.kill()
    assert holders.unknown(set()) == ()


def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        notify(READY)
        assert sock.recv(100) == b"READY=1"
        monkeypatch.setenv("NOTIFY_SOCKET", "relative")
        notify(READY)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
        notify(WATCHDOG)
        monkeypatch.delenv("NOTIFY_SOCKET")
        notify(READY)


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [("30000000", "", 15.0), ("30000000", "1", None), ("", "", None), ("x", "", None), ("0", "", None)],
)
def test_watchdog(monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, interval: float | None) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog_interval() == interval
