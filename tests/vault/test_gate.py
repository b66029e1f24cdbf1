"""The gate's rules, one by one. What follows from all of them together is `test_gate_model.py`."""

from __future__ import annotations

import time

import pytest

from guestlib.errors import DeadlineError, OverloadedError, RefusedDriftError, UnavailableError
from hostd.core.callers import Caller
from hostd.core.findings import (
    BOOT,
    FILES,
    GUESTS,
    IMA,
    POSTURE,
    Component,
    Kind,
    Status,
    domain_of,
    process_of,
    relro_of,
)
from hostd.vault.gate import HOST_COMPONENTS, STANDING, Gate
from hostd.vault.observers import MAX_PER_CALLER
from hostd.vault.shares import ABOUT_NS, HOLD_NS, PART
from tests.vault.support_gate import (
    HOST,
    OFFICER,
    REQUIRABLE,
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

PROCESS_A, PROCESS_B = process_of(VM_A), process_of(VM_B)
DOMAIN_A, RELRO_A = domain_of(VM_A), relro_of(VM_A)
BAD = [Status.DRIFTED, Status.ABSENT, Status.PENDING]

# ── What a caller rests on ────────────────────────────────────────────────────────────────────────


def test_needs() -> None:
    gate = make_gate()
    assert frozenset(HOST) == HOST_COMPONENTS
    assert gate.needs(A) == {*HOST, *of_vm(VM_A)}
    assert gate.needs(OFFICER) == {*HOST}
    assert gate.needs(USER) == {*HOST, *of_vm(VM_A, VM_B)}


@pytest.mark.parametrize("caller", [A, USER, OFFICER], ids=str)
def test_each_needed_component_has_to_be_read_after_the_arrival(caller: Caller) -> None:
    for stale in make_gate().needs(caller):
        gate = make_gate()
        asked = request(caller, arrived=100)
        gate.arrive(asked)
        fresh = gate.needs(caller) - {stale}
        read(gate, *fresh, at=100)
        assert taken(gate) == []
        read(gate, stale, at=99, ended=500)
        if stale.kind in STANDING:
            assert taken(gate) == [asked]
            continue
        assert taken(gate) == []
        read(gate, stale, at=100)
        assert taken(gate) == [asked]


def test_a_standing_reading_holds_for_a_while_and_only_if_it_is_good() -> None:
    gate = make_gate(standing_ns=50)
    gate.arrive(request(A, arrived=100))
    read_all(gate, at=100)
    read(gate, DOMAIN_A, at=49)
    assert taken(gate) == []
    read(gate, DOMAIN_A, at=50, status=Status.PENDING)
    assert taken(gate) == []
    read(gate, DOMAIN_A, at=50)
    assert len(taken(gate)) == 1


def test_others_processes_do_not_matter_to_a_vm() -> None:
    gate = make_gate()
    gate.arrive(request(A, arrived=100))
    read_all(gate, at=100, vms=(VM_A,))
    assert len(taken(gate)) == 1


@pytest.mark.parametrize("status", BAD)
@pytest.mark.parametrize("component", [*HOST, *of_vm(VM_A)], ids=str)
def test_only_verified_is_good(component: Component, status: Status) -> None:
    gate = make_gate(require=frozenset(Kind))
    read_all(gate, at=5)
    gate.arrive(request(A, arrived=10))
    read_all(gate, at=10)
    read(gate, component, at=11, status=status)
    assert taken(gate) == []


@pytest.mark.parametrize("component", [GUESTS, process_of(VM_A)], ids=str)
def test_who_is_who_is_always_required(component: Component) -> None:
    """Otherwise a list of machines that is no longer read would go on saying which process a VM is."""
    gate = make_gate(require=frozenset())
    read_all(gate, at=5)
    gate.arrive(request(A, 8))
    read_all(gate, at=10)
    assert not gate.acceptable(component, Status.ABSENT)
    assert len(read(gate, component, at=11, status=Status.ABSENT)) == 1
    assert taken(gate) == []


@pytest.mark.parametrize("component", sorted(HOST_COMPONENTS - {GUESTS} | {RELRO_A, DOMAIN_A}), ids=str)
def test_absent_is_enough_only_where_it_is_not_required(component: Component) -> None:
    gate = make_gate(require=REQUIRABLE - {component.kind})
    gate.arrive(request(A, arrived=10))
    read_all(gate, at=10)
    assert read(gate, component, at=11, status=Status.ABSENT) == []
    assert len(taken(gate)) == 1
    gate.arrive(request(A, arrived=20))
    read_all(gate, at=20)
    read(gate, component, at=21, status=Status.PENDING)
    assert taken(gate) == []


def test_a_process_is_never_acceptable_as_absent() -> None:
    gate = make_gate(require=frozenset())
    assert not gate.acceptable(PROCESS_A, Status.ABSENT)
    asked = request(A, arrived=10)
    gate.arrive(asked)
    read_all(gate, at=10)
    ((refused, error),) = read(gate, PROCESS_A, at=11, status=Status.ABSENT)
    assert refused is asked
    assert isinstance(error, UnavailableError)


def test_absent_and_required_refuses_those_who_waited_for_this_reading() -> None:
    gate = make_gate()
    early, late, other = request(A, arrived=10), request(A, arrived=30), request(B, arrived=10)
    for asked in (early, late, other):
        gate.arrive(asked)
    refused = read(gate, PROCESS_A, at=20, status=Status.ABSENT)
    assert [(r is early, type(e)) for r, e in refused] == [(True, UnavailableError)]
    refused = read(gate, IMA, at=20, status=Status.ABSENT)
    assert [r for r, _ in refused] == [other]
    assert gate.waiting == 1
    read_all(gate, at=30)
    assert taken(gate) == [late]


def test_the_vm_is_the_process_that_the_channel_was_bound_to() -> None:
    """The same VM started again, as another process, is not the old channel's caller."""
    for other in (hypervisor(VM_A, pid=101), hypervisor(VM_A, start_time=2)):
        gate = make_gate()
        gate.arrive(request(A, arrived=10))
        gate.guests([other, hypervisor(VM_B)])
        read_all(gate, at=10)
        assert taken(gate) == []
        mine = request(caller_of(other), arrived=10)
        gate.arrive(mine)
        assert taken(gate) == [mine]


def test_a_vm_that_is_gone_executes_nothing() -> None:
    gate = make_gate()
    gate.arrive(request(A, arrived=10))
    gate.guests([hypervisor(VM_B)])
    read_all(gate, at=10)
    assert taken(gate) == []


def test_a_process_that_went_away_takes_its_stamp_with_it() -> None:
    gate = make_gate()
    read_all(gate, at=10)
    gate.guests([hypervisor(VM_B)])
    assert PROCESS_A not in gate.stamps
    assert PROCESS_B in gate.stamps
    gate.guests([hypervisor(VM_A), hypervisor(VM_B)])
    gate.arrive(request(A, arrived=10))
    assert taken(gate) == []
    assert gate.hypervisor(VM_A) == hypervisor(VM_A)
    assert gate.hypervisor("another") is None


def test_a_host_callers_needs_follow_the_vms() -> None:
    gate = make_gate(vms=(VM_A,))
    gate.arrive(request(USER, arrived=10))
    read_all(gate, at=10, vms=(VM_A,))
    gate.guests([hypervisor(VM_A), hypervisor(VM_B)])
    assert taken(gate) == []
    read(gate, *of_vm(VM_B), at=10)
    assert len(taken(gate)) == 1


# ── Shut ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_gate_starts_shut_and_a_shut_gate_gives_nothing() -> None:
    fresh = Gate(require=frozenset(), host_scope=False, waiting_per_caller=1, batch=1)
    with pytest.raises(UnavailableError, match="starting"):
        fresh.arrive(request(OFFICER, arrived=0))
    gate = make_gate()
    asked = request(A, arrived=10)
    gate.arrive(asked)
    read_all(gate, at=10)
    gate.shut = "no TPM"
    assert taken(gate) == []
    with pytest.raises(UnavailableError, match="no TPM"):
        gate.arrive(request(A, arrived=11))
    gate.shut = None
    assert taken(gate) == [asked]


# ── Drift ─────────────────────────────────────────────────────────────────────────────────────────

AFFECTED = [
    (POSTURE, False, {A, B, USER, OFFICER}),
    (BOOT, False, {A, B, USER, OFFICER}),
    (PROCESS_A, False, {A, USER}),
    (PROCESS_A, True, {A, B, USER, OFFICER}),
]


@pytest.mark.parametrize(("component", "host_scope", "affected"), AFFECTED, ids=str)
def test_drift_closes_the_gate_to_all_that_rest_on_it(
    component: Component, host_scope: bool, affected: set[Caller]
) -> None:
    gate = make_gate(host_scope=host_scope)
    waiting = {c: request(c, arrived=10) for c in (A, B, USER, OFFICER)}
    for asked in waiting.values():
        gate.arrive(asked)
    refused = read(gate, component, at=11, status=Status.DRIFTED)
    assert {r.caller for r, _ in refused} == affected
    assert all(isinstance(e, RefusedDriftError) for _, e in refused)
    assert gate.latched == {component: (finding(component),)}
    assert gate.host_drifted() == (component is not PROCESS_A or host_scope)
    # A good reading afterwards opens nothing.
    read_all(gate, at=20)
    read(gate, component, at=20)
    assert {r.caller for r in taken(gate)} == set(waiting) - affected
    for caller in waiting:
        if caller in affected:
            assert gate.latched_for(caller) == component
            with pytest.raises(RefusedDriftError):
                gate.arrive(request(caller, arrived=21))
        else:
            gate.arrive(request(caller, arrived=21))


def test_drift_is_said_before_shut() -> None:
    gate = make_gate()
    gate.latch(POSTURE, (finding(POSTURE),))
    gate.shut = "locked"
    with pytest.raises(RefusedDriftError):
        gate.arrive(request(A, arrived=1))


def test_latched_between_arrival_and_take() -> None:
    """`take` looks itself: nobody need have removed the request."""
    gate = make_gate()
    gate.arrive(request(A, arrived=10))
    read_all(gate, at=10)
    gate._latched[PROCESS_A] = ()
    assert taken(gate) == []


def test_after_clearing_a_new_reading_is_needed() -> None:
    gate = make_gate()
    read_all(gate, at=10)
    gate.latch(POSTURE, (finding(POSTURE),))
    assert gate.clear(POSTURE)
    assert not gate.clear(POSTURE)
    assert gate.latched == {}
    assert not gate.host_drifted()
    asked = request(A, arrived=10)
    gate.arrive(asked)
    assert taken(gate) == []
    read(gate, POSTURE, at=11)
    assert taken(gate) == [asked]


def test_the_loss_of_the_measurer_leaves_no_stamp_and_every_drift() -> None:
    gate = make_gate()
    read_all(gate, at=10)
    gate.latch(PROCESS_B, (finding(PROCESS_B),))
    gate.lose_measurer()
    assert gate.stamps == {}
    assert gate.hypervisors == ()
    assert PROCESS_B in gate.latched
    gate.arrive(request(OFFICER, arrived=5))
    assert taken(gate) == []


# ── Waiting, batches, turns ───────────────────────────────────────────────────────────────────────


def test_a_callers_bound() -> None:
    gate = make_gate(waiting_per_caller=3)
    for _ in range(3):
        gate.arrive(request(A, arrived=10))
    with pytest.raises(OverloadedError, match="3 requests"):
        gate.arrive(request(A, arrived=10))
    gate.arrive(request(B, arrived=10))
    assert gate.waiting == 4
    read_all(gate, at=10)
    assert len(taken(gate)) == 4
    gate.arrive(request(A, arrived=10))


def test_one_callers_flood_does_not_keep_another_waiting() -> None:
    gate = make_gate(batch=64)
    for _ in range(100):
        gate.arrive(request(A, arrived=10, deadline=2 * ABOUT_NS))
    single = request(B, arrived=10)
    gate.arrive(single)
    read_all(gate, at=10)
    assert taken(gate) == [single]
    # The other may ask again: as long as he is about, he waits behind no more than that.
    assert len(taken(gate)) == 64 // PART
    assert len(taken(gate, ABOUT_NS + 11)) == 64


def test_who_floods_waits_for_who_does_not_and_not_for_long() -> None:
    gate = make_gate(batch=64)
    for _ in range(100):
        gate.arrive(request(A, arrived=10, deadline=2 * HOLD_NS))
    gate.arrive(request(B, arrived=10))
    read_all(gate, at=10, vms=(VM_A,))  # only those of the one who floods
    assert taken(gate, 11) == []
    assert taken(gate, 10 + HOLD_NS) == []
    assert [r.caller for r in taken(gate, 11 + HOLD_NS)] == [A] * (64 // PART)
    # And again: at most so long for each of his batches.
    assert taken(gate, 12 + HOLD_NS) == []
    # Who is not asked now, since he has something under way, keeps nobody waiting.
    batch = gate.take(12 + HOLD_NS, {B})
    assert batch is not None
    assert {r.caller for r in batch[0]} == {A}


def test_who_is_not_asked_keeps_his_place() -> None:
    gate = make_gate()
    gate.arrive(request(A, arrived=10))
    gate.arrive(request(B, arrived=10))
    read_all(gate, at=10)
    without = gate.take(11, {A})
    assert without is not None
    assert [r.caller for r in without[0]] == [B]
    assert [r.caller for r in taken(gate)] == [A]


def test_more_callers_than_a_batch_holds_are_all_served_in_turn() -> None:
    users = [Caller(uid=uid) for uid in range(7)]
    gate = make_gate(batch=3, vms=())
    for user in users:
        for _ in range(4):
            gate.arrive(request(user, arrived=10))
    read_all(gate, at=10, vms=())
    turns = [[r.caller.uid for r in taken(gate)] for _ in range(7)]
    assert turns == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4], [5, 6, 0], [1, 2, 3], [4, 5, 6]]


