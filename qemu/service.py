"""hostd as services in the lab's host: installed, configured, started, and operated from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qemu.errors import LabError, Result
from qemu.guest import Guest
from qemu.host import LabHost
from qemu.install import IMA_POLICY, REPO, install_guests, install_hostd
from qemu.process import step

CONFIG: Final = "/etc/hostd/hostd.toml"
TRUST: Final = "/etc/hostd/trust.json"
MANIFEST: Final = "/etc/hostd/manifest.json"
OFFICER: Final = "/etc/hostd/officer"
"""The officer's SSH key: made by the lab, without a passphrase."""
LOADED_POLICY: Final = "/sys/kernel/security/ima/policy"
ROLES: Final = ("measurer", "vault", "gateway", "metrics")
METRICS: Final = "http://127.0.0.1:9464/metrics"

SURVEY: Final = (
    *("/usr/bin/", "/usr/sbin/", "/usr/lib/", "/usr/libexec/", "/usr/local/", "/opt/hostd/"),
    *("/usr/share/qemu/", "/usr/share/seabios/", "/usr/share/OVMF/", "/usr/share/zoneinfo/"),
)

# Times are those of a machine some fifteen times slower than a real one.
_CONFIG: Final = """\
[users]
vault = "hostd-vault"
gateway = "hostd-gateway"
metrics = "hostd-metrics"
measurer = "root"

[tpm]
device = "/dev/tpmrm0"
deadline_s = 30.0

[measure]
survey = {survey}
deadline_s = 30.0
sweep_s = 30.0

[gate]
deadline_s = 60.0
"""


class Service:
    """hostd in L1, on a host whose disk has it installed (``qemu.installed``)."""

    def __init__(self, host: LabHost) -> None:
        self.host = host
        self._bundle = b""

    def install(self, repo: Path = REPO) -> None:
        """Installs, sets up and starts hostd as its units, on a host with the bare image."""
        install_hostd(self.host, repo)
        install_guests(self.host, repo)
        self.host.run(f"echo {IMA_POLICY} > {LOADED_POLICY}")
        self.set_up()
        self.start()

    def set_up(self, survey: Sequence[str] = SURVEY) -> str:
        """Configures hostd and makes its TPM objects, root key and store; what ``hostd setup`` said.

        ``survey`` is what a manifest hashes; what it leaves out and the kernel has not measured either is
        drift as soon as it is executed.
        """
        with step("setting hostd up: TPM objects, root key, store"):
            self.host.put(_CONFIG.format(survey=json.dumps(survey)).encode(), CONFIG)
            self.host.run(f"test -e {OFFICER} || ssh-keygen -q -t ed25519 -N '' -C officer@lab -f {OFFICER}")
            return self.host.run(["hostd", "setup", "--officer", f"{OFFICER}.pub"], 180).text

    def start(self) -> None:
        """Starts hostd, now and at every boot; the gate is closed for want of a manifest."""
        with step("starting hostd"):
            self.enable()
            self.wait_active()

    def enable(self) -> None:
        """Has systemd start hostd, now and at every boot, and does not wait for it."""
        self.host.run(["systemctl", "enable", "--now", "--no-block", "hostd.target"])

    def wait_active(self, limit: float = 180.0) -> None:
        """Waits until every role is up.

        Raises:
            LabError: it is not in time; with the roles' journal.
        """
        units = [f"hostd-{role}.service" for role in ROLES]
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            states = self.host.run(["systemctl", "is-active", *units], check=False).text.split()
            if states == ["active"] * len(units):
                return
            time.sleep(1.0)
        raise LabError(f"hostd's roles are {states}; the journal:\n{self.journal()[-4000:]}")

    def journal(self) -> str:
        """What the roles have logged in this boot."""
        return self.host.run(
            ["journalctl", "-b", "--no-pager", "-o", "short-monotonic", "-u", "hostd-*"]
        ).text

    def ctl(self, *arguments: str, timeout: float = 120.0, check: bool = True) -> Result:
        """Runs hostctl as root."""
        return self.host.run(["hostctl", *arguments], timeout, check=check)

    def ctl_json(self, *arguments: str, timeout: float = 120.0) -> Any:
        """Runs hostctl and reads its JSON."""
        return json.loads(self.ctl("--json", *arguments, timeout=timeout).stdout)

    def baseline(self) -> None:
        """Makes a manifest of the host as it runs, signs it as the officer, and puts it into force."""
        with step("making a manifest of the host, signing and installing it"):
            self.ctl("manifest", "from-host", "-o", MANIFEST, timeout=900.0)
            self.ctl("manifest", "sign", MANIFEST, "-k", OFFICER)
            self.ctl("manifest", "install", MANIFEST)

    def wait_measured(self, limit: float = 300.0) -> None:
        """Waits until everything has been read once, good or bad: files identified, the kernel compared.

        Raises:
            LabError: it is not in time; with what is missing.
        """
        deadline = time.monotonic() + limit
        with step("waiting until everything is measured"):
            while True:
                found = self.ctl("--json", "measure", check=False)
                lines = json.loads(found.stdout)["components"] if found.stdout else []
                missing = [
                    f"{one['component']}: {one['status']}" for one in lines if one["status"] != "verified"
                ]
                if lines and not missing:
                    return
                if time.monotonic() > deadline:
                    raise LabError(f"not measured in {limit:g} s: {missing or found.stderr!r}")

    def adopt(self, guest: Guest, tenant: str) -> None:
        """Makes the tenant if need be, binds the guest to it, and gives the guest a trust bundle."""
        known = {name for name, _keys in self.ctl_json("tenant", "list")["tenants"]}
        if tenant not in known:
            self.ctl("tenant", "create", tenant)
        self.ctl("vm", "bind", str(guest.uuid), tenant)
        self.give_trust(guest)

    def give_trust(self, guest: Guest) -> None:
        """Puts this host's trust bundle into the guest; the last one, if drift has locked the keys since."""
        made = self.ctl("trust", "bundle", check=not self._bundle)
        if made.rc == 0:
            self._bundle = made.stdout
        guest.run(["mkdir", "-p", "/etc/hostd"])
        guest.put(self._bundle, TRUST)

    def pid_of(self, role: str) -> int:
        """Main process of a role."""
        return int(self.host.run(["systemctl", "show", "-p", "MainPID", "--value", f"hostd-{role}"]).text)
