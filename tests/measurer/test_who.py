"""Who is who under libvirt: pids that come again, CIDs that two claim, a daemon that is silent or hangs.

libvirt's own test driver answers where its words do; where a machine must be a process, a simulator of
`Directory` says what libvirt would.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from hostd.config import Hypervisor as HypervisorConfig
from hostd.core.reading_domain import DomainPart, DomainReading
from hostd.core.readings import Missing
from hostd.measurer.commandline import Said
from hostd.measurer.directory import Directory, Key, Word
from hostd.measurer.domain import DomainProbe
from hostd.measurer.domain_xml import parse_domain
from hostd.measurer.guests import WAIT_S, Guest, GuestsProbe
from hostd.measurer.scan import Found
from hostd.platform.procfs import ProcessGoneError, ProcessHandle
from tests.support import qemu, readings

UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "11111111-2222-3333-4444-666666666666"


def xml(vm: str, name: str = "web1", *, cid: int = 0, devices: str = "") -> str:
    vsock = f"<vsock model='virtio'><cid auto='no' address='{cid}'/></vsock>" if cid else ""
    return (
        f"<domain type='test'><name>{name}</name><uuid>{vm}</uuid><memory>8192</memory><os><type>hvm</type>"
        f"</os><devices>{devices}{vsock}</devices></domain>"
    )


class Libvirt:
    """What libvirt would say. `said` None: it is silent."""

    def __init__(self) -> None:
        self.said: dict[int, Said] | None = {}
        self.words: dict[str, Word] = {}
        self.error = ""

    def ask(self, processes: frozenset[Key], wait_s: float) -> dict[Key, Said | None]:
        if self.said is None:
            return {}
        return {key: self.said.get(key[0]) for key in processes}

    def define(self, vm: str, wait_s: float) -> Word | None:
        return None if self.said is None else self.words.get(vm)

    def forget(self, vms: frozenset[str]) -> None:
        pass


class Host:
    """A probe whose libvirt and control groups are said by a test."""

    def __init__(self, binary: Path) -> None:
        self.libvirt = Libvirt()
        self.runs: dict[int, int] = {}
        self.probe = GuestsProbe(
            HypervisorConfig(binaries=(str(binary),)),
            directory=cast("Directory", self.libvirt),
            runs_as=lambda found, run: self.runs.get(found.key[0]) == run,
        )
        self.domains = DomainProbe(self.probe)

    def vouch(self, vm: qemu.Vm, *, run: int = 1, cid: int = 0, devices: str = "") -> None:
        assert self.libvirt.said is not None
        self.libvirt.said[vm.pid] = Said(vm.uuid, vm.name, cid, run)
        text = xml(vm.uuid, vm.name, cid=cid, devices=devices)
        self.libvirt.words[vm.uuid] = Word(vm.pid, parse_domain(text))
        self.runs[vm.pid] = run

    def vms(self) -> list[str]:
        return [guest.hypervisor.vm for guest in self.probe.look()]

    def domain(self) -> DomainReading | Missing:
        (guest,) = self.probe.look()
        return self.domains.read(guest)


@pytest.fixture
def host(binary: Path) -> Iterator[Host]:
    host = Host(binary)
    yield host
    host.domains.close()
    host.probe.close()


# ── Who it is ─────────────────────────────────────────────────────────────────────────────────────────


def test_libvirts_word_counts_only_in_its_control_group(host: Host, vm: qemu.Vm) -> None:
    """A pid that was given to another process while libvirtd was down is still in libvirt's file."""
    host.vouch(vm, run=3)
    host.runs[vm.pid] = 0
    assert host.vms() == []
    assert vm.pid in host.probe.nobody
    host.runs[vm.pid] = 2
    assert host.vms() == []
    host.runs[vm.pid] = 3
    assert host.vms() == [vm.uuid]
    assert host.probe.nobody == frozenset()