def test_those_who_cannot_yet_do_not_hold_up_the_others() -> None:
    gate = make_gate(batch=2)
    for caller in (A, A, B, B):
        gate.arrive(request(caller, arrived=10))
    read_all(gate, at=10, vms=(VM_B,))
    assert [r.caller for r in taken(gate)] == [B]
    assert [r.caller for r in taken(gate)] == [B]
    read(gate, *of_vm(VM_A), at=10)
    assert [r.caller for r in taken(gate)] == [A]
    assert [r.caller for r in taken(gate)] == [A]


def test_first_come_first_served_within_a_caller() -> None:
    gate = make_gate()
    asked = [request(A, arrived=10 + i) for i in range(5)]
    for one in asked:
        gate.arrive(one)
    read_all(gate, at=12)
    assert [r is a for r, a in zip(taken(gate), asked[:3], strict=True)] == [True] * 3


def test_a_request_past_its_deadline_is_not_taken_and_expires_once() -> None:
    gate = make_gate()
    late, good = request(A, arrived=10, deadline=50), request(B, arrived=10, deadline=51)
    gate.arrive(late)
    gate.arrive(good)
    read_all(gate, at=10)
    assert taken(gate, now=50) == [good]
    assert gate.expired(49) == []
    (expired,) = gate.expired(50)
    assert expired.request is late
    assert isinstance(expired.error, DeadlineError)
    assert gate.expired(50) == []
    assert gate.waiting == 0


