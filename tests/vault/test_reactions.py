"""The steps that follow a drift: in order, each recorded, whatever fails, whenever the vault is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestlib.errors import HostdError, NotFoundError, UnavailableError
from hostd.config import Config, Reaction
from hostd.config import Drift as Settings
from hostd.core.appraise_relro import RelroJudge
from hostd.core.callers import vm_principal
from hostd.core.codes import Code
from hostd.core.findings import (
    FILES,
    POSTURE,
    Component,
    Finding,
    Kind,
    Severity,
    Status,
    Verdict,
    process_of,
    relro_of,
)
from hostd.core.keys import State
from hostd.core.reacting import Step
from hostd.core.reading_hypervisor import Hypervisor
from hostd.core.reading_relro import RelroReading
from hostd.core.reference import Reference
from hostd.ipc.loop import Loop
from hostd.vault import reactions
from hostd.vault.custody import LOCKED
from hostd.vault.drift import AUTO_PAUSE_S, STANDS_S
from hostd.vault.ledger import Entry, Ledger
from hostd.vault.membership import Membership
from hostd.vault.store import StoreError
from tests.vault.support_drift import SimulatedTpm, Vault
from tests.vault.support_gate import VM_A, VM_B, finding
from tests.vault.support_keys import NOW, new_key

PROCESS = process_of(VM_A)
ALL_STEPS = (Step.LOCK, Step.SUSPEND_VM, Step.POISON)


@dataclass
class Machines:
    """Who suspends: as the measurer does it."""

    suspended: set[str] = field(default_factory=set)
    fails: bool = False
    asked: list[tuple[str, bool]] = field(default_factory=list)
    keep: list[Callable[[], None]] = field(default_factory=list)
    slow: bool = False

    def __call__(self, vm: str, on: bool, told: Callable[[bool, str], None], /) -> None:
        self.asked.append((vm, on))
        if self.slow:
            self.keep.append(lambda: self._do(vm, on, told))
        else:
            self._do(vm, on, told)

    def _do(self, vm: str, on: bool, told: Callable[[bool, str], None]) -> None:
        if self.fails:
            told(False, "libvirt does not answer")
            return
        (self.suspended.add if on else self.suspended.discard)(vm)
        told(True, "suspended" if on else "runs again")


class Bench:
    """Starts vaults on the same files, one after the other."""

    def __init__(self, folder: Path, loop: Loop) -> None:
        self.folder = folder
        self.loop = loop
        self.tpm = SimulatedTpm()
        self.machines = Machines()
        self.running: Vault | None = None

    def start(self, *steps: Step, kinds: tuple[Kind, ...] = (Kind.PROCESS,), **more: Any) -> Vault:
        self.stop()
        rules = (Reaction(kinds, steps),) if steps else ()
        config = Config(drift=Settings(reactions=(*rules, *more.pop("rules", ())), **more))
        vault = Vault(self.folder, self.loop, config, tpm=self.tpm, power=self.machines)
        if not vault.store.tenants():
            for tenant, vm in (("red", VM_A), ("blue", VM_B)):
                vault.store.add_tenant(tenant, NOW)
                Membership(vault.store, vault.keyring).bind(vm_principal(vm), tenant, NOW)
                for n in range(3):
                    number = n + (10 if tenant == "blue" else 1)
                    key = new_key(vault.keyring, tenant=tenant, number=number, versions=2)
                    vault.store.put_key(key)
            vault.store.commit()
        self.running = vault
        return vault

    def stop(self) -> None:
        if self.running is not None:
            self.running.close()
            self.running = None


@pytest.fixture
def bench(tmp_path: Path, loop: Loop) -> Iterator[Bench]:
    made = Bench(tmp_path, loop)
    yield made
    made.stop()


def entries(vault: Vault) -> list[Entry]:
    return list(vault.ledger.entries(0, 1000))


def said(vault: Vault, event: str = "reaction") -> list[tuple[str, str, str]]:
    return [(e.op, e.detail.split(" | ")[0], e.outcome) for e in entries(vault) if e.event == event]


def lines(vault: Vault, component: Component = PROCESS) -> dict[str, str]:
    return {str(line.step): line.outcome for line in vault.drift.reactions.lines(component)}


def states(vault: Vault, tenant: str) -> set[State]:
    return {v.state for key in vault.store.keys(tenant, "", 100) for v in key.versions}


def usable(vault: Vault, tenant: str) -> bool:
    key = vault.store.keys(tenant, "", 1)[0]
    try:
        vault.keyring.secret(key, key.versions[-1])
    except UnavailableError:
        return False
    return True


def test_every_step_runs_in_order_and_is_recorded_and_counted(bench: Bench) -> None:
    vault = bench.start(*ALL_STEPS, poison_pcr=12)
    vault.drift.shredding.choose("red", True)
    vault.store.commit()
    vault.find(PROCESS)
    steps = ["lock", "suspend-vm", "poison", "shred"]
    events = [(e.event, e.op) for e in entries(vault)]
    assert events == [
        *(("drift", str(PROCESS)), ("reaction", str(PROCESS)), ("reaction", str(PROCESS))),
        *(("reaction", str(PROCESS)), ("shred", "red"), ("reaction", str(PROCESS))),
    ]
    assert said(vault) == [(str(PROCESS), step, "done") for step in steps]
    assert entries(vault)[0].detail.startswith("then refuse, lock, suspend-vm, poison, shred for red | ")
    assert lines(vault) == dict.fromkeys(["refuse", *steps], "done")
    counted = {
        dict(s.labels)["step"]: dict(s.labels)["outcome"]
        for s in vault.counters.snapshot().counters
        if s.name == "hostd_reactions_total"
    }
    assert counted == dict.fromkeys(["refuse", *steps], "done")
    assert bench.tpm.poisons == 1
    assert bench.machines.suspended == {VM_A}
    assert not vault.keyring.unlocked
    assert states(vault, "red") == {State.DESTROYED}
    assert states(vault, "blue") == {State.ACTIVE, State.DEACTIVATED}


def test_without_rules_one_machine_is_refused_and_nothing_else(bench: Bench) -> None:
    vault = bench.start()
    vault.find(PROCESS)
    assert lines(vault) == {"refuse": "done"}
    assert vault.keyring.unlocked
    assert usable(vault, "red")
    assert not bench.machines.asked
    assert bench.tpm.poisons == 0


# ── lock ──────────────────────────────────────────────────────────────────────────────────────────


def test_lock_of_one_machine_takes_the_keys_of_its_tenant_alone(bench: Bench) -> None:
    vault = bench.start(Step.LOCK)
    assert usable(vault, "red")
    vault.find(PROCESS)
    assert not usable(vault, "red")
    assert usable(vault, "blue")
    assert vault.keyring.unlocked
    with pytest.raises(UnavailableError, match="drifted"):
        new_key(vault.keyring, tenant="red", number=99)
    vault = bench.start(Step.LOCK)
    assert not usable(vault, "red")
    assert usable(vault, "blue")
    assert vault.clear(PROCESS)
    assert usable(vault, "red")


def test_lock_follows_the_tenant_of_the_moment_of_the_drift(bench: Bench) -> None:
    vault = bench.start(Step.LOCK)
    vault.find(PROCESS)
    vault.store.unbind(vm_principal(VM_A))
    vault.store.commit()
    assert not usable(bench.start(Step.LOCK), "red")


def test_keys_stay_away_until_the_last_drift_that_locks_them(bench: Bench) -> None:
    vault = bench.start(Step.LOCK, kinds=(Kind.PROCESS, Kind.RELRO))
    vault.find(PROCESS)
    vault.find(relro_of(VM_A))
    vault.clear(PROCESS)
    assert not usable(vault, "red")
    vault.clear(relro_of(VM_A))
    assert usable(vault, "red")


# ── suspend-vm ────────────────────────────────────────────────────────────────────────────────────


def test_a_suspended_machine_is_resumed_when_all_its_drift_is_cleared(bench: Bench) -> None:
    vault = bench.start(Step.SUSPEND_VM, kinds=(Kind.PROCESS, Kind.RELRO))
    vault.find(PROCESS)
    vault.find(relro_of(VM_A))
    assert bench.machines.suspended == {VM_A}
    vault.clear(PROCESS)
    assert bench.machines.suspended == {VM_A}
    vault.clear(relro_of(VM_A))
    assert not bench.machines.suspended
    assert said(vault)[-1] == (VM_A, "resume-vm", "done")


def test_a_machine_whose_resume_failed_is_resumed_after_a_restart(bench: Bench) -> None:
    vault = bench.start(Step.SUSPEND_VM)
    vault.find(PROCESS)
    bench.machines.fails = True
    vault.clear(PROCESS)
    assert said(vault)[-1] == (VM_A, "resume-vm", "failed")
    bench.machines.fails = False
    vault = bench.start()
    assert not bench.machines.suspended
    assert said(vault)[-1] == (VM_A, "resume-vm", "done")
    asked = len(bench.machines.asked)
    bench.start()
    assert len(bench.machines.asked) == asked


def test_a_machine_that_is_cleared_before_it_was_suspended_runs_in_the_end(bench: Bench) -> None:
    vault = bench.start(Step.SUSPEND_VM, Step.POISON, poison_pcr=12)
    bench.machines.slow = True
    vault.find(PROCESS)
    vault.clear(PROCESS)
    for answer in bench.machines.keep:
        answer()
    assert bench.machines.asked == [(VM_A, True), (VM_A, False)]
    assert not bench.machines.suspended
    assert bench.tpm.poisons == 0, "what was cleared goes on no further"


def test_a_machine_that_drifts_again_before_it_was_resumed_stays_suspended(bench: Bench) -> None:
    vault = bench.start(Step.SUSPEND_VM)
    vault.find(PROCESS)
    bench.machines.fails = True
    vault.clear(PROCESS)
    bench.machines.fails = False
    vault.find(PROCESS)
    vault.drift.reactions.resume()
    assert bench.machines.suspended == {VM_A}


# ── Failures ──────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_step_holds_up_none_and_is_loud(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reactions, "RETRY_S", 0.01)
    vault = bench.start(*ALL_STEPS, poison_pcr=12)
    bench.machines.fails = bench.tpm.fails = True
    vault.drift.shredding.choose("red", True)
    vault.store.commit()
    vault.find(PROCESS)
    assert lines(vault) == {
        "refuse": "done",
        "lock": "done",
        "suspend-vm": "failed",
        "poison": "failed",
        "shred": "done",
    }
    assert vault.counters.snapshot().gauges[0].value == 2

    # It is tried again, and not said again, until it is done.
    while len(bench.machines.asked) < 4:
        bench.loop.run_once(1.0)
    assert said(vault).count((str(PROCESS), "suspend-vm", "failed")) == 1
    bench.machines.fails = bench.tpm.fails = False
    while set(lines(vault).values()) != {"done"}:
        bench.loop.run_once(1.0)
    assert said(vault)[-2:] == [(str(PROCESS), "suspend-vm", "done"), (str(PROCESS), "poison", "done")]
    assert vault.counters.snapshot().gauges[0].value == 0
    assert bench.tpm.poisons == 1


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_failed_step_is_done_after_a_restart_and_then_no_more(bench: Bench, restarts: int) -> None:
    vault = bench.start(*ALL_STEPS, poison_pcr=12)
    bench.machines.fails = bench.tpm.fails = True
    vault.find(PROCESS)
    bench.machines.fails = bench.tpm.fails = False
    for _ in range(restarts):
        # What was decided counts, not what is configured now.
        vault = bench.start()
    assert set(lines(vault).values()) == {"done"}
    assert bench.tpm.poisons == 1
    assert bench.machines.suspended == {VM_A}
    assert not vault.keyring.unlocked
    assert vault.shut["keys"] == LOCKED


def test_a_ledger_that_cannot_be_written_stops_no_step_but_shred(bench: Bench) -> None:
    vault = bench.start(*ALL_STEPS, poison_pcr=12)
    vault.drift.shredding.choose("red", True)
    vault.store.commit()
    vault.fill_disk()
    vault.find(PROCESS)
    assert lines(vault)["shred"] == "failed"
    assert State.DESTROYED not in states(vault, "red"), "no key is destroyed that nobody says so of"
    assert not vault.keyring.unlocked
    assert bench.tpm.poisons == 1
    assert bench.machines.suspended == {VM_A}
    # Said as soon as it can be, and nothing is done twice.
    vault = bench.start()
    assert [e.event for e in entries(vault)][:1] == ["drift"]
    assert {step for _, step, outcome in said(vault) if outcome == "done"} == {
        *("lock", "suspend-vm", "poison", "shred")
    }
    assert bench.tpm.poisons == 1
    assert states(vault, "red") == {State.DESTROYED}
    count = vault.ledger.size
    assert bench.start().ledger.size == count


def test_a_store_that_cannot_be_written_stops_no_step_but_shred(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = bench.start(*ALL_STEPS, poison_pcr=12)
    vault.drift.shredding.choose("red", True)
    vault.store.commit()

    def full(*_: object) -> None:
        raise StoreError("disk I/O error")

    for name in ("set_meta", "put_drift", "put_key"):
        monkeypatch.setattr(vault.store, name, full)
    vault.find(PROCESS)
    assert not vault.keyring.unlocked
    assert bench.tpm.poisons == 1
    assert bench.machines.suspended == {VM_A}
    assert lines(vault)["shred"] == "failed"
    assert vault.shut["store"] is not None
    # The ledger knows what was decided and what was done.
    vault = bench.start()
    assert set(lines(vault).values()) == {"done"}
    assert bench.tpm.poisons == 1
    assert states(vault, "red") == {State.DESTROYED}


def test_a_store_that_cannot_be_read_locks_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = bench.start()

    def broken(*_: object) -> None:
        raise StoreError("disk I/O error")

    for name in ("meta", "set_meta", "put_drift", "tenant_of"):
        monkeypatch.setattr(vault.store, name, broken)
    vault.find(FILES)
    assert FILES in vault.gate.latched
    assert not vault.keyring.unlocked
    monkeypatch.undo()


@pytest.mark.parametrize("row", [None, b"", b"\xc1", b"\x91\x01", msgspec.msgpack.encode({"open": 1})])
def test_a_damaged_row_is_made_good_from_the_ledger(bench: Bench, row: bytes | None) -> None:
    vault = bench.start(*ALL_STEPS, poison_pcr=12)
    bench.tpm.fails = True
    vault.find(PROCESS)
    vault.find(FILES)
    vault.store.set_meta("reactions", b"\x90" if row is None else row)
    vault.store.commit()
    bench.tpm.fails = False
    vault = bench.start()
    assert set(lines(vault).values()) == {"done"}
    assert bench.tpm.poisons == 1
    assert bench.machines.asked == [(VM_A, True)]
    assert lines(vault, FILES) == {"refuse": "done", "lock": "done"}
    assert vault.custody.held


def test_a_row_that_lost_steps_has_them_from_the_ledger(bench: Bench) -> None:
    vault = bench.start(*ALL_STEPS, poison_pcr=12)
    bench.tpm.fails = bench.machines.fails = True
    vault.find(PROCESS)
    less = reactions.Plan((Step.REFUSE,), "blue")
    row = reactions.Book({str(PROCESS): reactions.Work(less, (Step.REFUSE,))})
    vault.store.set_meta("reactions", msgspec.msgpack.encode(row))
    vault.store.commit()
    bench.tpm.fails = bench.machines.fails = False
    vault = bench.start()
    assert lines(vault) == dict.fromkeys(["refuse", "lock", "suspend-vm", "poison"], "done")
    assert bench.tpm.poisons == 1
    assert bench.machines.suspended == {VM_A}
    assert vault.drift.reactions.plan(PROCESS).tenant == "red"


def test_a_start_reads_a_bounded_part_of_the_ledger(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine's drift may be open for weeks, and the others work on."""
    monkeypatch.setattr(reactions, "MAX_HEARD", 8)
    vault = bench.start(Step.SUSPEND_VM)
    vault.find(PROCESS)
    for _ in range(40):
        vault.record("operation")
    vault.find(FILES)
    for _ in range(40):
        vault.record("operation")
    vault.store.set_meta("reactions", b"")
    vault.store.commit()
    bench.stop()
    read: list[int] = []
    stretch = Ledger.stretch

    def counted(ledger: Ledger, start: int, count: int) -> list[bytes]:
        found = stretch(ledger, start, count)
        read.extend(range(start, start + len(found)))
        return found

    monkeypatch.setattr(Ledger, "stretch", counted)
    vault = bench.start()
    assert len(read) == len(set(read)) == 16
    assert lines(vault) == {"refuse": "done", "suspend-vm": "done"}
    assert lines(vault, FILES) == {"refuse": "done", "lock": "done"}
    assert bench.machines.asked == [(VM_A, True)]


