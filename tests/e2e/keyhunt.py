"""Finding out a host's keys as whoever has its state and its TPM can, and looking for them everywhere."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_der_private_key

from hostd.platform import swtpm
from hostd.platform.tpm import open_tpm
from hostd.platform.tpm_files import parse_blob, parse_record, read_file
from hostd.platform.tpm_tcti import open_link
from hostd.vault import primitives
from hostd.vault.keyring import binding
from hostd.vault.store import Store
from tests.e2e.harness import directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.harness import Host

_CHUNK = 8 << 20


def keys_of(host: Host) -> dict[str, bytes]:
    """Name → secret: the root key, the tenants' key-encryption keys, every version's material.

    From a copy of the state, whose TPM is a copy too, while the host itself runs on."""
    with directory() as place:
        state = place / "state"
        shutil.copytree(host.state, state)
        running = swtpm.start(state / "swtpm", place / "tpm")
        try:
            record = parse_record(read_file(state / "tpm.json"))
            tpm = open_tpm(lambda: open_link("swtpm", place / "tpm"), record, command_s=10)
            root = bytes(tpm.unseal(parse_blob(read_file(state / "root.json"))))
            tpm.close()
        finally:
            running.stop()
        store = Store(state / "store.sqlite")
        try:
            return dict(_derived(store, root))
        finally:
            store.close()


def _derived(store: Store, root: bytes) -> Iterator[tuple[str, bytes]]:
    yield "ROOT", root
    for tenant, _count in store.tenants():
        generation = store.kek_generation(tenant)
        assert generation is not None
        kek = primitives.derive_kek(root, store=store.store_id, tenant=tenant, generation=generation)
        yield f"KEK of {tenant}", kek
        for key in store.keys(tenant, "", 1000):
            for version in key.versions:
                bound = binding(key, version.version, version.state, version.generation)
                material = primitives.unwrap(kek, version.wrapped, bound)
                name = f"{key.algorithm} {key.id} v{version.version}"
                yield name, material if len(material) == 32 else _scalar(material)


def _scalar(der: bytes) -> bytes:
    private = load_der_private_key(der, password=None)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.private_numbers().private_value.to_bytes(32, "big")
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.private_bytes_raw()
    return der[-64:]


class Search:
    """Looks for secrets: raw, reversed (how a bignum lies in memory), hex in both cases, base64."""

    def __init__(self, secrets: dict[str, bytes]) -> None:
        self._names: dict[bytes, str] = {}
        for name, secret in secrets.items():
            encoded = base64.b64encode(secret).rstrip(b"=")[:-1]
            for form in (secret, secret[::-1], secret.hex().encode(), secret.hex().upper().encode(), encoded):
                self._names[form] = name
        self._pattern = re.compile(b"|".join(map(re.escape, self._names)))
        self._longest = max(map(len, self._names))

    def in_bytes(self, data: bytes) -> set[str]:
        return {self._names[match.group()] for match in self._pattern.finditer(data)}

    def in_folder(self, folder: Path) -> dict[str, set[str]]:
        files = (p for p in folder.rglob("*") if p.is_file())
        return {str(p): found for p in files if (found := self.in_bytes(p.read_bytes()))}

    def in_memory(self, pid: int) -> set[str]:
        """Every readable page of a process."""
        found: set[str] = set()
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        try:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                span, permissions = line.split()[:2]
                start, end = (int(part, 16) for part in span.split("-"))
                if permissions[0] == "r" and "[v" not in line:
                    found |= self._in_range(memory, start, end)
        finally:
            os.close(memory)
        return found

    def _in_range(self, memory: int, start: int, end: int) -> set[str]:
        found: set[str] = set()
        for at in range(start, end, _CHUNK):
            # A page that cannot be read (memfd_secret, a hole in a file) is not there to be searched.
            with contextlib.suppress(OSError):
                found |= self.in_bytes(os.pread(memory, min(_CHUNK, end - at) + self._longest, at))
        return found