def test_a_machine_stays_who_it_is_while_libvirtd_is_down(host: Host, binary: Path, vm: qemu.Vm) -> None:
    host.vouch(vm)
    assert host.vms() == [vm.uuid]
    host.libvirt.said = None
    with qemu.running(binary) as later:
        assert host.vms() == [vm.uuid]
        # Nobody vouches for what started meanwhile, whatever its command line says.
        assert host.probe.nobody == {later.pid}
        # libvirtd is back, and has not noticed yet that `later` is not what it had.
        host.libvirt.said = {}
        host.vouch(vm)
        host.libvirt.said[later.pid] = Said(OTHER, "web2", 9, 2)
        assert host.vms() == [vm.uuid]
    host.libvirt.said = {}
    assert host.vms() == []


def test_another_run_of_the_same_domain_is_looked_at_anew(host: Host, vm: qemu.Vm) -> None:
    host.vouch(vm, run=1)
    assert host.vms() == [vm.uuid]
    assert host.libvirt.said is not None
    host.libvirt.said[vm.pid] = Said(vm.uuid, vm.name, 0, 2)
    assert host.vms() == []


def test_the_real_kernel_puts_a_plain_process_in_no_run(binary: Path, vm: qemu.Vm) -> None:
    libvirt = Libvirt()
    probe = GuestsProbe(HypervisorConfig(binaries=(str(binary),)), directory=cast("Directory", libvirt))
    libvirt.said = {vm.pid: Said(vm.uuid, "web1", 0, 1)}
    assert probe.look() == ()
    probe.close()


def test_two_domains_cannot_be_one_process(tmp_path: Path) -> None:
    pytest.importorskip("libvirt")
    node = tmp_path / "node.xml"
    node.write_text(f"<node>{xml(UUID, 'one')}{xml(OTHER, 'two')}</node>")
    (tmp_path / "one.pid").write_text("4242\n")
    (tmp_path / "two.pid").write_text("4243\n")
    directory = Directory(f"test://{node}", tmp_path)
    said = directory.ask(frozenset({(4242, 1), (4243, 1)}), 5.0)
    assert {key[0]: word and word.vm for key, word in said.items()} == {4242: UUID, 4243: OTHER}
    assert len({word.run for word in said.values() if word}) == 2
    (tmp_path / "two.pid").write_text("4242\n")
    assert directory.ask(frozenset({(4242, 1), (4243, 1)}), 5.0) == {(4242, 1): None, (4243, 1): None}


def test_a_cid_counts_only_while_the_device_is_held(host: Host) -> None:
    """The vsock device is unplugged: whoever gets that CID next is not this machine."""
    script = (
        "f = open('/dev/full'); print('up', flush=True); input(); f.close(); print('x', flush=True); input()"
    )
    host.probe._device = Path("/dev/full").stat().st_rdev
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        handle = ProcessHandle(process.pid)
        found = Found(handle, handle.stat().start_time, "/x", 0, vsock=True)
        guest = Guest(readings.hypervisor(), found)
        host.probe.recheck(guest)
        assert found.vsock
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        host.probe.recheck(guest)
        assert not found.vsock
        handle.close()
        process.kill()


# ── What it is made of ────────────────────────────────────────────────────────────────────────────────


def test_libvirt_says_what_a_machine_is_made_of(host: Host, vm: qemu.Vm) -> None:
    host.vouch(vm, cid=7, devices="<video/>")
    reading = host.domain()
    assert isinstance(reading, DomainReading)
    assert (reading.vm, reading.cid, reading.source) == (vm.uuid, 7, "libvirt")
    assert (reading.pid, reading.said_vms, reading.said_cids) == (vm.pid, (vm.uuid,), ())
    assert DomainPart("video") in reading.devices
    assert reading.answered