def test_drop_and_leave() -> None:
    gate = make_gate()
    gate.arrive(request(A, arrived=10))
    gate.arrive(request(B, arrived=10))
    gate.observe(request(A, arrived=10))
    gate.drop(A)
    read_all(gate, at=10)
    assert [r.caller for r in taken(gate)] == [B]
    assert len(gate.observed(11)) == 1
    gate.observe(request(A, arrived=10))
    gate.leave(A)
    assert gate.observed(11) == []
    gate.leave(A)


def test_the_pass_says_what_the_batch_rests_on() -> None:
    gate = make_gate()
    read_all(gate, at=5)
    gate.arrive(request(B, arrived=10))
    read(gate, GUESTS, at=10, ended=11)
    read(gate, POSTURE, IMA, at=12, ended=20)
    rest = {*HOST, *of_vm(VM_B)} - {GUESTS, POSTURE, IMA, domain_of(VM_B)}
    read(gate, *sorted(rest), at=13, ended=14)
    found = gate.take(0)
    assert found is not None
    _, passed = found
    assert (passed.number, passed.first_start, passed.last_end) == (1, 5, 20)
    assert {c for c, _ in passed.readings} == {*HOST, *of_vm(VM_B)}
    assert [c for c, _ in passed.readings] == sorted(c for c, _ in passed.readings)
    assert dict(passed.readings) == {c: s for c, s in gate.stamps.items() if c.vm != VM_A}
    numbers = [s.number for _, s in passed.readings]
    assert len(set(numbers)) == len(HOST) + 3
    assert gate.take(0) is None
    assert gate.passes == 1


