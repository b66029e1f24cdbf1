"""What follows a drift on a whole host: a poisoned TPM, destroyed keys, a tenant locked, and the way back."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from guestlib.errors import HostdError, RefusedDriftError
from hostd.core.readings import EXEC, READ
from hostd.ipc import operating as adm
from tests.e2e.harness import VM, Host, Settings, adopted, machine, prepared, until
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
COMPONENT = f"process:{VM}"


def rules(steps: str, more: str = "") -> Settings:
    return Settings(
        more=f'[drift]\npoison_pcr = 14\n{more}\n[[drift.reactions]]\nkinds = ["process"]\nsteps = {steps}\n'
    )


def patch(vm: qemu.Vm) -> None:
    text = tamper.mapping(vm.pid, "qemu-under-test", READ | EXEC)
    before = tamper.read(vm.pid, text.start + 64, 1)
    tamper.write(vm.pid, text.start + 64, bytes([before[0] ^ 1]))


def drifted(host: Host) -> None:
    with pytest.raises(RefusedDriftError):
        host.client().random(8)


def reactions(host: Host) -> dict[str, str]:
    for line in host.ask(adm.ListDrift(), adm.Drift).drift:
        if line.component == COMPONENT:
            return {step.step: step.outcome for step in line.reactions}
    return {}


def said(host: Host) -> list[tuple[str, str]]:
    return [
        (e["detail"].split(" | ")[0], e["outcome"])
        for e in host.ledger()
        if e["event"] == "reaction" and e["op"] == COMPONENT
    ]


def all_done(host: Host, *steps: str) -> None:
    expected = dict.fromkeys(("refuse", *steps), "done")
    until(lambda: reactions(host) == expected, f"all of {expected}", 60)
    assert said(host) == [(step, "done") for step in steps]


def test_a_poisoned_tpm_gives_nothing_back_before_a_reset(binary: Path) -> None:
    with machine(binary) as vm, adopted(binary, rules('["poison"]')) as host:
        host.serves(host.client())
        patch(vm)
        drifted(host)
        all_done(host, "lock", "poison")
        text = host.hostctl("drift").stdout
        assert "poison" in text
        assert "PCR 14 extended" in text
        # Neither an officer's word nor another vault opens it.
        vm.kill()
        os.kill(host.pid("vault"), signal.SIGKILL)
        until(lambda: host.status() is not None and reactions(host), "the vault is back", 60)
        all_done(host, "lock", "poison")
        host.hostctl("drift", "clear", COMPONENT, "--reason", "machine stopped")
        status = until(lambda: (s := host.status()) and "PCR 14" in s.reason and s, "the TPM refuses", 60)
        assert not status.keys_unlocked
        assert status.gate == "closed"
        # The embedded TPM ends and starts with the roles: that is a reset.
        host.stop()
        host.start()
        host.wait_open(60)
        host.serves(host.client())
        assert host.drift() == {}


def test_keys_of_a_tenant_that_chose_so_are_destroyed_and_no_others(binary: Path) -> None:
    with machine(binary) as vm, adopted(binary, rules("[]")) as host:
        host.ask(adm.CreateTenant(name="other"), adm.Nothing)
        host.ask(adm.BindVm(vm=VM, tenant="acme"), adm.Nothing)
        client = host.client()
        key = client.create_key("AES-256-GCM").key.id
        sealed = client.encrypt(key, b"x").ciphertext
        assert "acme: shred" in host.hostctl("tenant", "on-drift", "acme", "shred").stdout
        host.hostctl("tenant", "on-drift", "nobody", "shred", check=False)
        assert host.ask(adm.ListTenants(), adm.Tenants).shred_on_drift == ("acme",)
        patch(vm)
        drifted(host)
        all_done(host, "shred")
        (entry,) = [e for e in host.ledger() if e["event"] == "shred"]
        assert entry["op"] == "acme"
        assert "1 keys" in entry["detail"]
        assert {line.state for line in host.ask(adm.ListKeys(tenant="acme"), adm.Keys).keys} == {"destroyed"}
        vm.kill()
        host.hostctl("drift", "clear", COMPONENT, "--reason", "machine stopped")
        again = host.client()
        host.serves(again)
        with pytest.raises(HostdError):
            again.decrypt(sealed)
        assert again.create_key("AES-256-GCM").key.id != key


def test_a_clean_reading_reopens_where_it_may(binary: Path) -> None:
    settings = rules("[]", 'recovery = { process = "auto", relro = "auto" }')
    with machine(binary) as vm, adopted(binary, settings) as host:
        host.serves(host.client())
        patch(vm)
        drifted(host)
        drifted(host)
        vm.kill()
        with machine(binary):
            host.serves(host.client(attested=True))
        assert COMPONENT not in host.drift()
        (clear,) = [e for e in host.ledger() if e["event"] == "clear" and e["op"] == COMPONENT]
        assert "principal" not in clear
        assert "clean reading" in clear["detail"]


def test_a_tenant_is_locked_with_its_machine(binary: Path) -> None:
    with machine(binary) as vm, adopted(binary, rules('["lock"]')) as host:
        host.ask(adm.BindVm(vm=VM, tenant="acme"), adm.Nothing)
        host.serves(host.client())
        patch(vm)
        drifted(host)
        all_done(host, "lock")
        assert "tenant acme" in host.hostctl("drift", "list").stdout
        status = host.status()
        assert status is not None
        assert status.keys_unlocked, "others' keys are theirs"
        vm.kill()
        host.hostctl("drift", "clear", COMPONENT, "--reason", "machine stopped")
        host.serves(host.client())


def test_setup_refuses_a_key_that_is_not_sealed_to_the_poison_pcr(binary: Path) -> None:
    with prepared(binary) as host:
        plain = host.config_path.read_text()
        host.config_path.write_text(plain + "[tpm]\npcrs = [0, 12]\n[drift]\npoison_pcr = 12\n")
        done = host.hostd("setup", check=False)
        assert done.returncode != 0
        assert "PCR 12 cannot be the poison PCR" in done.stderr
        run = host.hostd("vault", check=False)
        assert run.returncode != 0
        assert "PCR 12 cannot be the poison PCR" in run.stderr
