"""The guests' operations, executed for a caller whose measurements are good.

Called by `hostd.vault.batches` only, after the gate has let the request pass. Each operation finds
the caller's tenant from its principal, looks keys up among that tenant's only, checks state and
usage, and works. A key of another tenant is `not_found`, as a key that never was.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from guestlib.errors import ConflictError, DeniedError, NotFoundError, WrongStateError
from hostd.core.keys import (
    SCHEMES,
    USAGE,
    Algorithm,
    Event,
    KeyRecord,
    Listed,
    State,
    Use,
    VersionRecord,
    after,
    scheme_of,
)
from hostd.core.keys import check_use as _check_use
from hostd.ipc import operations as ops
from hostd.ipc.fields import MAX_VERSIONS_SHOWN
from hostd.platform.secretmem import wipe
from hostd.vault import primitives
from hostd.vault.cost import cost
from hostd.vault.done import Done
from hostd.vault.many import Many

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.callers import Caller
    from hostd.vault.keyring import Keyring
    from hostd.vault.membership import Membership
    from hostd.vault.mint import Mint
    from hostd.vault.store import Store

MAX_VERSIONS: Final = 100
"""Versions of one key; over it, rotate into a new key."""
MAX_KEYS: Final = 10_000
"""Keys of one tenant."""


class Service:
    """Executes gated operations on the store and the keyring."""

    def __init__(self, store: Store, keyring: Keyring, mint: Mint, membership: Membership) -> None:
        self._store = store
        self._membership = membership
        self._keyring = keyring
        self._mint = mint
        self._now = 0
        self._table: dict[type[ops.Operation], Callable[..., Done]] = {
            ops.CreateKey: self._create_key,
            ops.DescribeKey: self._describe_key,
            ops.ListKeys: self._list_keys,
            ops.Encrypt: self._encrypt,
            ops.Decrypt: self._decrypt,
            ops.GenerateDataKey: self._generate_data_key,
            ops.Sign: self._sign,
            ops.Verify: self._verify,
            ops.GetPublicKey: self._get_public_key,
            ops.Mac: self._mac,
            ops.VerifyMac: self._verify_mac,
            ops.GenerateRandom: self._generate_random,
            ops.Rotate: self._rotate,
            ops.Shred: self._shred,
            **Many(keyring, self._usable, self._key).table(),
        }

    def execute(self, caller: Caller, operation: ops.GatedOperation, now: int) -> Done:
        """Does one operation; `now` is UTC in milliseconds.

        Raises:
            HostdError: the typed refusal; the store is then as `batches` rolls it back.
        """
        self._now = now
        tenant = self._membership.tenant_of(caller.principal)
        if tenant is None:
            raise DeniedError("this caller belongs to no tenant")
        return self._table[type(operation)](tenant, operation)

    def cost(self, caller: Caller, operation: ops.GatedOperation) -> int:
        """What the operation will cost, in units of `hostd.vault.cost`; no secret is touched.

        Raises:
            StoreError: the store cannot be read.
        """

        def algorithm(reference: str) -> Algorithm | None:
            bound = self._store.binding(caller.principal)
            key = None if bound is None else self._store.key(bound[0], reference)
            return None if key is None else key.algorithm

        return cost(operation, algorithm)

    # ── Keys ──────────────────────────────────────────────────────────────────────────────────────

    def _key(self, tenant: str, reference: str) -> KeyRecord:
        key = self._store.key(tenant, reference)
        if key is None:
            raise NotFoundError("no such key")
        return key

    @staticmethod
    def _version(key: KeyRecord, number: int | None) -> VersionRecord:
        if number is None:
            return key.current
        if number > len(key.versions):
            raise NotFoundError("no such version of the key")
        return key.versions[number - 1]

    @staticmethod
    def _check(key: KeyRecord, version: VersionRecord, use: Use) -> None:
        _check_use(key.algorithm, key.state, use)
        _check_use(key.algorithm, version.state, use)

    def _usable(
        self, tenant: str, reference: str, use: Use, number: int | None = None
    ) -> tuple[KeyRecord, VersionRecord]:
        key = self._key(tenant, reference)
        version = self._version(key, number)
        self._check(key, version, use)
        return key, version

    def _repeated(self, tenant: str, op: ops.CreateKey | ops.Rotate | ops.Shred) -> KeyRecord | None:
        """The key that this very request made or changed before; a token serves one request only."""
        used = self._store.token(tenant, op.token)
        if used is None:
            return None
        request, key = used
        if request != _request_digest(op):
            raise ConflictError("this token was used for another request")
        return self._key(tenant, key)

    def _remember(self, tenant: str, op: ops.CreateKey | ops.Rotate | ops.Shred, key: str) -> None:
        self._store.put_token(tenant, op.token, _request_digest(op), key, self._now)

    def _new_version(self, key: KeyRecord, number: int) -> VersionRecord:
        material = self._mint.generate(key.algorithm)
        try:
            wrapped = self._keyring.wrap(key, number, State.ACTIVE, 1, material)
        finally:
            wipe(material)
        return VersionRecord(
            version=number, state=State.ACTIVE, created=self._now, generation=1, wrapped=wrapped
        )

    def _create_key(self, tenant: str, op: ops.CreateKey) -> Done:
        key = self._repeated(tenant, op)
        if key is None:
            if self._store.count_keys(tenant) >= MAX_KEYS:
                raise ConflictError(f"the tenant has {MAX_KEYS} keys, the limit")
            key = KeyRecord(
                id="key-" + os.urandom(16).hex(),
                tenant=tenant,
                algorithm=Algorithm(op.algorithm),
                state=State.ACTIVE,
                created=self._now,
                alias=op.alias,
                versions=(),
            )
            key = replace(key, versions=(self._new_version(key, 1),))
            self._store.put_key(key)
            self._remember(tenant, op, key.id)
        return _done(key)

    def _describe_key(self, tenant: str, op: ops.DescribeKey) -> Done:
        return _done(self._key(tenant, op.key))

    def _list_keys(self, tenant: str, op: ops.ListKeys) -> Done:
        found = self._store.listed(tenant, op.after or "", op.limit + 1, MAX_VERSIONS_SHOWN)
        page = found[: op.limit]
        result = ops.KeyListResult(
            keys=tuple(map(_info, page)), next=page[-1].id if len(found) > op.limit else None
        )
        return Done(result, tenant)

    def _rotate(self, tenant: str, op: ops.Rotate) -> Done:
        key = self._repeated(tenant, op)
        if key is None:
            key = self._key(tenant, op.key)
            if key.state is not State.ACTIVE:
                raise WrongStateError(f"a key that is {key.state} is not rotated")
            if len(key.versions) >= MAX_VERSIONS:
                raise ConflictError(f"the key has {MAX_VERSIONS} versions, the limit")
            old = self._keyring.rewrap(key, key.current, after(key.current.state, Event.DEACTIVATE))
            new = self._new_version(key, old.version + 1)
            key = replace(key, versions=(*key.versions[:-1], old, new))
            self._store.put_key(key)
            self._remember(tenant, op, key.id)
            self._keyring.forget(key.id)
        return _done(key)

    def _shred(self, tenant: str, op: ops.Shred) -> Done:
        key = self._repeated(tenant, op)
        if key is None:
            key = self._key(tenant, op.key)
            versions = tuple(
                replace(v, state=State.DESTROYED, generation=v.generation + 1, wrapped=b"")
                for v in key.versions
            )
            key = replace(key, state=after(key.state, Event.SHRED), alias=None, versions=versions)
            self._store.put_key(key)
            self._remember(tenant, op, key.id)
            self._keyring.forget(key.id)
        return _done(key)

    # ── Use ───────────────────────────────────────────────────────────────────────────────────────

    def _encrypt(self, tenant: str, op: ops.Encrypt) -> Done:
        key, version = self._usable(tenant, op.key, Use.ENCRYPT)
        return self._sealed(key, version, op.plaintext, op.aad)

    def _sealed(self, key: KeyRecord, version: VersionRecord, plaintext: bytes, aad: dict[str, str]) -> Done:
        ciphertext = primitives.seal(
            self._keyring.secret(key, version), key.raw_id, version.version, plaintext, aad
        )
        result = ops.EncryptResult(ciphertext=ciphertext, key=key.id, version=version.version)
        return Done(result, key.tenant, key.id, version.version)

    def _decrypt(self, tenant: str, op: ops.Decrypt) -> Done:
        raw_id, number = primitives.parse_header(op.ciphertext)
        key = self._key(tenant, "key-" + raw_id.hex())
        if op.key is not None and self._key(tenant, op.key).id != key.id:
            raise ConflictError("the ciphertext is of another key")
        if number < 1:
            raise NotFoundError("no such version of the key")
        version = self._version(key, number)
        self._check(key, version, Use.DECRYPT)
        plaintext = primitives.open_sealed(self._keyring.secret(key, version), op.ciphertext, op.aad)
        result = ops.DecryptResult(plaintext=plaintext, key=key.id, version=number)
        return Done(result, tenant, key.id, number)

    def _generate_data_key(self, tenant: str, op: ops.GenerateDataKey) -> Done:
        key, version = self._usable(tenant, op.key, Use.ENCRYPT)
        data_key = os.urandom(op.length)
        done = self._sealed(key, version, data_key, op.aad)
        assert isinstance(done.result, ops.EncryptResult)
        result = ops.DataKeyResult(
            ciphertext=done.result.ciphertext,
            key=key.id,
            version=version.version,
            plaintext=data_key if op.plaintext else None,
        )
        return replace(done, result=result)

    def _sign(self, tenant: str, op: ops.Sign) -> Done:
        key, version = self._usable(tenant, op.key, Use.SIGN)
        scheme = scheme_of(key.algorithm, op.scheme)
        signature = primitives.sign(self._keyring.private(key, version), scheme, op.message)
        result = ops.SignResult(signature=signature, key=key.id, version=version.version, scheme=scheme)
        return Done(result, tenant, key.id, version.version)

    def _verify(self, tenant: str, op: ops.Verify) -> Done:
        key, version = self._usable(tenant, op.key, Use.VERIFY, op.version)
        valid = primitives.signature_matches(
            self._keyring.private(key, version),
            scheme_of(key.algorithm, op.scheme),
            op.message,
            op.signature,
        )
        result = ops.VerifyResult(valid=valid, key=key.id, version=version.version)
        return Done(result, tenant, key.id, version.version)

    def _get_public_key(self, tenant: str, op: ops.GetPublicKey) -> Done:
        key, version = self._usable(tenant, op.key, Use.PUBLIC, op.version)
        result = ops.PublicKeyResult(
            public_key=primitives.public_der(self._keyring.private(key, version)),
            key=key.id,
            version=version.version,
            algorithm=key.algorithm.value,
        )
        return Done(result, tenant, key.id, version.version)

    def _mac(self, tenant: str, op: ops.Mac) -> Done:
        key, version = self._usable(tenant, op.key, Use.MAC)
        tag = primitives.mac(self._keyring.secret(key, version), op.message)
        return Done(
            ops.MacResult(mac=tag, key=key.id, version=version.version), tenant, key.id, version.version
        )

    def _verify_mac(self, tenant: str, op: ops.VerifyMac) -> Done:
        key, version = self._usable(tenant, op.key, Use.VERIFY_MAC, op.version)
        valid = primitives.mac_matches(self._keyring.secret(key, version), op.message, op.mac)
        result = ops.VerifyResult(valid=valid, key=key.id, version=version.version)
        return Done(result, tenant, key.id, version.version)

    def _generate_random(self, tenant: str, op: ops.GenerateRandom) -> Done:
        return Done(ops.RandomResult(random=os.urandom(op.length)), tenant)


def _request_digest(op: ops.CreateKey | ops.Rotate | ops.Shred) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(op)).digest()


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


def _done(key: KeyRecord) -> Done:
    return Done(ops.KeyResult(_info(key)), key.tenant, key.id, key.current.version)


def _info(key: KeyRecord | Listed) -> ops.KeyInfo:
    return ops.KeyInfo(
        id=key.id,
        algorithm=key.algorithm.value,
        state=key.state.value,
        version=key.current.version,
        created=_time(key.created),
        usage=tuple(sorted(u.value for u in USAGE[key.algorithm])),
        schemes=SCHEMES.get(key.algorithm, ()),
        versions=tuple(
            ops.KeyVersionInfo(version=v.version, state=v.state.value, created=_time(v.created))
            for v in key.versions[-MAX_VERSIONS_SHOWN:]
        ),
        alias=key.alias,
    )
