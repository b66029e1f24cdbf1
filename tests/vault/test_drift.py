"""Drift outlives the process, whatever is lost, until an officer clears it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from guestlib.errors import HostdError
from hostd.core.appraise_ima import Accepted
from hostd.core.codes import Code
from hostd.core.findings import (
    BOOT,
    FILES,
    IMA,
    KERNEL,
    POSTURE,
    SELF,
    Component,
    Severity,
    domain_of,
    process_of,
    relro_of,
)
from hostd.ipc.loop import Loop
from hostd.vault.custody import LOCKED
from hostd.vault.store import StoreError
from tests.vault.support_drift import Vault
from tests.vault.support_gate import VM_A, A, B, finding, read_all


@pytest.fixture
def start(tmp_path: Path, loop: Loop) -> Iterator[Callable[[], Vault]]:
    """Starts a vault on the same files; the one before it ends as it is."""
    running: list[Vault] = []

    def make() -> Vault:
        while running:
            running.pop().close()
        running.append(Vault(tmp_path, loop))
        return running[-1]

    yield make
    for vault in running:
        vault.close()


@pytest.mark.parametrize("component", [FILES, BOOT, process_of(VM_A)], ids=str)
def test_a_drift_outlives_a_restart(start: Callable[[], Vault], component: Component) -> None:
    vault = start()
    vault.find(component)
    assert vault.keyring.unlocked == (component == process_of(VM_A))
    assert [e.event for e in vault.ledger.entries(0, 9)] == ["drift", "reaction"][: 1 + (not component.vm)]
    vault = start()
    assert vault.gate.latched == {component: (finding(component),)}
    assert vault.ledger.open_drift == {str(component): 0}


@pytest.mark.parametrize("component", [FILES, process_of(VM_A)], ids=str)
def test_a_drift_that_the_ledger_cannot_take_outlives_a_restart(
    start: Callable[[], Vault], component: Component
) -> None:
    vault = start()
    vault.fill_disk()
    vault.find(component)
    with pytest.raises(HostdError):
        vault.record("more")
    assert component in vault.gate.latched
    assert not vault.store.dirty
    vault = start()
    assert vault.gate.latched == {component: (finding(component),)}
    # It is said as soon as it can be.
    said = [(e.event, e.op) for e in vault.ledger.entries(0, 9)]
    assert said == [("drift", str(component)), ("reaction", str(component))][: 1 + (not component.vm)]


def test_a_drift_that_the_store_cannot_take_is_in_the_ledger(
    start: Callable[[], Vault], monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = start()

    def full(*_: object) -> None:
        raise StoreError("disk I/O error")

    monkeypatch.setattr(vault.store, "put_drift", full)
    vault.find(POSTURE)
    assert vault.shut["store"] is not None
    assert start().gate.latched.keys() == {POSTURE}


@pytest.mark.parametrize("component", [IMA, process_of(VM_A)], ids=str)
def test_a_drift_taken_out_of_the_store_is_latched(start: Callable[[], Vault], component: Component) -> None:
    vault = start()
    vault.record("start")
    vault.find(component)
    vault.store.clear_drift(str(component))
    vault.store.commit()
    for _ in range(2):  # and written down again
        vault = start()
        ((latched, findings),) = vault.gate.latched.items()
        assert latched == component
        (only,) = findings
        assert (only.code, only.severity) == (Code.DRIFT_ROW_MISSING.value, Severity.CRITICAL)
        assert only.code == "drift-row-missing"
        assert "ledger entry 1," in only.expected
        ((name, raw, _since, entry),) = vault.store.drift()
        assert (name, entry) == (str(component), 1)
        assert msgspec.msgpack.decode(raw, type=tuple[type(only), ...]) == findings


def test_what_was_cleared_is_not_latched_again(start: Callable[[], Vault]) -> None:
    vault = start()
    vault.find(FILES)
    vault.find(POSTURE)
    assert vault.clear(FILES)
    assert not vault.clear(FILES)
    vault = start()
    assert vault.gate.latched.keys() == {POSTURE}
    assert vault.clear(POSTURE)
    assert not start().gate.latched


def test_a_drift_after_a_clear_is_latched_without_its_row(start: Callable[[], Vault]) -> None:
    vault = start()
    vault.find(FILES)
    vault.clear(FILES)
    vault.find(FILES)
    vault.store.clear_drift(str(FILES))
    vault.store.commit()
    assert start().gate.latched.keys() == {FILES}


def test_a_clear_that_the_ledger_cannot_take_clears_nothing(start: Callable[[], Vault]) -> None:
    vault = start()
    vault.find(FILES)
    vault.fill_disk()
    with pytest.raises(HostdError):
        vault.clear(FILES)
    assert FILES in vault.gate.latched
    assert not vault.measuring.restarts
    assert not vault.keyring.unlocked
    assert start().gate.latched.keys() == {FILES}


def test_an_officer_accepts_the_log_that_was_seen(start: Callable[[], Vault]) -> None:
    vault = start()
    vault.measuring.so_far = Accepted("boot", 100)
    vault.find(IMA)
    assert vault.shut["keys"] == LOCKED
    # More of the log is read, and other components drift, before the officer has come.
    vault.measuring.so_far = Accepted("boot", 250)
    vault.find(POSTURE)
    assert vault.clear(IMA)
    assert vault.clear(POSTURE)
    assert vault.keyring.unlocked
    assert vault.measuring.restarts == 2
    wrapped = vault.store.meta("ima_accepted")
    assert wrapped is not None
    body = vault.keyring.unwrap_service_key("ima_accepted", wrapped)
    assert msgspec.msgpack.decode(body, type=Accepted) == Accepted("boot", 100)


def test_a_log_that_was_seen_before_a_restart_is_accepted_at_once(start: Callable[[], Vault]) -> None:
    vault = start()
    boot = "0a1b2c3d-0000-4000-8000-000000000000"
    vault.measuring.so_far = Accepted(boot, 100)
    vault.find(IMA)
    vault = start()
    vault.keyring.lock()
    # Nothing is read while the keys are locked: the log's position is that of the ledger.
    vault.measuring.so_far = Accepted("", 0)
    assert vault.clear(IMA)
    assert vault.keyring.unlocked
    wrapped = vault.store.meta("ima_accepted")
    assert wrapped is not None
    body = vault.keyring.unwrap_service_key("ima_accepted", wrapped)
    assert msgspec.msgpack.decode(body, type=Accepted) == Accepted(boot, 100)


@pytest.mark.parametrize("boot", ["x" * 36, ""])
def test_a_position_that_the_ledger_does_not_have_accepts_nothing(
    start: Callable[[], Vault], boot: str
) -> None:
    vault = start()
    vault.measuring.so_far = Accepted(boot, 100)
    vault.find(IMA)
    vault = start()
    assert vault.clear(IMA)
    assert vault.store.meta("ima_accepted") is None


def test_clearing_another_component_accepts_no_log(start: Callable[[], Vault]) -> None:
    vault = start()
    vault.find(POSTURE)
    assert vault.clear(POSTURE)
    assert vault.keyring.unlocked
    assert vault.store.meta("ima_accepted") is None


def test_keys_stay_locked_while_another_drift_is_open(start: Callable[[], Vault]) -> None:
    vault = start()
    vault.find(FILES)
    vault.find(POSTURE)
    vault.clear(FILES)
    assert not vault.keyring.unlocked
    vault.clear(POSTURE)
    assert vault.keyring.unlocked


@pytest.mark.parametrize("component", [KERNEL, SELF, BOOT, relro_of(VM_A), domain_of(VM_A)], ids=str)
def test_a_drift_of_any_kind_outlives_restarts_and_good_readings(
    start: Callable[[], Vault], component: Component
) -> None:
    start().find(component)
    vault = start()
    assert component in vault.gate.latched
    read_all(vault.gate, at=50)
    assert vault.gate.latched_for(A) == component
    mine = component.vm == VM_A
    assert vault.gate.host_drifted() is not mine
    assert (vault.gate.latched_for(B) is None) is mine
    vault.store.clear_drift(str(component))
    vault.store.commit()
    vault = start()
    assert component in vault.gate.latched, "the ledger has it"
    read_all(vault.gate, at=60)
    assert vault.clear(component)
    assert component not in vault.gate.stamps
    assert vault.measuring.restarts == 1
    assert component not in start().gate.latched