BOOK = msgspec.msgpack.encode(
    reactions.Book(
        {str(PROCESS): reactions.Work(reactions.Plan((Step.REFUSE, Step.POISON), "red"), (Step.REFUSE,))},
        (VM_B,),
    )
)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_row_or_none(raw: bytes) -> None:
    assert isinstance(reactions.read_book(raw), reactions.Book)


@given(st.integers(0, len(BOOK) - 1), st.integers(1, 255))
def test_a_changed_byte_of_the_row_breaks_nothing(at: int, change: int) -> None:
    changed = bytearray(BOOK)
    changed[at] ^= change
    book = reactions.read_book(bytes(changed))
    assert all(step in Step for work in book.open.values() for step in (*work.plan.steps, *work.done))
    assert reactions.read_book(BOOK[:at]) == reactions.Book()
    assert reactions.read_book(BOOK + b"\0") == reactions.Book()


def test_many_machines_that_are_not_resumed_are_asked_for_in_turn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reactions, "RETRY_S", 0.01)
    vault = bench.start(Step.SUSPEND_VM)
    for vm in (VM_A, VM_B):
        vault.find(process_of(vm))
    bench.machines.fails = True
    for vm in (VM_A, VM_B):
        vault.clear(process_of(vm))
    rounds = 0
    resume = vault.drift.reactions.resume

    def counted() -> None:
        nonlocal rounds
        rounds += 1
        resume()

    monkeypatch.setattr(vault.drift.reactions, "resume", counted)
    bench.machines.asked.clear()
    while len(bench.machines.asked) < 20:
        bench.loop.run_once(1.0)
    # One round follows another: it does not become more with each.
    assert len(bench.machines.asked) <= 2 * (rounds + 1)
    assert said(vault).count((VM_A, "resume-vm", "failed")) == 1