def test_silence_changes_nothing_and_tells_nothing_new(host: Host, vm: qemu.Vm) -> None:
    host.vouch(vm, devices="<video/>")
    assert host.vms() == [vm.uuid]
    # Silent from the start: nothing is known, and it is not absent.
    said, host.libvirt.said = host.libvirt.said, None
    nothing = host.domain()
    assert isinstance(nothing, Missing)
    assert not nothing.absent
    host.libvirt.said = said
    before = host.domain()
    assert isinstance(before, DomainReading)
    host.libvirt.said = None
    after = host.domain()
    assert isinstance(after, DomainReading)
    assert not after.answered
    assert after.devices == before.devices


def test_a_domain_that_is_another_process_by_now(host: Host, vm: qemu.Vm) -> None:
    host.vouch(vm)
    (guest,) = host.probe.look()
    host.libvirt.words[vm.uuid] = Word(vm.pid + 1, host.libvirt.words[vm.uuid].definition)
    with pytest.raises(ProcessGoneError):
        host.domains.read(guest)
    host.vouch(vm)
    vm.kill()
    with pytest.raises(ProcessGoneError):
        host.domains.read(guest)


def test_a_process_says_itself_under_proc(binary: Path) -> None:
    probe = GuestsProbe(HypervisorConfig(binaries=(str(binary),), provider="proc"))
    domains = DomainProbe(probe)
    with qemu.running(binary, "-kernel", "/boot/none", settle=False) as vm:
        deadline = time.monotonic() + 10
        while not probe.look():
            assert time.monotonic() < deadline
        (guest,) = probe.guests
        reading = domains.read(guest)
        assert isinstance(reading, DomainReading)
        assert (reading.vm, reading.source, reading.virt) == (vm.uuid, "proc", "qemu")
        assert reading.emulator == str(binary)
        assert DomainPart("kernel", "/boot/none") in reading.boot
        assert any(part.kind == "qmp:unix" for part in reading.devices)
        assert domains.read(guest) == reading

        # What a process has where its arguments are is what it says, and it can write there.
        line = Path(f"/proc/{vm.pid}/cmdline").read_bytes()
        begins = int(Path(f"/proc/{vm.pid}/stat").read_text().rpartition(")")[2].split()[45])
        with open(f"/proc/{vm.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(begins + line.index(b"/boot/none"))
            memory.write(b"/boot/more")
        other = domains.read(guest)
        assert isinstance(other, DomainReading)
        assert DomainPart("kernel", "/boot/more") in other.boot
        assert other.said != reading.said
    probe.close()


def test_the_test_driver_defines_a_domain(tmp_path: Path) -> None:
    pytest.importorskip("libvirt")
    node = tmp_path / "node.xml"
    node.write_text(f"<node>{xml(UUID, 'one', devices='<video/>')}</node>")
    directory = Directory(f"test://{node}", tmp_path)
    assert directory.define(UUID, 5.0) is None
    assert "does not run" in directory.error
    (tmp_path / "one.pid").write_text("4242\n")
    word = directory.define(UUID, 5.0)
    assert word is not None
    assert (word.pid, word.definition.vm, word.definition.name) == (4242, UUID, "one")
    assert DomainPart("video") in word.definition.devices
    assert directory.define(OTHER, 5.0) is None
    assert directory.error
    assert directory.define(UUID, 5.0) == word


def test_a_daemon_that_hangs_costs_one_wait(tmp_path: Path) -> None:
    hang = threading.Event()

    class Hanging(Directory):
        def _define(self) -> Word:
            hang.wait(30)
            return cast("Any", super())._define()

    pytest.importorskip("libvirt")
    node = tmp_path / "node.xml"
    node.write_text(f"<node>{xml(UUID, 'one')}</node>")
    (tmp_path / "one.pid").write_text("4242\n")
    directory = Hanging(f"test://{node}", tmp_path)
    directory.ask(frozenset(), 5.0)
    begun = time.monotonic()
    for _ in range(50):
        assert directory.define(UUID, WAIT_S) is None
    assert WAIT_S <= time.monotonic() - begun < 25 * WAIT_S
    hang.set()
    deadline = time.monotonic() + 10
    while directory.define(UUID, 1.0) is None:
        assert time.monotonic() < deadline