# ── Observers ─────────────────────────────────────────────────────────────────────────────────────


def test_observers_see_good_and_bad_as_soon_as_all_is_read() -> None:
    gate = make_gate()
    gate.shut = "no keys"
    observer = request(A, arrived=10, deadline=1000)
    gate.observe(observer)
    read_all(gate, at=9)
    assert gate.observed(11) == []
    read(gate, *(c for c in HOST if c != IMA), RELRO_A, at=10)
    read(gate, IMA, at=10, status=Status.DRIFTED)
    assert gate.observed(11) == []
    read(gate, PROCESS_A, at=10, status=Status.PENDING)
    assert gate.observed(11) == []
    read(gate, PROCESS_A, at=11, status=Status.ABSENT)
    assert gate.observed(12) == [observer]
    assert gate.observed(12) == []


def test_an_observer_is_told_at_its_deadline_at_the_latest() -> None:
    gate = make_gate()
    observer = request(A, arrived=10, deadline=50)
    gate.observe(observer)
    assert gate.observed(49) == []
    assert gate.observed(50) == [observer]


def test_observers_are_bounded_by_caller() -> None:
    gate = make_gate()
    for _ in range(MAX_PER_CALLER):
        gate.observe(request(A, arrived=10))
    with pytest.raises(OverloadedError):
        gate.observe(request(A, arrived=10))
    gate.observe(request(B, arrived=10))