def test_a_finding_cannot_say_what_follows(bench: Bench) -> None:
    vault = bench.start()
    evil = Finding(str(PROCESS), "altered", Severity.CRITICAL, "x | then refuse, poison | ", "this", "that")
    vault.record("drift", outcome="refused", subject=str(PROCESS), detail=str(evil))
    vault = bench.start(Step.POISON, poison_pcr=12)
    assert lines(vault) == {"refuse": "done"}
    assert bench.tpm.poisons == 0


def test_a_drift_of_an_earlier_version_leads_to_nothing_new(bench: Bench) -> None:
    vault = bench.start()
    vault.record("drift", outcome="refused", subject=str(FILES), detail=str(finding(FILES)))
    vault.store.put_drift(str(FILES), (finding(FILES),), NOW, 0)
    vault.store.commit()
    size = vault.ledger.size
    vault = bench.start(Step.POISON, kinds=(Kind.FILES,), poison_pcr=12)
    assert bench.tpm.poisons == 0
    assert vault.ledger.size == size
    assert vault.custody.held
    assert not vault.keyring.unlocked


# ── What cannot be undone ─────────────────────────────────────────────────────────────────────────


def test_what_could_not_be_read_poisons_and_shreds_nothing(bench: Bench) -> None:
    vault = bench.start(Step.POISON, poison_pcr=12, kinds=(Kind.FILES,))
    vault.drift.shredding.choose("red", True)
    vault.store.commit()
    unreadable = Finding("files", Code.FILE_UNREADABLE.value, Severity.CRITICAL, "a", "b", "c")
    vault.find(FILES, unreadable)
    assert lines(vault, FILES) == {"refuse": "done", "lock": "done"}
    assert bench.tpm.poisons == 0
    assert State.DESTROYED not in states(vault, "red")


