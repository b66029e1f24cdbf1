"""Promise: no key material anywhere but in the vault; there while it is in use, and none after a lock."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestlib.errors import HostdError, OverloadedError, RefusedDriftError
from hostd.platform.secretmem import SecretBuffer
from tests.e2e.harness import Host, Settings, adopted, until
from tests.e2e.keyhunt import keys_of
from tests.support import qemu, tamper
from tests.support.keysearch import Search

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guestlib.client import Client

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
ALGORITHMS = ("AES-256-GCM", "HMAC-SHA-256", "ECDSA-P256", "Ed25519")


@pytest.fixture
def host(binary: Path, vm: qemu.Vm) -> Iterator[Host]:
    with adopted(binary, Settings(more='[drift]\nscope = "host"\n')) as made:
        yield made


def rsa_key(client: Client) -> str:
    made: list[str] = []

    def ready() -> bool:
        try:
            made.append(client.create_key("RSA-3072").key.id)
        except OverloadedError:
            return False
        return True

    until(ready, "an RSA key is in stock", 60.0)
    return made[0]


def hidden() -> bool:
    """Whether this kernel has memory that is not seen from outside."""
    probe = SecretBuffer(1)
    try:
        return probe.hidden
    finally:
        probe.wipe()


def private(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("ECDSA", "Ed25519", "RSA"))}


def used(host: Host) -> list[bytes]:
    """Makes and uses keys of every kind, well and badly; everything that hostd said."""
    client = host.client(attested=True)
    said: list[bytes] = [b"".join(client.evidence(os.urandom(32)))]
    keys = [client.create_key(algorithm).key.id for algorithm in ALGORITHMS]
    keys.append(rsa_key(client))
    client.rotate(keys[0])
    for key in keys:
        for use in (
            lambda key: client.encrypt(key, b"x"),
            lambda key: client.sign(key, b"x"),
            lambda key: client.mac(key, b"x"),
            client.get_public_key,
            client.describe_key,
            lambda key: client.decrypt(b"HDC1" + bytes(60), key=key),
        ):
            try:
                said.append(repr(use(key)).encode())
            except HostdError as error:
                said.append(repr(error).encode())
    port = int((host.run / "metrics.port").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        said.append(answer.read())
    said.append(host.hostctl("--json", "ledger", "list", "-n", "1000").stdout.encode())
    said.append(host.hostctl("key", "list", "acme").stdout.encode())
    return said


def test_nowhere_but_in_the_vault(host: Host, vm: qemu.Vm) -> None:
    said = used(host)
    secrets = keys_of(host)
    assert len(secrets) == 3 + len(ALGORITHMS) + 1 + 1
    search = Search(secrets)
    # The search finds what is there: private keys in use are in OpenSSL's memory.
    found = search.in_memory(host.pid("vault"))
    assert private(found) == private(set(secrets))
    if hidden():
        assert found == private(found)
    assert search.in_bytes(b"".join(said)) == set()
    assert search.in_folder(host.directory) == {}
    assert host.supervisor is not None
    others = {role: pid for role, pid in host.pids().items() if role != "vault"}
    others |= {f"worker {pid}": pid for pid in host.workers()}
    others |= {"supervisor": host.supervisor.pid, "QEMU": vm.pid}
    for role, pid in others.items():
        assert search.in_memory(pid) == set(), role


def test_shredded_keys_leave_memory_and_others_stay(host: Host, vm: qemu.Vm) -> None:
    used(host)
    secrets = keys_of(host)
    search, vault = Search(secrets), host.pid("vault")
    client = host.client(attested=True)
    gone: set[str] = set()
    for algorithm in (*ALGORITHMS, "RSA-3072"):
        key = next(name.split()[1] for name in secrets if name.startswith(algorithm))
        if algorithm == "Ed25519":
            client.rotate(key)
        client.shred(key)
        gone |= {name for name in secrets if key in name}
        found = search.in_memory(vault)
        assert found & gone == set(), algorithm
        assert private(set(secrets)) - gone <= found
    assert host.pid("vault") == vault


def test_no_key_is_left_in_memory_when_the_host_drifts(host: Host, vm: qemu.Vm) -> None:
    used(host)
    search = Search(keys_of(host))
    vault = host.pid("vault")
    assert private(search.in_memory(vault))
    text = tamper.mapping(vm.pid, "qemu-under-test", 5)
    tamper.write(vm.pid, text.start + 64, bytes([tamper.read(vm.pid, text.start + 64, 1)[0] ^ 1]))
    with pytest.raises(RefusedDriftError):
        host.client().random(8)
    until(lambda: (s := host.status()) and not s.keys_unlocked, "the vault is locked")
    assert search.in_memory(vault) == set()
    assert host.pid("vault") == vault
