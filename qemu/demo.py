"""``python3 -m qemu.demo``: hostd's main job, on a real KVM host in a virtual machine, step by step.

Boots the lab's host from a disk with hostd installed, sets hostd up as its systemd units, has a guest use
keys over vsock and verify the host's evidence, changes one byte of that guest's running QEMU, and shows
the refusal, the finding, and how an officer opens the gate again. Everything shown is what was typed
and what was answered. The results go to ``build/demo.json``; the exit status is 1 if anything
is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qemu.errors import LabError
from qemu.guest import Guest
from qemu.guest_python import Answer, GuestPython
from qemu.host import LabHost
from qemu.install import REPO
from qemu.installed import ensure_installed
from qemu.machine import Settings
from qemu.process import quiet
from qemu.service import MANIFEST, METRICS, OFFICER, ROLES, Service
from qemu.tamper import Patch, patch_code, put_back
from qemu.telling import Teller

RESULT: Final = REPO / "build" / "demo.json"
CID: Final = 7
TENANT: Final = "acme"
# Enough for what a host of this kind executes; /usr/lib as a whole takes half a minute under emulation.
SURVEY: Final = (
    *("/usr/bin/", "/usr/sbin/", "/usr/libexec/", "/usr/lib/systemd/", "/usr/lib/python3.11/lib-dynload/"),
    *("/usr/lib/x86_64-linux-gnu/libvirt/", "/usr/lib/x86_64-linux-gnu/qemu/", "/opt/hostd/"),
    # What a worker maps and nothing else does, and what QEMU reads.
    *("/usr/lib/x86_64-linux-gnu/libssl.so.3", "/usr/lib/x86_64-linux-gnu/libseccomp.so.2"),
    *("/usr/share/qemu/", "/usr/share/seabios/"),
)
OPERATIONS: Final = (
    ("create_key", 'client.create_key("AES-256-GCM", "alias/database")'),
    ("encrypt", 'sealed = client.encrypt("alias/database", b"attack at dawn", {"row": "17"})'),
    ("decrypt", 'opened = client.decrypt(sealed.ciphertext, {"row": "17"})'),
    ("create_key", 'client.create_key("Ed25519", "alias/release")'),
    ("sign", 'signed = client.sign("alias/release", b"release 1.0")'),
    ("verify", 'client.verify("alias/release", b"release 1.0", signed.signature)'),
)
REFUSED: Final = OPERATIONS[2]


class DemoError(Exception):
    """Something is not as it must be."""


class Demo:
    """The story. Each method is a chapter; ``result`` is what ``build/demo.json`` will hold."""

    def __init__(self, host: LabHost, teller: Teller) -> None:
        self.host = host
        self.tell = teller
        self.service = Service(host)
        self.guest = Guest(host, "alice", CID)
        self.result: dict[str, Any] = {
            "guest": {"transport": "vsock", "cid": CID, "operations": []},
        }

    def run(self) -> None:
        """All chapters."""
        self.start()
        self.baseline()
        self.tenant()
        python = GuestPython(self.guest)
        self.use_keys(python)
        self.evidence(python)
        self.metrics()
        patch = self.tamper(python)
        self.explain(patch)
        self.recover(python, patch)

    def start(self) -> None:
        tell = self.tell
        with tell.step("Boot a KVM host with TPM 2.0 and IMA, in a virtual machine; make hostd's keys there"):
            self.host.boot(settled=False)
            self._say_command(f"hostd setup --officer {OFFICER}.pub")
            tell.output(self.service.set_up(SURVEY))
            self.host.settle()
            self._host("cat /proc/cmdline; ls /dev/kvm /dev/tpmrm0 /dev/vhost-vsock")
        with tell.step("Start hostd as systemd units, and a guest under libvirt and KVM"):
            self._say_command("systemctl enable --now hostd.target")
            self.service.enable()
            self._say_command("virsh define alice.xml; virsh start alice")
            self.guest.power_on()
            self.service.wait_active()
            self._host("systemctl is-active " + " ".join(f"hostd-{role}" for role in ROLES))

    def baseline(self) -> None:
        with self.tell.step("Make a manifest of the host as it is, review it, sign it, put it into force"):
            failed: list[LabError] = []
            waiting = threading.Thread(target=self._await_guest, args=(failed,))
            waiting.start()  # the guest's kernel still boots
            self._ctl(f"manifest from-host -o {MANIFEST}", timeout=900)
            self._ctl(f"manifest sign {MANIFEST} -k {OFFICER}")
            self._ctl(f"manifest install {MANIFEST}")
            self.service.wait_measured()
            waiting.join()
            if failed:
                raise failed[0]

    def tenant(self) -> None:
        with self.tell.step("Make a tenant, let the guest act for it, give the guest what it is to trust"):
            self._ctl(f"tenant create {TENANT}")
            self._ctl(f"vm bind {self.guest.uuid} {TENANT}")
            self._say_command("hostctl trust bundle    # into the guest, as /etc/hostd/trust.json")
            self.service.give_trust(self.guest)

    def use_keys(self, python: GuestPython) -> None:
        with self.tell.step("The guest uses keys over vsock; each answer waits for a pass of measurements"):
            for op, code in OPERATIONS:
                answer = self._guest(python, op, code)
                if not answer.ok:
                    raise DemoError(f"{op} failed: {answer.shown}")
                if op == "decrypt":
                    self.tell.command("alice>>> ", "opened.plaintext")
                    plaintext = python.ask("opened.plaintext").shown
                    self.tell.output(plaintext)
                    if plaintext != repr(b"attack at dawn"):
                        raise DemoError(f"the guest decrypted {plaintext}")
                if op == "verify" and "valid=True" not in answer.shown:
                    raise DemoError(f"the guest's own signature is not valid: {answer.shown}")

    def evidence(self, python: GuestPython) -> None:
        with self.tell.step("The guest challenges the host and verifies its evidence"):
            answer = python.ask("found = check_evidence(client, bundle)")
            self.tell.command("alice>>> ", "check_evidence(client, bundle)")
            if not answer.ok:
                raise DemoError(f"the evidence does not hold: {answer.shown}")
            found: dict[str, Any] = answer.value
            for name, rested_on in found["steps"]:
                self.tell.output(f"{name:<24} {rested_on}")
            self.tell.good(f"verified inside the guest in {answer.ms / 1000:.1f} s")
            self.result["evidence"] = {"verified": True, "ms": answer.ms, **found}

    def metrics(self) -> None:
        with self.tell.step("What Prometheus sees"):
            self._host(
                f"python3 -c 'import urllib.request as u; print(u.urlopen(\"{METRICS}\").read().decode())'"
                " | grep -E '^hostd_(gate_open|passes|requests|ledger)' | head -12"
            )

    def tamper(self, python: GuestPython) -> Patch:
        with self.tell.step("Root changes one byte of the running QEMU's code: the guest does not notice"):
            pid = self.guest.qemu_pid
            patch = patch_code(self.host, pid)
            self.tell.say(
                f"/proc/{pid}/mem at {patch.address:#x} ({patch.file} at {patch.offset:#x}): "
                f"{patch.old:02x} -> {patch.new:02x}"
            )
            answer = self._guest(python, *REFUSED)
            if answer.ok or answer.code != "refused_drift":
                raise DemoError(f"the request was not refused for drift: {answer.shown}")
            self.tell.good(f"refused {answer.ms:.0f} ms after it was asked; ledger entry {answer.ledger}")
            self.result["tamper"] = {"refused": True, "code": answer.code, "ledger": answer.ledger}
        return patch

    def explain(self, patch: Patch) -> None:
        with self.tell.step("The officers are told what drifted, where, what was expected and what was seen"):
            self._ctl("drift list")
            finding = self._finding()
            if finding["code"] != "code-altered" or f"{patch.offset:#x}" not in finding["where"]:
                raise DemoError(f"the finding does not name the changed byte: {finding}")
            if not all(
                f"{byte:02x}" in finding[side]
                for side, byte in (("expected", patch.old), ("seen", patch.new))
            ):
                raise DemoError(f"the finding does not show both bytes: {finding}")
            self.result["tamper"]["finding"] = finding
            self._ctl("ledger list -n 4")

    def recover(self, python: GuestPython, patch: Patch) -> None:
        component = f"process:{self.guest.uuid}"
        with self.tell.step("Putting the byte back opens nothing; a new process and an officer's word do"):
            put_back(self.host, patch)
            self.tell.say(f"{patch.address:#x}: {patch.new:02x} -> {patch.old:02x}")
            if self._guest(python, *REFUSED).ok:
                raise DemoError("the gate opened by itself")
            python.close()
            self._say_command("virsh destroy alice; virsh start alice")
            self.guest.destroy()
            self.guest.start()
            self._ctl(f"drift clear {component} --reason 'host inspected, VM started anew'")
            self.service.give_trust(self.guest)
            again = GuestPython(self.guest)
            answer = self._guest(again, "describe_key", 'client.describe_key("alias/database")')
            if not answer.ok:
                raise DemoError(f"no answer after an officer cleared the drift: {answer.shown}")
            self._ctl("ledger verify")

    def _await_guest(self, failed: list[LabError]) -> None:
        try:
            self.guest.wait_up()
        except LabError as error:
            failed.append(error)

    def _finding(self) -> dict[str, str]:
        for line in self.service.ctl_json("drift", "list")["drift"]:
            if line["component"] == f"process:{self.guest.uuid}":
                return {"component": line["component"], **line["findings"][0]}
        raise DemoError("hostctl drift list does not name the guest's process")

    def _guest(self, python: GuestPython, op: str, code: str) -> Answer:
        self.tell.command("alice>>> ", code)
        answer = python.ask(code)
        shown = answer.shown if len(answer.shown) <= 150 else answer.shown[:150] + "…"
        if not answer.ok:
            self.tell.bad(f"  {shown}")
        elif " = " not in code.split("(")[0]:
            self.tell.output(shown)
        rests = f"pass {answer.passed}, ledger entry {answer.ledger}, " if answer.passed is not None else ""
        self.tell.output(f"    [{rests}{answer.ms:.0f} ms]")
        self.result["guest"]["operations"].append(
            {"op": op, "ok": answer.ok, "pass": answer.passed, "ms": answer.ms}
        )
        return answer

    def _say_command(self, text: str) -> None:
        self.tell.command("host# ", text)

    def _host(self, line: str) -> None:
        self._say_command(line)
        self.tell.output(self.host.run(line).text)

    def _ctl(self, line: str, timeout: float = 120.0) -> None:
        self._say_command(f"hostctl {line}")
        self.tell.output(self.host.run(f"hostctl {line}", timeout).text)


def main(words: Sequence[str] | None = None) -> int:
    """Run the demonstration; the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m qemu.demo", description=__doc__)
    parser.add_argument("--accel", choices=("tcg", "kvm"), default=Settings().accel)
    parser.add_argument("--result", type=Path, default=RESULT, help="where the results go as JSON")
    options = parser.parse_args(words)
    settings = Settings(accel=options.accel)
    teller = Teller()
    try:
        with teller.step("Have a disk with hostd installed (built the first time, then cached)"):
            disk = ensure_installed(settings=settings)
        with quiet(), LabHost(settings, disk=disk) as host:
            demo = Demo(host, teller)
            demo.run()
            host.power_cut()
    except (DemoError, LabError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        if isinstance(error, LabError) and error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    demo.result["seconds"] = round(teller.seconds, 1)
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(demo.result, indent=2) + "\n")
    print(f"\nAll as it must be, in {teller.seconds:.0f} s. Results: {options.result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
