"""The lab's host has what a measured KVM host has, and can be rebooted, cut off and rolled back."""

from __future__ import annotations

import mmap
import os
import re

import pytest

from qemu.errors import ChannelClosedError, CommandFailedError, CommandTimeoutError, PowerStateError
from qemu.host import LabHost

NV_INDEX = "0x1500018"
NV_COUNTER = "nt=counter|ownerread|ownerwrite|authread|authwrite"


def _pcrs(host: LabHost) -> dict[int, str]:
    """The PCRs of the measured boot."""
    said = host.run(["tpm2_pcrread", "sha256:0,1,2,3,4,5,6,7,8,9"]).text
    return {int(number): value for number, value in re.findall(r"(\d+)\s*: 0x([0-9A-F]{64})", said)}


def _nv_counter(host: LabHost) -> int:
    return int.from_bytes(host.run(["tpm2_nvread", NV_INDEX]).stdout, "big")


def test_the_host_is_a_measured_kvm_host(lab: LabHost) -> None:
    for device in ("/dev/tpm0", "/dev/tpmrm0", "/dev/kvm", "/dev/vhost-vsock", "/dev/vsock"):
        lab.run(["test", "-c", device])
    log = lab.get("/sys/kernel/security/ima/ascii_runtime_measurements").decode()
    assert log.startswith("10 ")
    assert " sha256:" in log
    assert " boot_aggregate" in log.splitlines()[0]
    assert lab.get("/sys/kernel/security/tpm0/binary_bios_measurements")[32:48].startswith(b"Spec ID Event03")
    assert "running hypervisor: qemu" in lab.run(["virsh", "version"]).text.lower()


def test_commands_and_files(lab: LabHost) -> None:
    blob = os.urandom(3_000_001)
    lab.put(blob, "/root/blob", mode=0o600)
    assert lab.get("/root/blob") == blob
    assert lab.run("cat; echo err >&2", stdin=b"in").stdout == b"in"
    failed = lab.run(["sh", "-c", "kill -TERM $$"], check=False)
    assert failed.rc == -15
    with pytest.raises(CommandFailedError, match="ended with 3: no"):
        lab.run("echo no >&2; exit 3")
    assert lab.run(["/no/such/program"], check=False).rc == 127
    with pytest.raises(CommandTimeoutError, match="half"):
        lab.run("echo half; sleep 100", 1.0)
    waiting = lab.start(["cat"])
    assert lab.run(["echo", "meanwhile"]).text == "meanwhile"
    waiting.write(b"later")
    waiting.end_input()
    assert waiting.wait(10).stdout == b"later"


def test_memory_is_seen_from_outside(lab: LabHost) -> None:
    """What L1 keeps in RAM is found, and can be changed, in the shared mapping."""
    old, new = os.urandom(16).hex().encode(), os.urandom(16).hex().encode()
    lab.put(old, "/dev/shm/needle")
    with lab.memory() as ram:
        assert isinstance(ram, mmap.mmap)
        at = ram.find(old)
        assert at >= 0
        while at >= 0:
            ram[at : at + len(new)] = new
            at = ram.find(old, at + 1)
    assert lab.get("/dev/shm/needle") == new


def test_reboot_power_cut_and_rollback(lab: LabHost) -> None:
    """One story, since every boot takes its time: each step checks what the one before left."""
    lab.run(["tpm2_nvdefine", NV_INDEX, "-C", "o", "-a", NV_COUNTER])
    lab.run(["tpm2_nvincrement", NV_INDEX])
    lab.put(b"old", "/root/state")
    counter, pcrs = _nv_counter(lab), _pcrs(lab)

    # A clean reboot keeps disk and TPM, and another command line is measured into PCR 9 alone.
    lab.reboot("hostd.lab=another-command-line", settled=False)
    assert "hostd.lab=another-command-line" in lab.get("/proc/cmdline").decode()
    assert {number for number, value in _pcrs(lab).items() if value != pcrs[number]} == {9}
    assert (lab.get("/root/state"), _nv_counter(lab)) == (b"old", counter)
    lab.shutdown()
    with pytest.raises(PowerStateError):
        lab.run(["true"])
    lab.snapshot("old")

    # The old command line, the old PCRs. A power cut ends what runs and drops what was not synced.
    lab.boot(settled=False)
    assert _pcrs(lab) == pcrs
    lab.put(b"new", "/root/state")
    lab.run(["tpm2_nvincrement", NV_INDEX])
    lab.run(["sync"])
    lab.put(b"lost", "/root/unsynced")
    sleeping = lab.start(["sleep", "1000"])
    lab.power_cut()
    with pytest.raises(ChannelClosedError):
        sleeping.wait(10)

    # The TPM put back, the disk as the cut left it.
    lab.rollback("old", disk=False)
    lab.boot(settled=False)
    assert (lab.get("/root/state"), _nv_counter(lab)) == (b"new", counter)
    assert lab.run(["cat", "/root/unsynced"], check=False).stdout == b""
    lab.run(["tpm2_nvincrement", NV_INDEX])
    lab.power_cut()

    # The disk put back, the TPM as it was.
    lab.rollback("old", tpm=False)
    lab.boot()
    assert (lab.get("/root/state"), _nv_counter(lab)) == (b"old", counter + 1)


def test_a_host_whose_kernel_panics_is_off_and_who_waits_is_told(lab: LabHost) -> None:
    waiting = lab.start(["sleep", "1000"])
    lab.start("echo c >/proc/sysrq-trigger")
    with pytest.raises(ChannelClosedError):
        waiting.wait(60)
    assert lab.ended()
    assert not lab.running
