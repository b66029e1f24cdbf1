"""The kernel of the lab: all of it explained by its package, and by nothing else, whatever is switched on."""

from __future__ import annotations

import json

from tests.lab.conftest import Running

PYTHON = "/opt/hostd/bin/python3"
LIMIT = 400  # seconds; the comparison takes some 15 on an idle machine
LOOK = """
import json, subprocess, sys, time
from hostd.core.appraise_kernel import KernelJudge
from hostd.core.findings import KERNEL
from hostd.core.readings import Missing
from hostd.core.reference import Reference
from hostd.core.rule_kernel import propose_kernel
from hostd.measurer.kernel import KernelProbe

probe, judge, ENDS = KernelProbe(), KernelJudge(), time.monotonic() + 300

def parts():
    while time.monotonic() < ENDS:
        found = [probe.read(0)]
        while not isinstance(found[-1], Missing):
            if len(found) == found[0].parts:
                return found
            found.append(probe.read(len(found)))
        time.sleep(0.5)
    sys.exit(f"never ready: {found[-1]}")

rule = propose_kernel(parts())
reference = Reference(format="hostd-reference/2", version=1, created=0, host="lab", kernel=rule)

def look(step):
    subprocess.run(step, shell=True, check=True)
    verdicts = [judge.appraise(KERNEL, part, reference) for part in parts()]
    findings = [str(finding) for verdict in verdicts for finding in verdict.findings]
    claims = dict(verdicts[-1].claims)
    return {"step": step, "status": verdicts[-1].status, "claims": claims, "findings": findings}

# Those that both CPUs pass all the time are left out: emulation can hang at what is patched while it runs.
HOT = (
    "exceptions|initcall|ipi|irq|irq_matrix|irq_vectors|kmem|nmi|power|preemptirq|printk|raw_syscalls|rcu|sched"
    "|timer|tlb"
)
TOGGLE = (
    "cd /sys/kernel/tracing/events && for one in */; do case ${one%%/} in "
    f"{HOT}) ;; *) [ ! -e $one/enable ] || echo %d > $one/enable ;; esac; done"
)
said = [look(step) for step in (
    "mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing",
    TOGGLE % 1, TOGGLE % 0, "modprobe loop; modprobe -r loop; modprobe loop",
)]
print(json.dumps({"first_use": rule.first_use, "builds": len(rule.builds), "looks": said}))
"""


def test_every_byte_is_explained_by_a_package(running: Running) -> None:
    said = running.host.run([PYTHON, "-c", LOOK], timeout=LIMIT).text
    found = json.loads(said.splitlines()[-1])
    assert found["first_use"] == [], "everything that is loaded has a file"
    assert found["builds"] > 20
    for look in found["looks"]:
        print(look["step"], look["status"], look["claims"])
        assert look["findings"] == []
        assert look["status"] == "verified"
    quiet, traced, again, _ = found["looks"]
    assert int(traced["claims"]["sites changed"]) > int(quiet["claims"]["sites changed"]) + 1000
    assert int(again["claims"]["sites changed"]) < 1000


def test_what_a_pass_costs(running: Running) -> None:
    said = running.host.run([PYTHON, "-m", "hostd.measurer.kernel_bench", "5"], timeout=LIMIT).text
    figures = json.loads(said.splitlines()[-1])
    print("emulated:", figures)
    assert figures["kernel.megabytes"] > 18
    assert figures["kernel.parts"] <= 64
