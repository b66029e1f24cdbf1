"""Batch operations: many items, one key, one request, one ledger entry.

An operation whose items cannot fail one by one (EncryptMany, SignMany, MacMany) is done wholly or not at all.
DecryptMany answers each item by itself, because what somebody else stored may be broken; which errors an
item may have is decided by the item and the caller's own key alone: a ciphertext that names any other key
is `conflict`, and that other key is never looked up. The key's state, the store and the keyring fail
the request as a whole.

The ledger's `detail` names the count, what was refused, and the versions if they are several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestlib.errors import CallerError, ConflictError, MalformedError, NotFoundError
from hostd.core.keys import Algorithm, Use, check_use, scheme_of
from hostd.ipc import many_operations as ops
from hostd.ipc.fields import MAX_BATCH_RSA_SIGNATURES
from hostd.vault import primitives
from hostd.vault.done import Done

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from hostd.core.keys import KeyRecord, VersionRecord
    from hostd.ipc.operations import Operation
    from hostd.vault.keyring import Keyring

    class Usable(Protocol):
        """Finds a tenant's key and version and checks that they may be used so (`Service`)."""

        def __call__(
            self, tenant: str, reference: str, use: Use, number: int | None = None
        ) -> tuple[KeyRecord, VersionRecord]: ...


class Many:
    """Executes the batch operations."""

    def __init__(self, keyring: Keyring, usable: Usable, key: Callable[[str, str], KeyRecord]) -> None:
        self._keyring = keyring
        self._usable = usable
        self._key = key

    def table(self) -> dict[type[Operation], Callable[..., Done]]:
        return {
            ops.EncryptMany: self._encrypt,
            ops.DecryptMany: self._decrypt,
            ops.SignMany: self._sign,
            ops.VerifyMany: self._verify,
            ops.MacMany: self._mac,
            ops.VerifyMacMany: self._verify_mac,
        }

    def _encrypt(self, tenant: str, op: ops.EncryptMany) -> Done:
        key, version = self._usable(tenant, op.key, Use.ENCRYPT)
        secret, raw_id = self._keyring.secret(key, version), key.raw_id
        ciphertexts = tuple(
            primitives.seal(secret, raw_id, version.version, item.plaintext, item.aad) for item in op.items
        )
        result = ops.EncryptManyResult(ciphertexts=ciphertexts, key=key.id, version=version.version)
        return _done(result, key, version, len(op.items))

    def _decrypt(self, tenant: str, op: ops.DecryptMany) -> Done:
        key = self._key(tenant, op.key)
        check_use(key.algorithm, key.state, Use.DECRYPT)
        items = tuple(self._decrypt_item(key, item) for item in op.items)
        versions = sorted({item.version for item in items if item.version is not None})
        refused = sum(item.error is not None for item in items)
        detail = f"{len(items)} items" + (f", {refused} refused" if refused else "")
        if len(versions) > 1:
            detail += f", versions {', '.join(map(str, versions))}"
        version = versions[0] if len(versions) == 1 else 0
        return Done(ops.DecryptManyResult(items=items, key=key.id), tenant, key.id, version, detail)

    def _decrypt_item(self, key: KeyRecord, item: ops.DecryptItem) -> ops.DecryptedItem:
        try:
            raw_id, number = primitives.parse_header(item.ciphertext)
            if raw_id != key.raw_id:
                raise ConflictError("the ciphertext is of another key")
            if not 1 <= number <= len(key.versions):
                raise NotFoundError("no such version of the key")
            version = key.versions[number - 1]
            check_use(key.algorithm, version.state, Use.DECRYPT)
            plaintext = primitives.open_sealed(self._keyring.secret(key, version), item.ciphertext, item.aad)
        except CallerError as error:
            return ops.DecryptedItem(error=ops.ItemError(code=error.code, message=error.message))
        return ops.DecryptedItem(plaintext=plaintext, version=number)

    def _sign(self, tenant: str, op: ops.SignMany) -> Done:
        key, version = self._usable(tenant, op.key, Use.SIGN)
        if key.algorithm is Algorithm.RSA_3072 and len(op.items) > MAX_BATCH_RSA_SIGNATURES:
            raise MalformedError(f"at most {MAX_BATCH_RSA_SIGNATURES} items in one request with an RSA key")
        scheme = scheme_of(key.algorithm, op.scheme)
        private = self._keyring.private(key, version)
        signatures = tuple(primitives.sign(private, scheme, item.message) for item in op.items)
        result = ops.SignManyResult(signatures=signatures, key=key.id, version=version.version, scheme=scheme)
        return _done(result, key, version, len(op.items))

    def _verify(self, tenant: str, op: ops.VerifyMany) -> Done:
        key, version = self._usable(tenant, op.key, Use.VERIFY, op.version)
        scheme = scheme_of(key.algorithm, op.scheme)
        private = self._keyring.private(key, version)
        valid = tuple(
            primitives.signature_matches(private, scheme, item.message, item.signature) for item in op.items
        )
        return _verdicts(valid, key, version)

    def _mac(self, tenant: str, op: ops.MacMany) -> Done:
        key, version = self._usable(tenant, op.key, Use.MAC)
        secret = self._keyring.secret(key, version)
        macs = tuple(primitives.mac(secret, item.message) for item in op.items)
        result = ops.MacManyResult(macs=macs, key=key.id, version=version.version)
        return _done(result, key, version, len(op.items))

    def _verify_mac(self, tenant: str, op: ops.VerifyMacMany) -> Done:
        key, version = self._usable(tenant, op.key, Use.VERIFY_MAC, op.version)
        secret = self._keyring.secret(key, version)
        valid = tuple(primitives.mac_matches(secret, item.message, item.mac) for item in op.items)
        return _verdicts(valid, key, version)


def _verdicts(valid: tuple[bool, ...], key: KeyRecord, version: VersionRecord) -> Done:
    result = ops.VerifyManyResult(valid=valid, key=key.id, version=version.version)
    return _done(result, key, version, len(valid))


def _done(result: ops.ManyResult, key: KeyRecord, version: VersionRecord, count: int) -> Done:
    return Done(result, key.tenant, key.id, version.version, f"{count} items")