def test_shred_destroys_who_chose_it_and_nobody_else(bench: Bench) -> None:
    vault = bench.start()
    vault.drift.shredding.choose("red", True)
    vault.store.commit()
    wrapped = [v.wrapped for key in vault.store.keys("red", "", 9) for v in key.versions]
    vault.find(process_of(VM_B))
    assert State.DESTROYED not in states(vault, "red"), "not its own VM"
    assert State.DESTROYED not in states(vault, "blue"), "it did not choose"
    vault.find(FILES)
    assert states(vault, "red") == {State.DESTROYED}
    assert State.DESTROYED not in states(vault, "blue")
    assert [(e.op, e.detail) for e in entries(vault) if e.event == "shred"] == [
        ("red", "files drifted | 3 keys, by the tenant's own choice")
    ]
    # Irreversible: no byte of what was wrapped is left in any of the store's files.
    files = [p.read_bytes() for p in bench.folder.iterdir() if p.name.startswith("drift.sqlite")]
    assert files
    assert not any(old in content for old in wrapped for content in files)
    vault.clear(FILES)
    assert states(vault, "red") == {State.DESTROYED}


def test_the_choice_can_be_taken_back_and_is_nobody_elses(bench: Bench) -> None:
    vault = bench.start()
    shredding = vault.drift.shredding
    with pytest.raises(NotFoundError):
        shredding.choose("green", True)
    shredding.choose("red", True)
    shredding.choose("blue", True)
    shredding.choose("red", False)
    vault.store.commit()
    assert shredding.chosen(None) == ("blue",)
    assert shredding.chosen("red") == shredding.chosen("") == ()
    vault.find(PROCESS)
    assert State.DESTROYED not in states(vault, "red")
    vault.store.set_meta("on_drift_shred", b"\xc1")
    with pytest.raises(UnavailableError):
        shredding.chosen(None)


