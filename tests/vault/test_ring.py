"""What is read next: for those who wait, on hints, and in the sweep, idle or busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest

from hostd.core.findings import (
    FILES,
    GUESTS,
    IMA,
    KERNEL,
    POSTURE,
    SELF,
    Component,
    Kind,
    Status,
    domain_of,
    process_of,
    relro_of,
)
from hostd.vault.gate import Gate
from hostd.vault.ring import EARLY, HINT_PAUSE_NS, PENDING_PAUSE_NS, PENDING_SHARE, SHARE, draw
from tests.vault.support_gate import (
    HOST,
    OFFICER,
    USER,
    VM_A,
    VM_B,
    A,
    B,
    caller_of,
    finding,
    hypervisor,
    make_gate,
    of_vm,
    read,
    read_all,
    request,
    taken,
)

MS = 1_000_000
SWEEP = 5_000 * MS
PROCESS_A = process_of(VM_A)
EVERY = (*HOST, *of_vm(VM_A, VM_B))


def all_but(*busy: Component) -> Callable[[Component], bool]:
    return lambda component: component not in busy


def swept(*, vms: tuple[str, ...] = (VM_A, VM_B), at: int = 0) -> Gate:
    """A gate that has just read everything."""
    gate = make_gate(vms=vms, sweep_ns=SWEEP, standing_ns=4 * SWEEP)
    for component in (*HOST, *of_vm(*vms)):
        gate.ring.asked(component, at)
    read_all(gate, at=at, vms=vms)
    return gate


def ask(gate: Gate, now: int, *busy: Component) -> Component | None:
    return gate.next_reading(now, all_but(*busy))


# ── For those who wait ────────────────────────────────────────────────────────────────────────────


def test_nothing_is_asked_while_nobody_waits_and_nothing_is_due() -> None:
    gate = swept()
    assert ask(gate, 1) is None
    gate.arrive(request(A, arrived=0))
    assert ask(gate, 1) is None


def test_what_the_newest_request_still_lacks_the_longest_unasked_first() -> None:
    gate = swept()
    gate.arrive(request(A, arrived=0))
    gate.arrive(request(A, arrived=20))
    first = [KERNEL, FILES, IMA, PROCESS_A, relro_of(VM_A), POSTURE]
    rest = [c for c in (*HOST, *of_vm(VM_A)) if c not in first and c != domain_of(VM_A)]
    for now, component in enumerate(first + rest):
        gate.ring.asked(component, now)
    order = []
    for now in range(20, 20 + len(first) + len(rest)):
        component = ask(gate, now)
        assert component is not None
        order.append(component)
        read(gate, component, at=now)
    assert order == first + rest
    assert ask(gate, 50) is None
    assert len(taken(gate)) == 2


def test_a_component_is_read_once_at_a_time() -> None:
    gate = swept()
    gate.arrive(request(OFFICER, arrived=10))
    busy: list[Component] = []
    while (component := ask(gate, 10, *busy)) is not None:
        assert component not in busy
        busy.append(component)
    assert sorted(busy) == sorted(HOST)


def test_readings_are_asked_for_observers_and_not_for_the_latched() -> None:
    gate = swept()
    gate.arrive(request(A, arrived=10))
    gate._latched[PROCESS_A] = (finding(PROCESS_A),)
    assert ask(gate, 10) is None
    gate.observe(request(A, arrived=10))
    seen: list[Component] = []
    while (component := ask(gate, 10, *seen)) is not None:
        seen.append(component)
    assert set(seen) == {*HOST, *of_vm(VM_A)} - {domain_of(VM_A)}


def test_a_caller_whose_vm_is_not_on_the_list_has_the_list_read_again_and_not_at_once() -> None:
    gate = swept(vms=(VM_B,))
    gate.arrive(request(A, arrived=0))
    assert ask(gate, HINT_PAUSE_NS - 1) is None
    assert ask(gate, HINT_PAUSE_NS) == GUESTS
    read(gate, GUESTS, at=HINT_PAUSE_NS)
    assert ask(gate, 2 * HINT_PAUSE_NS - 1) is None
    gate.drop(A)
    assert ask(gate, 9 * HINT_PAUSE_NS) is None


def test_choosing_is_cheap_with_many_machines_waiting() -> None:
    """Each component is looked at a few times at most, however many wait."""
    many = tuple(f"{n:08x}-0000-4000-8000-00000000000a" for n in range(300))
    gate = swept(vms=many)
    for vm in many:
        gate.arrive(request(caller_of(hypervisor(vm)), arrived=1))
    looked = 0

    def takes(component: Component) -> bool:
        nonlocal looked
        looked += 1
        return component.kind is not None

    for now in range(2, 22):
        component = gate.next_reading(now, takes)
        assert component is not None
        read(gate, component, at=now)
    assert looked < 20 * len(gate.known)


def test_what_is_read_together_is_asked_for_together() -> None:
    many = tuple(f"{n:08x}-0000-4000-8000-00000000000a" for n in range(5))
    gate = swept(vms=many)
    for vm in many:
        gate.arrive(request(caller_of(hypervisor(vm)), arrived=1))
    # Even if the one was asked for later than the other, and later than those of other VMs.
    for vm in many[::-1]:
        gate.ring.asked(process_of(vm), 2)
    gate.ring.asked(IMA, 2)
    order = []
    now = 3
    while (component := ask(gate, now)) is not None:
        read(gate, component, at=now)
        order.append(component)
        now += 1
    for vm in many:
        assert order.index(relro_of(vm)) == order.index(process_of(vm)) + 1


def test_nobody_is_asked_for_only_because_of_the_other() -> None:
    """A `relro` that nobody lacks and that was read a moment ago is not read with its `process`."""
    gate = swept()
    gate.arrive(request(A, arrived=10))
    gate.ring.asked(relro_of(VM_A), 11)
    read(gate, relro_of(VM_A), at=11)
    order = []
    for now in range(12, 40):
        component = ask(gate, now)
        if component is not None:
            order.append(component)
            read(gate, component, at=now)
    assert process_of(VM_A) in order
    assert relro_of(VM_A) not in order


def test_the_sweep_reads_together_too() -> None:
    many = tuple(f"{n:08x}-0000-4000-8000-00000000000a" for n in range(5))
    gate = make_gate(vms=many, sweep_ns=SWEEP)
    now, order = 1, []
    while now < 3 * SWEEP:
        component = ask(gate, now)
        if component is None:
            now += SWEEP // 64
            continue
        order.append(component)
        read(gate, component, at=now)
        now += MS
    pairs = [(a, b) for a, b in pairwise(order) if a.kind is Kind.PROCESS]
    assert len(pairs) > 10
    assert all(b == relro_of(a.vm) for a, b in pairs)


# ── Of no use ─────────────────────────────────────────────────────────────────────────────────────


def test_relro_of_a_vm_whose_process_has_drifted_is_not_asked_for() -> None:
    """It is refused whatever its `relro` is; that of every other VM is read as ever."""
    gate = make_gate(sweep_ns=SWEEP, standing_ns=4 * SWEEP)
    gate.hint(relro_of(VM_A))
    read(gate, PROCESS_A, at=1, status=Status.DRIFTED)
    chance, asked, now = Random(5), Counter[Component](), 2
    while now < 5 * SWEEP:
        gate.hint(draw(gate.known, chance))
        gate.hint(relro_of(VM_A))
        if now % (SWEEP // 64) < MS:
            gate.observe(request(A, arrived=now, deadline=now + SWEEP))
            gate.observe(request(USER, arrived=now, deadline=now + SWEEP))
            gate.arrive(request(B, arrived=now, deadline=now + SWEEP))
        if (component := ask(gate, now)) is not None:
            asked[component] += 1
            status = Status.DRIFTED if component == PROCESS_A else Status.VERIFIED
            read(gate, component, at=now, status=status)
        gate.observed(now)
        taken(gate, now)
        now += MS
    assert asked[relro_of(VM_A)] == 0
    assert set(asked) == set(EVERY) - {relro_of(VM_A)}
    assert asked[relro_of(VM_B)] >= 5
    # Nothing is left that the vault would wake for every few milliseconds.
    quiet = swept()
    quiet.hint(relro_of(VM_A))
    read(quiet, PROCESS_A, at=1, status=Status.DRIFTED)
    quiet.hint(relro_of(VM_A))
    assert ask(quiet, HINT_PAUSE_NS) is None
    assert not quiet.ring.soon


def test_who_wants_to_see_does_not_wait_for_what_is_not_asked_for() -> None:
    gate = swept()
    read(gate, PROCESS_A, at=1, status=Status.DRIFTED)
    gate.observe(observer := request(A, arrived=10, deadline=SWEEP))
    seen: list[Component] = []
    for now in range(10, 40):
        if (component := ask(gate, now)) is not None:
            seen.append(component)
            status = Status.DRIFTED if component == PROCESS_A else Status.VERIFIED
            read(gate, component, at=now, status=status)
    assert set(seen) == {*HOST, PROCESS_A}
    assert gate.observed(40) == [observer]


@pytest.mark.parametrize("component", [relro_of(VM_A), domain_of(VM_A), FILES], ids=str)
def test_no_other_drift_withholds_anything(component: Component) -> None:
    gate = swept()
    read(gate, component, at=1, status=Status.DRIFTED)
    assert gate.ring.withheld == frozenset()


def test_once_cleared_it_is_read_before_an_answer() -> None:
    gate = swept()
    read(gate, PROCESS_A, at=1, status=Status.DRIFTED)
    # The machine is another process now; what drifted waits for an officer all the same.
    gate.guests([hypervisor(VM_A, pid=7), hypervisor(VM_B)])
    assert gate.ring.withheld == {relro_of(VM_A)}
    assert gate.clear(PROCESS_A)
    assert gate.ring.withheld == frozenset()
    gate.arrive(request(caller_of(hypervisor(VM_A, pid=7)), arrived=10))
    seen: list[Component] = []
    while (component := ask(gate, 10 + len(seen))) is not None:
        assert taken(gate, 10) == []
        read(gate, component, at=10 + len(seen))
        seen.append(component)
    assert relro_of(VM_A) in seen
    assert len(taken(gate, 100)) == 1


# ── Pending ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("pending", "behind"),
    [(PROCESS_A, {FILES, GUESTS}), (relro_of(VM_A), set()), (SELF, {FILES}), (IMA, set())],
    ids=str,
)
def test_what_a_pending_component_waits_for_is_read_too(pending: Component, behind: set[Component]) -> None:
    """Else a request that arrived before the files' reading and has it would wait for ever."""
    gate = swept()
    gate.arrive(request(A, arrived=0))
    read(gate, pending, at=5, status=Status.PENDING)
    gate.ring.asked(pending, 5)
    seen: list[Component] = []
    while (component := ask(gate, 5 + PENDING_PAUSE_NS, *seen)) is not None:
        seen.append(component)
    assert set(seen) == {pending, *behind}
    read(gate, *behind, at=6)
    assert ask(gate, 5 + 2 * PENDING_PAUSE_NS) == pending
    assert ask(gate, 5 + 2 * PENDING_PAUSE_NS) is None


