"""The demonstration runs to its end and its result says what it showed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from qemu.host import LabHost
from qemu.install import REPO
from tests.lab.conftest import switch_off


def test_a_changed_byte_of_qemu_is_refused_named_and_cleared_by_an_officer(
    lab_tools: None, hosts: list[LabHost], tmp_path: Path
) -> None:
    switch_off(hosts)
    path = tmp_path / "demo.json"
    ended = subprocess.run(
        [sys.executable, "-m", "qemu.demo", "--result", str(path)],
        cwd=REPO,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr[-4000:]

    result = json.loads(path.read_text())
    assert set(result) == {"guest", "evidence", "tamper", "seconds"}
    guest = result["guest"]
    assert (guest["transport"], guest["cid"]) == ("vsock", 7)
    done = [operation["op"] for operation in guest["operations"] if operation["ok"]]
    assert done[:6] == ["create_key", "encrypt", "decrypt", "create_key", "sign", "verify"]
    assert all(operation["pass"] > 0 for operation in guest["operations"] if operation["ok"])
    assert result["evidence"]["verified"] is True
    assert len(result["evidence"]["steps"]) == 14
    assert result["tamper"]["refused"] is True
    finding = result["tamper"]["finding"]
    assert finding["component"].startswith("process:")
    assert (finding["code"], finding["severity"]) == ("code-altered", "critical")
    assert "/usr/bin/qemu-system-x86_64" in finding["subject"]
    assert finding["expected"].startswith("bytes 31 c0 c3")
    assert finding["seen"].startswith("bytes 33 c0 c3") or "33" in finding["seen"].split()[1]