def test_a_shred_of_many_keys(bench: Bench) -> None:
    vault = bench.start()
    for number in range(100, 700):
        vault.store.put_key(new_key(vault.keyring, tenant="red", number=number))
    vault.drift.shredding.choose("red", True)
    vault.store.commit()
    vault.find(FILES)
    assert {key.state for key in vault.store.keys("red", "", 1000)} == {State.DESTROYED}
    assert any("603 keys" in e.detail for e in entries(vault))


# ── Recovery ──────────────────────────────────────────────────────────────────────────────────────


def judged(vault: Vault, component: Component, status: Status, *findings: Finding) -> None:
    verdict = Verdict(component, status, findings)
    vault.drift.judged(verdict, vault.found, cast("Any", vault.measuring))


def test_a_clean_reading_clears_what_is_configured_so_and_nothing_else(bench: Bench) -> None:
    vault = bench.start(recovery={Kind.POSTURE: "auto", Kind.FILES: "officer"})
    vault.find(POSTURE)
    vault.find(FILES)
    for status in (Status.PENDING, Status.ABSENT):
        judged(vault, POSTURE, status)
    assert vault.gate.latched.keys() == {POSTURE, FILES}
    judged(vault, POSTURE, Status.VERIFIED)
    judged(vault, FILES, Status.VERIFIED)
    assert vault.gate.latched.keys() == {FILES}
    (clear,) = [e for e in entries(vault) if e.event == "clear"]
    assert (clear.op, clear.principal) == ("posture", "")
    assert "clean reading" in clear.detail
    assert vault.measuring.restarts == 1
    assert POSTURE not in bench.start().gate.latched


