"""The lab's host as a stage for attacks: alice is attacked, bob is everybody else."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from qemu.service import MANIFEST, OFFICER
from tests.support.attacks import REFUSED

if TYPE_CHECKING:
    from qemu.guest import Guest
    from qemu.guest_python import GuestPython
    from tests.lab.conftest import Running
    from tests.support.attacks import Finding, Staged

QEMU = "/usr/bin/qemu-system-x86_64"
ANSWER_S = 90.0
"""From an officer's word, or a machine's start, to the next answer, under emulation."""
TRIES = 4
"""The first connection under the CID of a machine that has ended may break."""
ASKED = "client.random(8)"


class Stage:
    """A `tests.support.attacks.Scene`."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.host = running.host
        self.service = running.service
        self._python: dict[str, GuestPython] = {}

    # ── The scene ─────────────────────────────────────────────────────────────────────────────────

    def answered(self) -> str:
        deadline = time.monotonic() + ANSWER_S
        while (last := self.refusal()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return last

    def refusal(self) -> str:
        return self._ask(self.running.alice)

    def others_answered(self) -> str:
        return self._ask(self.running.bob)

    def drift(self) -> list[Finding]:
        return [
            {"component": line["component"], **finding}
            for line in self.service.ctl_json("drift", "list")["drift"]
            for finding in line["findings"]
        ]

    def recover(self, staged: Staged) -> None:
        if staged.anew and self.running.alice.running:
            self.stop()
        components = sorted({line["component"] for line in self.service.ctl_json("drift", "list")["drift"]})
        for component in components:
            self.service.ctl("drift", "clear", component, "--reason", "test of an attack")

    # ── What the rows use ─────────────────────────────────────────────────────────────────────────

    @property
    def pid(self) -> int:
        return self.running.alice.qemu_pid

    @property
    def own(self) -> str:
        return f"process:{self.running.alice.uuid}"

    def quiet_text(self) -> tuple[int, int]:
        """File offset and, in alice's process, address of an instruction of QEMU's that may be changed
        while it runs (qemu/tamper.py)."""
        script = (
            "import sys\n"
            "for line in open(f'/proc/{sys.argv[1]}/maps'):\n"
            "    place, mode, offset, _device, _inode, *name = line.split()\n"
            f"    if mode == 'r-xp' and name == ['{QEMU}']: break\n"
            f"data = open('{QEMU}', 'rb').read()\n"
            "start, end = (int(part, 16) for part in place.split('-'))\n"
            "at = data.find(bytes.fromhex('31c0c30f1f'), int(offset, 16) + (end - start) // 2)\n"
            "print(at, at - int(offset, 16) + start)"
        )
        offset, address = self.host.run(["python3", "-c", script, str(self.pid)]).text.split()
        return int(offset), int(address)

    def stop(self) -> None:
        """Alice's machine ends; the next request starts it anew."""
        python = self._python.pop(self.running.alice.name, None)
        if python is not None:
            python.close()
        self.running.alice.destroy()

    def stop_all(self) -> None:
        """No machine runs; each is started again for its next request."""
        self.stop()
        python = self._python.pop(self.running.bob.name, None)
        if python is not None:
            python.close()
        self.running.bob.destroy()

    def accept_taint(self, taint: int) -> None:
        """An officer accepts a taint that the reviewed host did not have: a new version of the manifest."""
        document: dict[str, Any] = json.loads(self.host.get(MANIFEST))
        document["version"] += 1
        document["previous"] = ""
        document["posture"]["taint"] |= taint
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self.host.put(text.encode(), MANIFEST)
        self.host.run(["rm", "-f", f"{MANIFEST}.sig"])
        self.service.ctl("manifest", "sign", MANIFEST, "-k", OFFICER)
        self.service.ctl("manifest", "install", MANIFEST)

    def close(self) -> None:
        for python in self._python.values():
            python.close()

    def _ask(self, guest: Guest) -> str:
        for _ in range(TRIES):
            python = self._python.get(guest.name)
            if python is None:
                python = self._python[guest.name] = self.running.python(guest)
            answer = python.ask(ASKED)
            if answer.code != "transport":
                break
        if answer.code == "verification" and "drifted" in answer.shown:
            # A new connection: the guest verifies the evidence first, and refuses by itself.
            return REFUSED
        return "" if answer.ok else answer.code or answer.shown
