"""A process that makes and uses keys as the vault does, and tells whoever started it which: for looking for
them from outside.

Run as `python -m tests.vault.hold_keys FOLDER hidden|locked`. It writes lines of JSON: `{"name", "inverted"}`
for each secret the moment that it exists, and `{"done": STEP}` after each step, then waits for a line. A
secret leaves inverted, byte by byte, so that telling it leaves no copy here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from guestlib.errors import HostdError
from hostd.core.callers import Caller, host_principal
from hostd.core.keys import SCHEMES, USAGE, Algorithm, KeyRecord, State, Use
from hostd.ipc import many_operations as many
from hostd.ipc import operations as ops
from hostd.ipc.loop import Loop
from hostd.platform import confine, secretmem
from hostd.platform.secretmem import SecretBuffer
from hostd.vault import mint as mint_module
from hostd.vault import primitives
from hostd.vault.keyring import Keyring
from hostd.vault.membership import Membership
from hostd.vault.mint import STOCK, Mint
from hostd.vault.service import Service
from hostd.vault.store import Store

NOW = 1_700_000_000_000
TENANTS = {"red": Caller(uid=1), "blue": Caller(uid=2)}
SHORT = ("AES-256-GCM", "HMAC-SHA-256", "ECDSA-P256", "Ed25519")


def say(**what: str) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def tell(name: str, secret: bytes | bytearray | memoryview) -> None:
    say(name=name, inverted=bytes(byte ^ 0xFF for byte in secret).hex())


def listen_in() -> None:
    """Tells what is derived, wrapped and minted."""
    wrap, derive, whole = Keyring.wrap, primitives._derive, mint_module._whole

    def telling_wrap(
        self: Keyring, key: KeyRecord, version: int, state: State, generation: int, material: bytearray
    ) -> bytes:
        tell(f"{key.algorithm.value} {key.id} v{version}", material)
        return wrap(self, key, version, state, generation, material)

    def telling_derive(root: memoryview, store: bytes, info: bytes) -> bytearray:
        made = derive(root, store, info)
        tell(repr(info), made)
        return made

    def telling_whole(key: bytearray) -> bool:
        tell(f"minted {os.urandom(4).hex()}", key)
        return whole(key)

    Keyring.wrap = telling_wrap  # type: ignore[assignment, method-assign]
    primitives._derive = telling_derive  # type: ignore[assignment]
    mint_module._whole = telling_whole


class Holder:
    """The vault's parts that touch keys."""

    def __init__(self, folder: Path) -> None:
        self.loop = Loop()
        self.store = Store(folder / "store.sqlite", create=True)
        self.keyring = Keyring(self.store)
        root = secretmem.random(32)
        tell("ROOT", root)
        self.keyring.unlock(SecretBuffer.taking(root))
        self.mint = Mint(self.loop)
        self.mint.start()
        membership = Membership(self.store, self.keyring)
        self.service = Service(self.store, self.keyring, self.mint, membership)
        for tenant, caller in TENANTS.items():
            self.store.add_tenant(tenant, NOW)
            membership.bind(host_principal(caller.uid), tenant, NOW)
        self.answers: list[object] = []
        """What is kept until a batch has been answered, exceptions with their frames too."""
        self._tokens = 0

    def do(self, operation: ops.GatedOperation, tenant: str = "red") -> Any:
        try:
            done = self.service.execute(TENANTS[tenant], operation, NOW)
        except HostdError as error:
            self.answers.append(error)
            return None
        self.answers.append(done)
        self.keyring.salt(tenant, len(self.answers))
        return done.result

    def token(self) -> str:
        self._tokens += 1
        return f"token-{self._tokens:04}"

    def stocked(self) -> None:
        while len(self.mint._ready) < STOCK or self.mint._child is not None:
            self.loop.run_once(0.1)

    def make(self, algorithm: Any, tenant: str = "red") -> str:
        if algorithm == "RSA-3072":
            self.stocked()
        return str(self.do(ops.CreateKey(self.token(), algorithm), tenant).key.id)

    def use(self, key: str, tenant: str = "red") -> None:
        """Each operation, the key's own and all others, good requests and bad ones."""
        algorithm = Algorithm(self.do(ops.DescribeKey(key), tenant).key.algorithm)
        sealed = b"HDC1" + bytes.fromhex(key[4:]) + bytes(3) + b"\1" + bytes(40)
        if Use.ENCRYPT in USAGE[algorithm]:
            sealed = self.do(ops.Encrypt(key, b"plain", {}), tenant).ciphertext
        signature = mac = b"none"
        schemes = SCHEMES.get(algorithm, ())
        for scheme in (*schemes, "ed25519", "rsa-pss-sha256"):
            signed = self.do(ops.Sign(key, b"m", scheme), tenant)  # type: ignore[arg-type]
            signature = signed.signature if signed else signature
            self.do(ops.Verify(key, b"m", signature, scheme), tenant)  # type: ignore[arg-type]
        made = self.do(ops.Mac(key, b"m"), tenant)
        mac = made.mac if made else bytes(32)
        item, two = many.MessageItem(b"m"), (b"m", b"other")
        for operation in (
            ops.Decrypt(sealed, {}),
            ops.Decrypt(sealed, {"other": "aad"}),
            ops.Decrypt(sealed[:-1] + bytes([sealed[-1] ^ 1]), {}, key),
            ops.GenerateDataKey(key),
            ops.GetPublicKey(key),
            ops.VerifyMac(key, b"m", mac),
            ops.VerifyMac(key, b"m", bytes(32)),
            many.EncryptMany(key, tuple(many.EncryptItem(p, {}) for p in two)),
            many.DecryptMany(key, tuple(many.DecryptItem(c, {}) for c in (sealed, sealed[:-1], b"x" * 80))),
            many.SignMany(key, (item, item)),
            many.VerifyMany(key, tuple(many.VerifyItem(p, signature) for p in two)),
            many.MacMany(key, (item, item)),
            many.VerifyMacMany(key, tuple(many.VerifyMacItem(p, mac) for p in two)),
            ops.ListKeys(limit=2),
            ops.Rotate("key-" + "0" * 32, self.token()),
        ):
            self.do(operation, tenant)
            self.do(operation, "blue" if tenant == "red" else "red")

    def damaged(self, key: str) -> None:
        """A row that does not open, and then is as it was."""
        row = self.store._run("SELECT wrapped FROM versions WHERE key=?", key).fetchone()
        for wrapped in (row[0][:-1] + b"?", row[0][:20], row[0]):
            self.store._run("UPDATE versions SET wrapped=? WHERE key=?", wrapped, key)
            self.do(ops.Encrypt(key, b"plain", {}))

    def answered(self) -> None:
        self.store.commit()
        self.answers.clear()


