"""Promise: every attack on a KVM host that the lab can stage is found, named and refused.

Two guests ask over vsock. What cannot be undone without a boot comes last: loading the module taints the
kernel, which an officer then has to accept before anything is answered again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qemu import tamper_hooks, tamper_ram
from qemu.tamper import patch_code
from qemu.tamper_module import NAME, Tamper
from tests.lab.stage import QEMU, Stage
from tests.support.attacks import Attack, Outcome, Sign, Staged, attempt, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.conftest import Running

FIRMWARE = "/usr/share/seabios/bios-256k.bin"
FREE_CID = 77
HOLDERS_S = 60.0
"""Holders of the device are looked for in turn, and reported after some seconds (measurer/holders.py)."""
OWN_S = 180.0
"""hostd's own files and processes are read in turn (docs/measurement.md, "self")."""
METRICS_GROUP = "/sys/fs/cgroup/system.slice/hostd-metrics.service"
TAINTS = 1 << 12 | 1 << 13
"""Out of tree, unsigned (Documentation/admin-guide/tainted-kernels.rst)."""
TEXT = ("kernel-text-altered",)


def hosts(*signs: Sign, undo: Callable[[], None]) -> Staged:
    """Something of the host's: everybody is refused, and nothing has to be started anew."""
    return Staged(signs, undo, others=False, anew=False)


# ── With what the kernel offers ───────────────────────────────────────────────────────────────────────


def write_text(stage: Stage) -> Staged:
    patch = patch_code(stage.host, stage.pid)
    return Staged((Sign(stage.own, ("code-altered",), (QEMU, f"file offset {patch.offset:#x}")),))


def probe_hypervisor(stage: Stage) -> Staged:
    patch = stage.quiet_text()[0]
    undo = tamper_hooks.uprobe(stage.host, QEMU, patch)
    return hosts(Sign(stage.own, ("code-altered",), (QEMU, f"file offset {patch:#x}")), undo=undo)


def probe_kernel(stage: Stage) -> Staged:
    undo = tamper_hooks.kprobe(stage.host, "do_sys_openat2")
    return hosts(Sign("posture", ("posture-kprobes",), ("do_sys_openat2",)), undo=undo)


def trace_kernel(stage: Stage) -> Staged:
    undo = tamper_hooks.trace(stage.host, "svm_vcpu_run")
    # The kernel's own patching of its own call site: `kernel` finds it legal, `posture` what it is for.
    return hosts(Sign("posture", ("posture-ftrace",), ("svm_vcpu_run",)), undo=undo)


def attach_bpf(stage: Stage) -> Staged:
    undo = tamper_hooks.attach_bpf(stage.host)
    return hosts(Sign("posture", ("posture-bpf",), ("hostd_lab",)), undo=undo)


def claim_cid(stage: Stage) -> Staged:
    pid, undo = tamper_hooks.claim_cid(stage.host, FREE_CID)
    sign = Sign("guests", ("holder-unknown",), (f"pid {pid} ",))
    return Staged((sign,), undo, others=False, anew=False, within_s=HOLDERS_S)


def add_monitor(stage: Stage) -> Staged:
    """A second monitor of the machine, by libvirt's passthrough: whoever speaks to it owns the guest."""
    alice = stage.running.alice
    xml = alice.xml().replace("<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ")
    arguments = "<qemu:arg value='-qmp'/><qemu:arg value='tcp:127.0.0.1:4444,server=on,wait=off'/>"
    xml = xml.replace("</domain>", f"<qemu:commandline>{arguments}</qemu:commandline></domain>")
    stage.stop()
    stage.host.put(xml.encode(), "/root/alice.xml")
    stage.host.run(["virsh", "--quiet", "define /root/alice.xml; start alice"])
    alice.wait_up()
    stage.service.give_trust(alice)
    return Staged((Sign(f"domain:{alice.uuid}", ("domain-passthrough",), ("alice",)),))