def test_what_was_pending_is_not_read_again_at_once() -> None:
    gate = swept()
    gate.arrive(request(A, arrived=1))
    read_all(gate, at=1)
    read(gate, IMA, at=2, status=Status.PENDING)
    gate.ring.asked(IMA, 2)
    assert ask(gate, 2 + PENDING_PAUSE_NS - 1) is None
    assert gate.ring.soon
    assert ask(gate, 2 + PENDING_PAUSE_NS) == IMA
    # One that takes long to read does not keep its reader busy for nothing either.
    read(gate, IMA, at=2, ended=2 + 80 * MS, status=Status.PENDING)
    gate.ring.asked(IMA, 2)
    assert ask(gate, 2 + 79 * MS) is None
    assert ask(gate, 2 + 80 * MS) == IMA


# ── The sweep ─────────────────────────────────────────────────────────────────────────────────────


def test_the_sweep_revisits_everything_and_the_pending_sooner() -> None:
    gate = make_gate(sweep_ns=SWEEP)
    order = []
    while (component := ask(gate, 1000)) is not None:
        order.append(component)
        read(gate, component, at=1000)
    assert sorted(order) == sorted(EVERY)
    due = 1000 + SWEEP - SWEEP // EARLY
    assert ask(gate, due - 1) is None
    assert ask(gate, due, order[0]) == order[1]
    read(gate, PROCESS_A, at=due, status=Status.PENDING)
    gate.ring.asked(PROCESS_A, due)
    for component in EVERY:
        if component != PROCESS_A:
            gate.ring.asked(component, due)
    soon = due + (SWEEP - SWEEP // EARLY) // PENDING_SHARE
    assert ask(gate, soon - 1) is None
    assert ask(gate, soon) == PROCESS_A


def test_a_new_vm_is_swept_at_once() -> None:
    gate = swept(vms=(VM_A,))
    assert ask(gate, 1) is None
    gate.guests([*gate.hypervisors, *make_gate(vms=(VM_B,)).hypervisors])
    found = [ask(gate, 1) for _ in range(4)]
    assert set(found) == {*of_vm(VM_B), None}


def test_under_constant_load_of_one_vm_everything_else_is_read_within_the_sweep() -> None:
    """A request waits at every moment, and readings take a millisecond one after another."""
    many = tuple(f"{n:08x}-0000-4000-8000-00000000000a" for n in range(100))
    gate = swept(vms=(VM_A, *many))
    last: dict[Component, int] = dict.fromkeys((*HOST, *of_vm(VM_A, *many)), 0)
    answered, now = 0, 0
    while now < 3 * SWEEP:
        now += MS
        gate.arrive(request(A, arrived=now, deadline=now + SWEEP))
        component = ask(gate, now)
        assert component is not None
        read(gate, component, at=now)
        last[component] = now
        assert min(last.values()) > now - SWEEP, min(last, key=last.__getitem__)
        answered += len(taken(gate, now))
    assert answered > 3 * SWEEP // MS * 0.9


# ── Hints ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_hint_brings_a_reading_forward_once() -> None:
    gate = swept()
    gate.hint(PROCESS_A)
    now = HINT_PAUSE_NS
    assert ask(gate, now) == PROCESS_A
    assert ask(gate, now) is None


def test_a_hint_while_it_is_read_has_it_read_again() -> None:
    gate = swept()
    gate.ring.asked(IMA, MS)
    gate.hint(IMA)
    assert ask(gate, MS, IMA) is None
    assert gate.ring.soon
    assert ask(gate, MS + HINT_PAUSE_NS) == IMA


def test_a_hint_about_nothing_that_exists_is_nothing() -> None:
    gate = swept(vms=(VM_A,))
    gate.hint(process_of(VM_B))
    assert ask(gate, HINT_PAUSE_NS) is None


def test_a_vm_that_goes_takes_its_hints_along() -> None:
    gate = swept()
    gate.hint(process_of(VM_B))
    gate.guests(make_gate(vms=(VM_A,)).hypervisors)
    assert ask(gate, HINT_PAUSE_NS) is None
    gate.guests(make_gate().hypervisors)
    assert {ask(gate, HINT_PAUSE_NS) for _ in range(4)} == {*of_vm(VM_B), None}


def test_a_flood_of_hints_costs_a_bounded_share() -> None:
    gate = swept()
    asked: Counter[Component] = Counter()
    for now in range(0, 1000 * MS, MS):
        for component in EVERY:
            gate.hint(component)
        component_asked = ask(gate, now)
        if component_asked is not None:
            asked[component_asked] += 1
            read(gate, component_asked, at=now)
    assert set(asked) == set(EVERY)
    assert max(asked.values()) <= 1000 * MS // HINT_PAUSE_NS + 1


def test_hints_at_what_takes_long_to_read_cost_a_twentieth_of_the_time() -> None:
    gate = swept()
    read(gate, GUESTS, at=0, ended=20 * MS)
    gate.hint(GUESTS)
    assert ask(gate, 20 * 20 * MS - 1) is None
    assert ask(gate, 20 * 20 * MS) == GUESTS


def test_hints_do_not_starve_those_who_wait() -> None:
    gate = swept()
    hinted = served = 0
    for now in range(SWEEP // 2, SWEEP // 2 + 4000 * MS, MS):
        for vm in (VM_A, VM_B):
            gate.hint(process_of(vm))
            gate.hint(relro_of(vm))
        gate.arrive(request(OFFICER, arrived=now, deadline=now + SWEEP)) if gate.waiting < 50 else None
        component = ask(gate, now)
        assert component is not None
        hinted += component.vm != ""
        served += component.vm == ""
        read(gate, component, at=now)
        taken(gate, now)
    assert served >= (SHARE - 1) * hinted
    assert hinted > 0


# ── By lot ────────────────────────────────────────────────────────────────────────────────────────


def test_every_component_is_drawn_and_every_kind_alike() -> None:
    gate = make_gate(vms=tuple(f"{n:08x}-0000-4000-8000-00000000000a" for n in range(30)))
    chance = Random(7)
    drawn = Counter(draw(gate.known, chance) for _ in range(20_000))
    assert set(drawn) == gate.known
    kinds: Counter[str] = Counter()
    for component, times in drawn.items():
        kinds[component.kind] += times
    assert len(kinds) == 10
    assert max(kinds.values()) < 1.2 * min(kinds.values())
