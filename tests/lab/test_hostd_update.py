"""Promise: QEMU's package is updated while machines run, with no alarm; then the old build is refused.

The next package is the installed one with another binary, put together in the host by dpkg-deb and installed
by dpkg, as docs/operations.md, "Update day", says.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from qemu.guest import Guest
from qemu.service import MANIFEST, OFFICER
from tests.e2e.load import HONEST
from tests.lab.asking import Asking
from tests.lab.stage import QEMU, Stage

if TYPE_CHECKING:
    from tests.lab.conftest import Running

PACKAGE = "qemu-system-x86"
DEB = "/root/next.deb"
WAIT_S = 300.0
REPACK = f"""
set -e
rm -rf /root/tree && mkdir -p /root/tree/DEBIAN && cd /
dpkg -L {PACKAGE} | while read -r file; do
  if [ -f "$file" ] || [ -L "$file" ]; then echo "$file"; fi
done | tar -c -P -T - | tar -x -P --transform 's,^/,/root/tree/,'
printf x >> /root/tree{QEMU}
for name in preinst postinst prerm postrm conffiles; do
  if [ -e /var/lib/dpkg/info/{PACKAGE}.$name ]; then
    cp -p /var/lib/dpkg/info/{PACKAGE}.$name /root/tree/DEBIAN/$name
  fi
done
dpkg-query -s {PACKAGE} | grep -v -e '^Status:' -e '^Conffiles:' -e '^ /etc' \
  | sed 's/^Version: .*/&+local1/' > /root/tree/DEBIAN/control
dpkg-deb -Znone --root-owner-group -b /root/tree {DEB}
"""


def install(running: Running, path: str) -> None:
    running.service.ctl("manifest", "sign", path, "-k", OFFICER)
    running.service.ctl("manifest", "install", path)


def wait_verified(running: Running, guest: Guest) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        vms = {line["vm"]: line for line in running.service.ctl_json("vm", "list")["vms"]}
        line = vms.get(str(guest.uuid), {})
        if line.get("status") == "verified":
            return
        assert time.monotonic() < deadline, line
        time.sleep(1.0)


def test_an_update_of_the_package_while_machines_run(running: Running) -> None:
    service, host = running.service, running.host
    host.run(REPACK, 600.0)
    carol = Guest(host, "carol", 9)
    try:
        with Asking(running) as asking:
            service.ctl("manifest", "approve-next", "@", "--deb", DEB, "-o", "/root/next.json")
            install(running, "/root/next.json")
            # Everything is judged anew, the kernel compared too: here that takes longer than a request may.
            asking.answered_once_more(WAIT_S)
            host.run(["dpkg", "-i", DEB], 600.0)
            assert host.run(["readlink", f"/proc/{running.alice.qemu_pid}/exe"]).text.endswith("(deleted)")
            asking.answered_once_more()
            carol.start()
            wait_verified(running, carol)
            asking.answered_once_more()
            print(f"{asking.answers} answers, others {asking.refused}")
            assert set(asking.refused) <= HONEST
        assert Stage(running).drift() == []
        seen = {line["path"]: line["seen"] for line in service.ctl_json("manifest", "status")["next"]}
        assert seen[QEMU] is True

        service.ctl("manifest", "retire", "@", "--path", QEMU, "-o", "/root/done.json")
        install(running, "/root/done.json")
        stage = Stage(running)
        own = {f"process:{guest.uuid}" for guest in (running.alice, running.bob)}
        found = _found(stage, own)
        print(json.dumps(found, indent=2))
        assert {finding["code"] for finding in found if finding["component"] in own} == {"file-retired"}
        assert all(
            finding["component"].partition(":")[2] in {c.partition(":")[2] for c in own} for finding in found
        )
        wait_verified(running, carol)

        # Started again, on the new build, they are answered.
        stage.stop_all()
        for component in sorted({finding["component"] for finding in found}):
            service.ctl("drift", "clear", component, "--reason", "started again on the new build")
        assert stage.answered() == ""
        assert stage.others_answered() == ""
        assert stage.drift() == []
        stage.close()
    finally:
        carol.close()
        service.ctl("manifest", "show", "-o", MANIFEST)
        host.run(["rm", "-rf", "/root/tree", DEB])


def _found(stage: Stage, own: set[str]) -> list[dict[str, str]]:
    deadline = time.monotonic() + WAIT_S
    while True:
        found = stage.drift()
        if own <= {finding["component"] for finding in found}:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(1.0)