def replace_firmware(stage: Stage) -> Staged:
    """QEMU reads the firmware as it starts, and the kernel measures what it reads."""
    good = stage.host.get(FIRMWARE)
    changed = good.replace(b"SeaBIOS", b"SeaBIOs", 1)
    assert changed != good
    stage.host.put(changed, f"{FIRMWARE}.new")
    stage.host.run(f"cp -p {FIRMWARE} {FIRMWARE}.good && mv {FIRMWARE}.new {FIRMWARE}")
    stage.stop()

    def undo() -> None:
        stage.host.run(["mv", f"{FIRMWARE}.good", FIRMWARE])

    stage.running.alice.start()
    stage.service.give_trust(stage.running.alice)
    return Staged((Sign("ima", ("ima-unknown",), (FIRMWARE,)),), undo, others=False)


def write_raw_block(stage: Stage) -> Staged:
    """On the disk, beneath the file system, while no machine runs and the measurer, which maps the file, was
    stopped: the file's times are the old ones, and the kernel does not measure it again."""
    stage.stop_all()
    offset = _quiet_place_in_file(stage)
    old, release = _write_unmapped(stage, offset, 0x33)

    def undo() -> None:
        stage.stop()
        release()
        _new, done = _write_unmapped(stage, offset, old)
        done()

    stage.running.alice.start()
    stage.service.give_trust(stage.running.alice)
    codes = ("file-unapproved", "file-altered")
    return Staged((Sign(stage.own, codes, (QEMU,)),), undo, others=False)


# ── hostd's own ───────────────────────────────────────────────────────────────────────────────────────


def write_own_text(stage: Stage) -> Staged:
    """The code of a role of hostd's, through its memory."""
    pid = stage.service.pid_of("metrics")
    python = stage.host.run(["readlink", "-f", f"/proc/{pid}/exe"]).text.strip()
    offset = tamper_hooks.write_text(stage.host, pid, python)

    def undo() -> None:
        stage.host.run(["systemctl", "restart", "hostd-metrics"])

    sign = Sign("self", ("code-altered",), (f"pid {pid} ", f"file offset {offset:#x}"))
    return Staged((sign,), undo, others=False, anew=False, within_s=OWN_S)


def alter_own_file(stage: Stage) -> Staged:
    """A module that the next start would load."""
    path = stage.host.run("echo /opt/hostd/lib/python3*/site-packages/hostd/vault/gate.py").text.strip()
    stage.host.run(
        f"cp -p {path} /root/kept.py && cp -p {path} {path}.new && echo '# x' >> {path}.new"
        f" && mv {path}.new {path}"
    )

    def undo() -> None:
        stage.host.run(f"cp -p /root/kept.py {path}.new && mv {path}.new {path}")

    return Staged(
        (Sign("self", ("self-file-altered",), (path,)),), undo, others=False, anew=False, within_s=OWN_S
    )


def join_own_group(stage: Stage) -> Staged:
    """Another program in the control group of one of hostd's units."""
    command = stage.host.start(
        ["sh", "-c", f"echo $$ > {METRICS_GROUP}/cgroup.procs; echo in; exec sleep 3600"]
    )
    command.wait_for_line(0, 30.0)

    def undo() -> None:
        command.kill()
        command.wait(30.0, check=False)

    return Staged(
        (Sign("self", ("self-process-unknown",), ("sleep",)),), undo, others=False, anew=False, within_s=OWN_S
    )


# ── From outside ──────────────────────────────────────────────────────────────────────────────────────


def flip_text_from_outside(stage: Stage) -> Staged:
    offset, address = stage.quiet_text()
    flip = tamper_ram.flip_process(stage.host, stage.pid, address, 0x33)
    return hosts(Sign("files", ("file-altered",), (QEMU, f"file offset {offset:#x}")), undo=flip.put_back)


def flip_kernel_from_outside(stage: Stage) -> Staged:
    address, new, at = _vcpu_run(stage)
    flip = tamper_ram.flip_kernel(stage.host, address, new)
    return hosts(Sign("kernel", TEXT, (f"svm_vcpu_run+{at:#x}",)), undo=flip.put_back)


# ── With a kernel module ──────────────────────────────────────────────────────────────────────────────


def load_module(stage: Stage) -> Staged:
    tamper = Tamper(stage.host)
    tamper.load()

    def undo() -> None:
        tamper.unload()
        stage.accept_taint(TAINTS)

    return hosts(
        Sign("posture", ("posture-module",), (NAME,)),
        Sign("posture", ("posture-taint",), ("taint",)),
        undo=undo,
    )


