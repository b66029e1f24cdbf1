"""Callers, hypervisors and verdicts for tests of the gate and of what it drives."""

from __future__ import annotations

from guestlib.errors import HostdError
from hostd.core.callers import Caller
from hostd.core.findings import (
    BOOT,
    FILES,
    GUESTS,
    IMA,
    KERNEL,
    POSTURE,
    SELF,
    Component,
    Finding,
    Kind,
    Severity,
    Status,
    Verdict,
    domain_of,
    process_of,
    relro_of,
)
from hostd.core.readings import Hypervisor
from hostd.vault.gate import Gate
from hostd.vault.waiting import Waiting

VM_A, VM_B = "aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000002"
HOST = (GUESTS, BOOT, POSTURE, IMA, KERNEL, FILES, SELF)
REQUIRABLE = frozenset(Kind) - {Kind.GUESTS, Kind.PROCESS}


def hypervisor(vm: str, *, pid: int = 0, start_time: int = 1) -> Hypervisor:
    pid = pid or {VM_A: 100, VM_B: 200}.get(vm, 300)
    return Hypervisor(pid, start_time, 1000, vm, vm[:4], pid, "/usr/bin/qemu", "kvm", "libvirt")


def caller_of(h: Hypervisor) -> Caller:
    return Caller(vm=h.vm, pid=h.pid, start_time=h.start_time)


A, B = caller_of(hypervisor(VM_A)), caller_of(hypervisor(VM_B))
USER, OFFICER = Caller(uid=1000), Caller(uid=0, officer=True)


def of_vm(*vms: str) -> tuple[Component, ...]:
    """Every component of these VMs."""
    return tuple(component(vm) for vm in vms for component in (process_of, relro_of, domain_of))


def finding(component: Component) -> Finding:
    return Finding(str(component), "altered", Severity.CRITICAL, "thing", "this", "that")


def verdict(component: Component, status: Status) -> Verdict:
    return Verdict(component, status, (finding(component),) if status is Status.DRIFTED else ())


def make_gate(
    *,
    require: frozenset[Kind] = REQUIRABLE,
    host_scope: bool = False,
    waiting_per_caller: int = 100,
    batch: int = 100,
    vms: tuple[str, ...] = (VM_A, VM_B),
    sweep_ns: int = 160,
    standing_ns: int = 1000,
) -> Gate:
    """An open gate that knows the VMs and has read nothing yet."""
    gate = Gate(
        require=require,
        host_scope=host_scope,
        waiting_per_caller=waiting_per_caller,
        batch=batch,
        sweep_ns=sweep_ns,
        standing_ns=standing_ns,
    )
    gate.shut = None
    gate.guests(hypervisor(vm) for vm in vms)
    return gate


def request(caller: Caller, arrived: int, deadline: int = 10**9, item: object = None) -> Waiting:
    return Waiting(caller, arrived, deadline, item if item is not None else object())


def read(
    gate: Gate,
    *components: Component,
    at: int,
    status: Status = Status.VERIFIED,
    ended: int | None = None,
) -> list[tuple[Waiting, HostdError]]:
    """Readings that start at `at`, all judged alike; who was refused."""
    refused = []
    for component in components:
        refused += gate.judged(verdict(component, status), started=at, ended=at if ended is None else ended)
    return [(r.request, r.error) for r in refused]


def read_all(gate: Gate, *, at: int, vms: tuple[str, ...] = (VM_A, VM_B)) -> None:
    assert read(gate, *HOST, *of_vm(*vms), at=at) == []


def taken(gate: Gate, now: int = 0) -> list[Waiting]:
    found = gate.take(now)
    return [] if found is None else found[0]
