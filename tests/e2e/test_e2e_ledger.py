"""Promise: while hostd runs, a change of the ledger's file is found and named by its entry; and what was
recorded under a signed head cannot be taken away unnoticed while it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestlib.attest.bundle import parse_bundle
from guestlib.attest.checkpoint import parse_checkpoint, verify_checkpoint
from tests.e2e.harness import Host, until

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow
Lines = list[bytes]


def edited(lines: Lines) -> Lines:
    return [*lines[:5], lines[5].replace(b'"outcome":"', b'"outcome":"x'), *lines[6:]]


def deleted(lines: Lines) -> Lines:
    return lines[:5] + lines[6:]


def reordered(lines: Lines) -> Lines:
    return [*lines[:5], lines[6], lines[5], *lines[7:]]


def truncated(lines: Lines) -> Lines:
    return lines[:-3]


def lengthened(lines: Lines) -> Lines:
    last = b'{"seq":%d,"time":1,"event":"operation","outcome":"released"}\n' % len(lines)
    return [*lines, last]


FOUND = {
    edited: "ledger.jsonl line 6: entry 5 was edited",
    deleted: "ledger.jsonl line 6: entry 5 is missing",
    reordered: "ledger.jsonl line 6: entries 5 and 6 are out of order",
    truncated: "entries {gone} to {last} are missing at the end",
    lengthened: "something stands after the last entry, {last}",
}
CHANGES = list(FOUND)


def used(host: Host) -> None:
    client = host.client()
    key = client.create_key().key.id
    for _ in range(8):
        client.encrypt(key, b"x")


def test_untouched(host: Host) -> None:
    used(host)
    said = host.hostctl("ledger", "verify")
    assert f"{len(host.ledger())} entries agree with the head" in said.stdout


@pytest.mark.parametrize("change", CHANGES)
def test_changed_while_it_runs(host: Host, change: Callable[[Lines], Lines]) -> None:
    used(host)
    path = host.state / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("r+b") as file:
        file.write(b"".join(change(lines)))
        file.truncate()
    said = host.hostctl("ledger", "verify", check=False)
    assert said.returncode == 4
    assert FOUND[change].format(last=len(lines) - 1, gone=len(lines) - 3) in said.stdout
    host.kill()


@pytest.mark.parametrize("change", [edited, deleted, reordered, truncated])
def test_changed_while_it_was_stopped(host: Host, change: Callable[[Lines], Lines]) -> None:
    """The newest signed head is held against the file at the start: nothing is served from another."""
    used(host)
    host.stop()
    path = host.state / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # Whatever the orderly end recorded after the last signed head is not what this is about.
    path.write_bytes(b"".join(change(lines[:-1]) + lines[-1:] if change is not truncated else lines[:-8]))
    with pytest.raises(AssertionError, match="the vault answers"):
        host.start(seconds=4)
    assert "ledger" in host.log().rpartition("error:")[2]
    assert "Traceback" not in host.log()
    host.kill()


def test_an_auditor_needs_no_hostd(host: Host, tmp_path: Path) -> None:
    """Commands on a running host, and what they give verified after it has gone."""
    used(host)
    trust = str(host.directory / "trust.json")
    host.hostctl("trust", "bundle", "-o", trust)
    said = host.hostctl_json("ledger", "list", "-n", "3", "--event", "Encrypt")["entries"]
    assert [entry["op"] for entry in said] == ["Encrypt"] * 3
    number = said[0]["seq"]
    assert host.hostctl_json("ledger", "list", "--event", "drift", "--since", "1h")["entries"] == []
    assert len(host.hostctl_json("ledger", "list", "--principal", said[0]["principal"])["entries"]) >= 9
    assert len(host.hostctl_json("ledger", "list", "--tenant", said[0]["tenant"], "-n", "2")["entries"]) == 2
    assert host.hostctl_json("ledger", "list", "--start", str(number), "-n", "1")["entries"] == said[:1]
    assert host.hostctl_json("ledger", "list", "--start", "2000000000")["entries"] == []
    assert host.hostctl_json("ledger", "show", str(number)) == said[0]
    assert host.hostctl("ledger", "show", "2000000000", check=False).returncode == 2
    proof = tmp_path / "proof.json"
    proof.write_text(host.hostctl("ledger", "prove", str(number)).stdout)
    host.hostctl("ledger", "export", str(tmp_path / "out"))
    size = len(host.ledger())
    consistent = json.loads(host.hostctl("ledger", "consistency", "3", str(size)).stdout)
    assert (consistent["old"], consistent["new"]) == (3, size)
    key = host.hostctl("ledger", "checkpoint", "--key").stdout.strip()
    assert json.loads(Path(trust).read_text())["ledger"] == [key]
    note = host.hostctl("ledger", "checkpoint").stdout.encode()
    noted = parse_checkpoint(note)
    bundle = parse_bundle(Path(trust).read_bytes())
    assert verify_checkpoint(noted, bundle) == (key.partition("+")[0], "TPM quote")
    used(host)
    host.stop()
    size = parse_checkpoint((host.state / "checkpoint").read_bytes()).size
    assert size == json.loads((host.state / "head.json").read_bytes())["size"]
    # The last head is of before the vault wrote that it stops.
    later = {tmp_path / "out": 0, host.state: len(host.ledger()) - size}
    assert later[host.state] == 1
    for folder, count in later.items():
        checked = host.hostctl("ledger", "verify", "--dir", str(folder), "--trust", trust)
        after = f" (and {count} after them that no signature here covers)" if count else ""
        assert f"entries lead to the signed root{after}; signed by: hostd-ledger/" in checked.stdout
        assert checked.stdout.endswith(", TPM quote\n")
    checked = host.hostctl("ledger", "prove", "--check", str(proof), "--trust", trust)
    assert f"entry {number} is in the ledger" in checked.stdout
    path = host.state / "ledger.jsonl"
    path.write_bytes(b"".join(edited(path.read_bytes().splitlines(keepends=True))))
    checked = host.hostctl("ledger", "verify", "--dir", str(host.state), "--trust", trust, check=False)
    assert (checked.returncode, checked.stdout) == (4, "ledger.jsonl line 6: entry 5 was edited\n")


def test_verify_says_so_from_the_command_line(host: Host) -> None:
    used(host)
    entries = host.hostctl_json("ledger", "list", "-n", "50")["entries"]
    assert [e["seq"] for e in entries] == list(range(len(entries)))
    assert {"operation", "start", "unseal", "officers", "manifest"} <= {e["event"] for e in entries}
    until(lambda: host.hostctl("ledger", "verify").returncode == 0, "it agrees")
