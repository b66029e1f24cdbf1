"""Promise: what happens on a healthy KVM host raises nothing, while guests keep asking."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.lab.asking import Asking
from tests.lab.stage import Stage
from tests.support.innocents import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from qemu.host import LabHost
    from tests.lab.conftest import Running

TRACING = "/sys/kernel/tracing"
VISITORS = 50
VISIT_S = 900.0
"""For all of them, on a slow machine."""
VISITOR = """\
<domain type='kvm'><name>visitor-{number}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
<cpu mode='host-passthrough'/>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/>
<memballoon model='none'/></devices></domain>
"""
PACKAGED = (
    *("/usr/bin/qemu-system-x86_64", "/usr/lib/x86_64-linux-gnu/libpixman-1.so.0"),
    *("/usr/share/seabios/bios-256k.bin", "/usr/share/seabios/vgabios-stdvga.bin"),
)


def test_a_storm_of_legitimate_events_raises_nothing(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = Tally()
    roles = {role: running.service.pid_of(role) for role in ("measurer", "vault", "gateway", "metrics")}
    with Asking(running) as asking:
        for kind, number, event in _events(running.host):
            event()
            tally.add(kind, number)
            with capsys.disabled():
                print(f"{time.monotonic() - asking.began:6.0f} s {kind}: {len(asking.refused)} refused")
        asking.answered_once_more()
    stage = Stage(running)
    findings = stage.drift()
    with capsys.disabled():
        print(f"\n{tally.report(len(findings), asking.answers)}; refused {asking.refused}")
    assert findings == []
    assert asking.refused == []
    assert asking.answers > 20
    assert {role: running.service.pid_of(role) for role in roles} == roles, "a role died"
    running.service.ctl("ledger", "verify")


def _events(host: LabHost) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(what, how often, how): each is done by one command in the host."""

    def shell(line: str) -> Callable[[], object]:
        return lambda: host.run(line, 300.0)

    for system in ("kvm", "sched", "syscalls"):
        enable = f"{TRACING}/events/{system}/enable"
        yield (
            f"all tracepoints of {system} switched on and off",
            10,
            shell(f"for i in $(seq 5); do echo 1 > {enable}; sleep 0.2; echo 0 > {enable}; done"),
        )
    for key in ("kernel.sched_schedstats", "kernel.timer_migration"):
        yield (
            f"static key switched: {key}",
            40,
            shell(f"was=$(sysctl -n {key}); for i in $(seq 20); do sysctl -q {key}=1; sysctl -q {key}=0;"
                  f" done; sysctl -q {key}=$was"),
        )  # fmt: skip
    yield "perf counter opened (static keys of perf)", 20, _perf(host)
    yield (
        "memory compacted, caches dropped",
        20,
        shell("cd /proc/sys/vm; for i in $(seq 10); do echo 1 > compact_memory; echo 3 > drop_caches;"
              " sleep 0.2; done"),
    )  # fmt: skip
    yield (
        "swap switched on and off",
        4,
        shell("dd if=/dev/zero of=/swap bs=1M count=64 status=none; chmod 600 /swap; mkswap /swap >/dev/null;"
              " for i in 1 2; do swapon /swap; sleep 1; swapoff /swap; done; rm /swap"),
    )  # fmt: skip
    yield "memory of machines reclaimed by the kernel", 2, shell(_RECLAIM)
    yield (
        "same pages merged and parted (KSM)",
        2,
        shell("cd /sys/kernel/mm/ksm && echo 1000 > pages_to_scan && echo 1 > run && sleep 5 && echo 2 > run"
              " && echo 0 > run"),
    )  # fmt: skip
    yield (
        "new file executed outside protected paths",
        50,
        shell("for i in $(seq 50); do cp /bin/true /root/new-$i; echo $i >> /root/new-$i; /root/new-$i;"
              " rm /root/new-$i; done"),
    )  # fmt: skip
    yield "journal rotated", 3, shell("for i in 1 2 3; do journalctl -q --rotate; done")
    yield (
        "module of the baseline removed and loaded",
        10,
        shell("for i in $(seq 5); do rmmod vsock_loopback; modprobe vsock_loopback; done"),
    )
    yield "file of QEMU's packages installed again", len(PACKAGED), shell(_REINSTALL)
    yield "libvirtd restarted", 1, shell("systemctl restart libvirtd")
    yield "machine of libvirt started and stopped", VISITORS, _visitors(host)


# As dpkg does: a new file beside the old one, then renamed over it, while machines run on the old one.
_REINSTALL = f"""
for name in {" ".join(PACKAGED)}; do
  file=$(readlink -f $name) && cp -p $file $file.dpkg-new && mv $file.dpkg-new $file || exit 1
done
"""
_RECLAIM = """
for group in $(find /sys/fs/cgroup/machine.slice -name memory.reclaim | grep emulator -v | head -2); do
  echo 64M > $group || true
done
"""
_PERF = """
import ctypes, struct, os
libc = ctypes.CDLL(None, use_errno=True)
for _ in range(20):
    # perf_event_open(2): PERF_TYPE_SOFTWARE, size of the structure, PERF_COUNT_SW_CONTEXT_SWITCHES
    attributes = ctypes.create_string_buffer(struct.pack("<IIQ", 1, 128, 3), 128)
    fd = libc.syscall(298, attributes, 0, -1, -1, 0)
    assert fd >= 0, ctypes.get_errno()
    os.close(fd)
"""


def _perf(host: LabHost) -> Callable[[], object]:
    return lambda: host.run(["python3", "-c", _PERF])


def _visitors(host: LabHost) -> Callable[[], object]:
    """Machines that nobody asks for; two at a time. They are left paused: the emulated SVM has panicked the
    host's kernel when many ran at once, and what they would do is nobody's concern here."""

    def come_and_go() -> None:
        for number in range(2):
            host.put(VISITOR.format(number=number).encode(), f"/root/visitor-{number}.xml")
        once = "virsh --quiet create --paused /root/visitor-$1.xml && virsh --quiet destroy visitor-$1"
        line = f"f() {{ for i in $(seq {VISITORS // 2}); do {once} || return 1; done; }}; "
        host.run(f"{line} f 0 & first=$!; f 1 || exit 1; wait $first", VISIT_S)

    return come_and_go