def test_the_last_good_reading_is_remembered_whatever_came_after() -> None:
    gate = make_gate()
    read_all(gate, at=10)
    read(gate, IMA, PROCESS_A, at=20, status=Status.PENDING)
    read(gate, FILES, at=30)
    assert (gate.last_good[IMA], gate.last_good[PROCESS_A], gate.last_good[FILES]) == (10, 10, 30)
    gate.guests([hypervisor(VM_B)])
    assert PROCESS_A not in gate.last_good


def test_many_observers_are_told_at_once() -> None:
    """Compared with each other they took the vault seconds, in which nobody was answered."""
    gate = make_gate()
    for uid in range(5000):
        gate.observe(request(Caller(uid=uid), arrived=10, deadline=50))
    began = time.thread_time()
    assert len(gate.observed(50)) == 5000
    assert time.thread_time() - began < 1.0


def test_what_was_read_of_a_machine_before_it_was_listed_is_of_another_process_perhaps() -> None:
    gate = make_gate(vms=())
    gate.arrive(request(A, arrived=10))
    read_all(gate, at=10, vms=(VM_A,))
    gate.guests([hypervisor(VM_A)])
    assert taken(gate) == []
    read(gate, *of_vm(VM_A), at=11)
    assert len(taken(gate)) == 1