def test_who_drifts_and_mends_himself_at_will_is_not_cleared_as_often(bench: Bench) -> None:
    """Each clear has everything measured anew and withholds the batch under way, also of all others."""
    vault = bench.start(recovery={Kind.PROCESS: "auto"})
    other = process_of(VM_B)
    for _ in range(50):
        for component in (PROCESS, other):
            vault.found(component, (finding(component),))
            judged(vault, component, Status.VERIFIED)
        vault.seconds += 1
    assert vault.measuring.restarts == 2
    assert vault.gate.latched.keys() == {PROCESS, other}
    vault.seconds = AUTO_PAUSE_S
    judged(vault, PROCESS, Status.VERIFIED)
    assert vault.gate.latched.keys() == {other}
    # An officer is not held up.
    vault.found(PROCESS, (finding(PROCESS),))
    vault.clear(PROCESS)
    assert vault.gate.latched.keys() == {other}


def test_by_default_a_clean_reading_clears_nothing(bench: Bench) -> None:
    vault = bench.start()
    vault.find(POSTURE)
    judged(vault, POSTURE, Status.VERIFIED)
    assert POSTURE in vault.gate.latched


def test_a_clean_reading_that_cannot_be_recorded_clears_nothing(bench: Bench) -> None:
    vault = bench.start(recovery={Kind.POSTURE: "auto"})
    vault.find(POSTURE)
    vault.fill_disk()
    judged(vault, POSTURE, Status.VERIFIED)
    assert POSTURE in vault.gate.latched
    assert not vault.keyring.unlocked