def flip_text_by_module(stage: Stage) -> Staged:
    offset, _address = stage.quiet_text()
    return _by_module(
        stage,
        lambda tamper: tamper.flip_page(QEMU, offset, 0x02),
        Sign("files", ("file-altered",), (QEMU, f"file offset {offset:#x}")),
    )


def patch_vcpu_run(stage: Stage) -> Staged:
    address, new, at = _vcpu_run(stage)
    change = new ^ tamper_ram.read_kernel(stage.host, address, 1)[0]
    return _by_module(
        stage,
        lambda tamper: tamper.flip_text(address, change),
        Sign("kernel", TEXT, (f"svm_vcpu_run+{at:#x}",)),
    )


def patch_system_calls(stage: Stage) -> Staged:
    # 335 is unused: sys_ni_syscall, wherever it leads.
    table = tamper_ram.symbols(stage.host, "sys_call_table")["sys_call_table"]
    return _by_module(
        stage,
        lambda tamper: tamper.flip_text(table + 8 * 335, 0x10),
        Sign("kernel", ("kernel-rodata-altered", "kernel-table-altered"), ("sys_call_table",)),
    )


def _by_module(stage: Stage, change: Callable[[Tamper], None], sign: Sign) -> Staged:
    """The module does it and is gone again: what is left is the taint that was accepted, and the byte."""

    def do() -> None:
        tamper = Tamper(stage.host)
        tamper.load()
        change(tamper)
        tamper.unload()

    do()
    return hosts(sign, undo=do)


def _write_unmapped(stage: Stage, offset: int, byte: int) -> tuple[int, Callable[[], None]]:
    stage.host.run(["systemctl", "stop", "hostd-measurer"])
    try:
        return tamper_hooks.write_raw(stage.host, QEMU, offset, byte)
    finally:
        stage.host.run(["systemctl", "start", "hostd-measurer"])


def _quiet_place_in_file(stage: Stage) -> int:
    """That instruction's file offset, when no machine runs."""
    script = (
        f"data = open('{QEMU}', 'rb').read()\n"
        "at = data.find(bytes.fromhex('31c0c30f1f'), len(data) // 2)\n"
        "print(at)"
    )
    return int(stage.host.run(["python3", "-c", script]).text)


def _vcpu_run(stage: Stage) -> tuple[int, int, int]:
    """Address, new value and offset of a byte of svm_vcpu_run that may be changed while it runs."""
    start = tamper_ram.symbols(stage.host, "svm_vcpu_run")["svm_vcpu_run"]
    at, new = tamper_ram.harmless(tamper_ram.read_kernel(stage.host, start, 32))
    return start + at, new, at


ATTACKS = [
    Attack("text of QEMU written through /proc/PID/mem", write_text),
    Attack("uprobe in QEMU", probe_hypervisor),
    Attack("kprobe in the kernel", probe_kernel),
    Attack("function tracer on svm_vcpu_run", trace_kernel),
    Attack("BPF program attached", attach_bpf),
    Attack("CID taken by a program that is no hypervisor", claim_cid),
    Attack("second monitor by libvirt passthrough", add_monitor),
    Attack("firmware ROM replaced", replace_firmware),
    Attack("text of a role of hostd written", write_own_text),
    Attack("file of hostd replaced", alter_own_file),
    Attack("program in the control group of a role", join_own_group),
    Attack("block of QEMU's file written on the raw disk", write_raw_block),
    Attack("text of QEMU changed in RAM from outside", flip_text_from_outside),
    Attack("svm_vcpu_run changed in RAM from outside", flip_kernel_from_outside),
    Attack("unsigned kernel module loaded", load_module),
    Attack("page cache of QEMU changed by the module", flip_text_by_module),
    Attack("svm_vcpu_run patched by the module", patch_vcpu_run),
    Attack("sys_call_table patched by the module", patch_system_calls),
]


@pytest.fixture
def stage(running: Running) -> Iterator[Stage]:
    made = Stage(running)
    yield made
    made.close()


def test_every_attack_is_found_named_and_refused(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: list[Outcome] = []
    for attack in ATTACKS:
        outcomes.append(attempt(stage, attack, before=outcomes[-1] if outcomes else None))
    with capsys.disabled():
        print(f"\n{report(outcomes)}")
    assert not [outcome.name for outcome in outcomes if not outcome.good]
    stage.service.ctl("ledger", "verify")
