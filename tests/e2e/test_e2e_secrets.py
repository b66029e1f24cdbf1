"""Promise: no key material anywhere but in the vault, and after a lock no root key there either."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestlib.errors import HostdError, RefusedDriftError
from tests.e2e.harness import Host, Settings, adopted, until
from tests.e2e.keyhunt import Search, keys_of
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
ALGORITHMS = ("AES-256-GCM", "HMAC-SHA-256", "ECDSA-P256", "Ed25519")


@pytest.fixture
def host(binary: Path, vm: qemu.Vm) -> Iterator[Host]:
    with adopted(binary, Settings(more='[drift]\nscope = "host"\n')) as made:
        yield made


def used(host: Host) -> list[bytes]:
    """Makes and uses keys of every kind, well and badly; everything that hostd said."""
    client = host.client(attested=True)
    said: list[bytes] = [b"".join(client.evidence(os.urandom(32)))]
    keys = [client.create_key(algorithm).key.id for algorithm in ALGORITHMS]
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
    assert len(secrets) == 2 + len(ALGORITHMS) + 1
    search = Search(secrets)
    # The search finds what is there: keys in use are in the vault's memory.
    assert any(name.startswith("AES") for name in search.in_memory(host.pid("vault")))
    assert search.in_bytes(b"".join(said)) == set()
    assert search.in_folder(host.directory) == {}
    assert host.supervisor is not None
    others = {role: pid for role, pid in host.pids().items() if role != "vault"}
    others |= {f"worker {pid}": pid for pid in host.workers()}
    others |= {"supervisor": host.supervisor.pid, "QEMU": vm.pid}
    for role, pid in others.items():
        assert search.in_memory(pid) == set(), role


def test_root_key_leaves_memory_when_the_host_drifts(host: Host, vm: qemu.Vm) -> None:
    used(host)
    search = Search(keys_of(host))
    vault = host.pid("vault")
    text = tamper.mapping(vm.pid, "qemu-under-test", 5)
    tamper.write(vm.pid, text.start + 64, bytes([tamper.read(vm.pid, text.start + 64, 1)[0] ^ 1]))
    with pytest.raises(RefusedDriftError):
        host.client().random(8)
    until(lambda: (s := host.status()) and not s.keys_unlocked, "the vault is locked")
    left = search.in_memory(vault)
    print(f"left in freed memory after the lock: {sorted(left) or 'nothing'}")
    assert "ROOT" not in left
    assert host.pid("vault") == vault
