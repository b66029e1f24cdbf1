"""Which keys a process's memory holds, looked at from another process: while they are used, after one was
shredded, after a lock.

With `memfd_secret` only private keys in use can be seen (OpenSSL has them in its own memory). Without it the
rest can be seen too while it is in use, so the search is shown to find every kind of key.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.platform.secretmem import SecretBuffer
from tests.support.keysearch import Search

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="looks into another process as root does")
ROOT = Path(__file__).resolve().parents[2]
STEPS = ("used", "shredded", "rotated", "batches", "dropped", "tenant_locked", "locked")
PRIVATE = ("ECDSA-P256", "Ed25519", "RSA-3072", "minted")


class Holder:
    """The process, and what it told of itself."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.secrets: dict[str, bytes] = {}
        self.shredded: list[str] = []

    def step(self, name: str) -> None:
        """Waits until it has done the step."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "done" in said:
                assert said["done"] == name
                return
            if "shredded" in said:
                self.shredded.append(said["shredded"])
            else:
                self.secrets[said["name"]] = bytes(b ^ 0xFF for b in bytes.fromhex(said["inverted"]))
        raise AssertionError(f"it ended before {name}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    def found(self) -> set[str]:
        # One number, several names: a key that was minted and then somebody's.
        names = {material: name for name, material in self.secrets.items()}
        places = Search({name: material for material, name in names.items()}).places(self.process.pid)
        return set(places)


@pytest.fixture(params=["hidden", "locked"])
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Holder]:
    if request.param == "hidden":
        probe = SecretBuffer(1)
        if not probe.hidden:
            pytest.skip("this kernel has no memfd_secret")
        probe.wipe()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.vault.hold_keys", str(tmp_path), request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=ROOT,
    ) as process:
        try:
            yield Holder(process)
        finally:
            process.kill()


def of_kinds(names: set[str], *kinds: str) -> set[str]:
    return {name for name in names if name.startswith(kinds)}


def test_the_search_finds_pieces_wherever_they_begin() -> None:
    secret = os.urandom(32)
    search = Search({"it": secret})
    for form in (secret, secret[::-1], secret.hex().encode(), base64.b64encode(secret)):
        for at in range(8):
            assert search.in_bytes(bytes(at) + form) == {"it"}
    for at in range(8):
        assert search.in_bytes(bytes(at) + secret[:15] + bytes(9)) == {"it"}
        assert search.in_bytes(bytes(16 + at) + secret[17:]) == {"it"}
    assert search.in_bytes(secret.hex().encode()[:40] + os.urandom(100)) == set()


def test_keys_are_in_memory_only_while_they_are_used(holder: Holder, request: pytest.FixtureRequest) -> None:
    hidden = request.node.callspec.params["holder"] == "hidden"
    for step in STEPS:
        holder.step(step)
        found = holder.found()
        names = set(holder.secrets)
        gone = {name for name in names if any(key in name for key in holder.shredded)}
        assert found & gone == set(), step
        if step == "locked":
            assert found == set()
        elif hidden:
            assert of_kinds(found, *PRIVATE) == found, step
        if step in ("used", "batches"):
            assert of_kinds(found, "Ed25519", "ECDSA") == of_kinds(names, "Ed25519", "ECDSA") - gone
            assert len(of_kinds(found, "RSA")) == (2 if step == "used" else 1)
            assert len(of_kinds(found, "minted")) == 2
            if not hidden:
                checkpoint = {name for name in names if "checkpoint" in name}
                minted = of_kinds(names, "minted")
                assert found >= names - gone - checkpoint - minted
        if step == "dropped":
            assert of_kinds(found, "ROOT", "minted") == found
        if step == "tenant_locked":
            assert of_kinds(found, "AES", "HMAC", "ECDSA", "Ed25519", "RSA", "b'hostd salt") == set()
        holder.go_on()
    assert len(holder.shredded) == 9
    # Every kind of key was planted.
    for kind in ("ROOT", "b'hostd kek v1", "b'hostd salt key", "b'hostd checkpoint", "AES", "HMAC", *PRIVATE):
        assert of_kinds(set(holder.secrets), kind), kind
