"""A vault in a process of its own, which reacts to one drift and is killed at the N-th thing that it does.

Run as `python -m tests.vault.react_and_die FOLDER TPM N`: each write to the ledger, commit of the store,
asking of the measurer and command to the TPM counts twice, before and after. Killed by SIGKILL at the
N-th; ends by itself, with 0, when there are fewer. With N = 0 it finds nothing new, and goes on with what
it was at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hostd.config import Config, Host, Reaction
from hostd.config import Drift as Settings
from hostd.config import Tpm as TpmSettings
from hostd.core.callers import vm_principal
from hostd.core.findings import Kind, process_of
from hostd.core.reacting import Step
from hostd.ipc.loop import Loop
from hostd.vault.counters import Counters
from hostd.vault.membership import Membership
from hostd.vault.tpmlink import TpmLink
from tests.vault.support_deaths import Deaths
from tests.vault.support_drift import Vault
from tests.vault.support_gate import VM_A
from tests.vault.support_keys import NOW, new_key

PCR = 12
STEPS = ("refuse", "lock", "suspend-vm", "poison", "shred")
WAIT_S = 120.0
T = TypeVar("T")


def config(folder: Path, tpm: Path) -> Config:
    return Config(
        host=Host(state_dir=str(folder), run_dir=str(folder)),
        tpm=TpmSettings(device=f"unix:{tpm}", deadline_s=60.0),
        drift=Settings(
            reactions=(Reaction((Kind.PROCESS,), (Step.LOCK, Step.SUSPEND_VM, Step.POISON)),), poison_pcr=PCR
        ),
    )


def main(folder: Path, tpm: Path, at: int) -> None:
    deaths, loop = Deaths(at), Loop()

    def power(vm: str, on: bool, told: Callable[[bool, str], None], /) -> None:
        deaths.point()
        with (folder / "machines").open("a") as file:
            file.write(f"{vm} {'suspended' if on else 'resumed'}\n")
        deaths.point()
        loop.call_after(0.0, lambda: told(True, "suspended"))

    settings = config(folder, tpm)
    link = TpmLink(settings, loop, Counters())
    vault = Vault(folder, loop, settings, tpm=link, power=power)
    if not vault.store.tenants():
        vault.store.add_tenant("red", NOW)
        Membership(vault.store, vault.keyring).bind(vm_principal(VM_A), "red", NOW)
        for number in (1, 2):
            vault.store.put_key(new_key(vault.keyring, number=number))
        vault.drift.shredding.choose("red", True)
        vault.store.commit()
    if at:
        deaths.around(vault.ledger, "sync")
        deaths.around(vault.store, "commit")
        deaths.around(vault.store, "flush")
        poison = link.poison

        def poisoned(told: Any) -> None:
            deaths.point()

            def then(result: Any) -> None:
                deaths.point()
                told(result)

            poison(then)

        vault.drift.reactions._tpm = type("Tpm", (), {"poison": staticmethod(poisoned)})()
        vault.find(process_of(VM_A))
    loop.call_after(WAIT_S, lambda: sys.exit("the reactions did not end"))
    component = process_of(VM_A)
    while any(line.outcome != "done" for line in vault.drift.reactions.lines(component)):
        loop.run_once(1.0)
    link.close()
    vault.close()
    loop.close()
    print(deaths.count)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