def steps(holder: Holder) -> dict[str, Callable[[], object]]:
    keys: dict[str, list[str]] = {}

    def used() -> None:
        for tenant in TENANTS:
            for algorithm in SHORT:
                keys[f"{tenant} {algorithm}"] = [holder.make(algorithm, tenant) for _ in range(3)]
        keys["red RSA-3072"] = [holder.make("RSA-3072") for _ in range(2)]
        for name, some in keys.items():
            for key in some:
                holder.use(key, name.split()[0])
        holder.damaged(keys["red AES-256-GCM"][0])
        with suppress(HostdError):
            holder.keyring.checkpoint_key().sign(b"head")
        holder.stocked()

    def shredded() -> None:
        for name, some in keys.items():
            if name.startswith("red"):
                shred(name, some.pop())

    def shred(name: str, key: str) -> None:
        holder.do(ops.Shred(key, holder.token()), name.split()[0])
        say(shredded=key)

    def rotated() -> None:
        for name, some in keys.items():
            if name.startswith("red") and len(some) > 1:
                key = some.pop()
                sealed = holder.do(ops.Encrypt(key, b"plain", {}))
                holder.do(ops.Rotate(key, holder.token()))
                holder.use(key)
                if sealed:
                    holder.do(ops.Decrypt(sealed.ciphertext, {}))
                holder.do(ops.Verify(key, b"m", bytes(64), version=1))
                shred(name, key)

    def batches() -> None:
        for name, some in keys.items():
            for key in some:
                holder.use(key, name.split()[0])
        after = None
        while page := holder.do(ops.ListKeys(after, 2)):
            after = page.next
            if after is None:
                break

    def dropped() -> None:
        holder.keyring.drop()
        for name, some in keys.items():
            for key in some:
                holder.do(ops.Encrypt(key, b"plain", {}), name.split()[0])
                holder.do(ops.Mac(key, b"m"), name.split()[0])
                holder.do(ops.GetPublicKey(key), name.split()[0])
        holder.keyring.drop()

    def tenant_locked() -> None:
        holder.keyring.lock_tenants(frozenset({"red"}))
        holder.do(ops.Encrypt(keys["red AES-256-GCM"][0], b"plain", {}))

    def locked() -> None:
        holder.keyring.lock_tenants(frozenset())
        batches()
        holder.keyring.lock()
        holder.mint.stop()
        holder.do(ops.Encrypt(keys["red AES-256-GCM"][0], b"plain", {}))

    return {
        step.__name__: step for step in (used, shredded, rotated, batches, dropped, tenant_locked, locked)
    }


def main() -> None:
    confine.undumpable()
    if sys.argv[2] == "locked":
        secretmem._map_secret = lambda _size: None
    listen_in()
    holder = Holder(Path(sys.argv[1]))
    for name, step in steps(holder).items():
        step()
        holder.answered()
        say(done=name)
        sys.stdin.readline()


if __name__ == "__main__":
    main()
