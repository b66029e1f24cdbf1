"""Promise: while hostd runs, a change of the ledger's file is found and named by its entry; and what was
recorded under a signed head cannot be taken away unnoticed while it was stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

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


def test_verify_says_so_from_the_command_line(host: Host) -> None:
    used(host)
    entries = host.hostctl_json("ledger", "list", "-n", "50")["entries"]
    assert [e["seq"] for e in entries] == list(range(len(entries)))
    assert {"operation", "start", "unseal", "officers", "manifest"} <= {e["event"] for e in entries}
    until(lambda: host.hostctl("ledger", "verify").returncode == 0, "it agrees")
