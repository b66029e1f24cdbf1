"""Finding out a host's keys as whoever has its state and its TPM can."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

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


def keys_of(host: Host) -> dict[str, bytes]:
    """Name → secret: the root key, the keys derived from it for tenants, every version's material.

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
        yield f"KEK of {tenant}", bytes(kek)
        salt = primitives.derive_salt_key(root, store=store.store_id, tenant=tenant)
        yield f"salt key of {tenant}", bytes(salt)
        for key in store.keys(tenant, "", 1000):
            for version in key.versions:
                if not version.wrapped:
                    continue
                bound = binding(key, version.version, version.state, version.generation)
                material = primitives.unwrap(kek, version.wrapped, bound)
                yield f"{key.algorithm} {key.id} v{version.version}", bytes(material)