def test_a_warning_is_drift_where_it_is_configured(bench: Bench) -> None:
    relro = relro_of(VM_A)
    hypervisor = Hypervisor(7, 70, 64055, VM_A, "a", 7, "/usr/bin/qemu", "kvm", "proc")
    reading = RelroReading(hypervisor, (), ("/usr/lib/libx.so",), bytes(16), (), 0, 0)
    verdict = RelroJudge().appraise(relro, reading, Reference("hostd-reference/2", 1, 1, "h"))
    (warning,) = verdict.findings
    assert (warning.code, warning.severity) == (Code.RELRO_UNCOVERED, Severity.WARNING)
    vault = bench.start()
    judged(vault, relro, verdict.status, warning)
    assert not vault.gate.latched
    rule = Reaction((Kind.RELRO,), (Step.SUSPEND_VM,), Severity.WARNING)
    vault = bench.start(rules=(rule,), recovery={Kind.RELRO: "auto"})
    vault.gate.guests([hypervisor])
    for _ in range(2):
        judged(vault, relro, verdict.status, warning)
        vault.seconds += 0.9 * STANDS_S
        judged(vault, relro, verdict.status, warning)
        judged(vault, relro, verdict.status)
    judged(vault, relro, verdict.status, warning)
    vault.gate.guests([])
    judged(vault, POSTURE, Status.VERIFIED)
    vault.gate.guests([hypervisor])
    vault.seconds += STANDS_S
    assert not vault.gate.latched, "a machine that starts"
    judged(vault, relro, verdict.status, warning)
    vault.seconds += STANDS_S
    judged(vault, relro, verdict.status, warning)
    assert vault.gate.latched.keys() == {relro}
    assert bench.machines.suspended == {VM_A}
    judged(vault, relro, verdict.status, warning)
    assert vault.gate.latched.keys() == {relro}, "not clean"
    judged(vault, relro, Status.VERIFIED)
    assert not vault.gate.latched
    assert not bench.machines.suspended


def test_a_clear_that_the_store_cannot_take_clears_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = bench.start(Step.LOCK, Step.SUSPEND_VM)
    vault.find(PROCESS)

    def full(*_: object) -> None:
        raise StoreError("disk I/O error")

    monkeypatch.setattr(vault.store, "commit", full)
    with pytest.raises(HostdError):
        vault.clear(PROCESS)
    assert PROCESS in vault.gate.latched
    assert not usable(vault, "red")
    assert bench.machines.suspended == {VM_A}
