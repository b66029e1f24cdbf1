"""A vault's channel CA in a process of its own, rotated, and killed at the N-th thing that it does.

Run as `python -m tests.vault.rotate_and_die FOLDER STEP N`: each entry in the ledger (a file here), each row
and each commit of the store counts twice, before and after. Killed by SIGKILL at the N-th; ends by itself,
with 0, when there are fewer. With N = 0 it only starts, and prints the digest of the CA in force.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from hostd.ipc.loop import Loop
from hostd.vault.ledger import Entry
from tests.vault.support_channel import Desk
from tests.vault.support_deaths import Deaths


class Written(Desk):
    """Its ledger's last entries are in a file."""

    def __init__(self, folder: Path, loop: Loop) -> None:
        self.path = folder / "last"
        known = self.path.read_bytes() if self.path.exists() else b"{}"
        super().__init__(folder, loop, msgspec.json.decode(known, type=dict[str, Entry]))

    def record(self, event: str, *, principal: str = "", detail: str = "") -> int:
        seq = super().record(event, principal=principal, detail=detail)
        self.path.write_bytes(msgspec.json.encode(self.last))
        return seq


def main(folder: Path, step: str, at: int) -> None:
    deaths, loop = Deaths(at), Loop()
    desk = Written(folder, loop)
    desk.unseal()
    if at:
        deaths.around(desk.keeper, "_record")
        deaths.around(desk.store, "set_meta")
        deaths.around(desk.store, "commit")
        desk.rotate(step)  # type: ignore[arg-type]
    print(desk.keeper.digest.hex())
    desk.close()
    loop.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
