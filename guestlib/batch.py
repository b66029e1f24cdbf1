"""The batch operations as methods of `Client`: many items of one key in one request and one measurement.

A request takes as many items as the host's limits say (`Client.limits`: `batch_items`, `batch_bytes`,
`batch_ciphertext_bytes`, `batch_rsa_signatures`); over them it is `malformed`. Nothing is split here, because
each request is an entry of its own in the ledger: that is the caller's to decide.

EncryptMany, SignMany and MacMany are done wholly or not at all. DecryptMany answers each item by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from guestlib.errors import TransportError
from guestlib.wire import messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Aad = Mapping[str, str] | None

R = TypeVar("R", bound=messages.Result)


class BatchOperations:
    """Needs `_call` of `Client`."""

    def _call(self, kind: type[R], operation: str, **args: Any) -> R:
        raise NotImplementedError

    def encrypt_many(self, key: str, items: Iterable[tuple[bytes, Aad]]) -> messages.EncryptedMany:
        """Encrypts plaintexts, each with its AAD (or None), under the key's current version."""
        args = [{"plaintext": plaintext, "aad": dict(aad or {}) or None} for plaintext, aad in items]
        result = self._call(messages.EncryptedMany, "EncryptMany", key=key, items=args)
        _complete(result.ciphertexts, args)
        return result

    def decrypt_many(self, key: str, items: Iterable[tuple[bytes, Aad]]) -> messages.DecryptedMany:
        """Decrypts ciphertexts of the one key, each with its AAD (or None): per item a plaintext or an error.

        Raises:
            HostdError: the request as a whole was refused.
        """
        args = [{"ciphertext": ciphertext, "aad": dict(aad or {}) or None} for ciphertext, aad in items]
        result = self._call(messages.DecryptedMany, "DecryptMany", key=key, items=args)
        _complete(result.items, args)
        return result

    def sign_many(
        self, key: str, messages_: Iterable[bytes], *, scheme: str | None = None
    ) -> messages.SignatureMany:
        args = [{"message": message} for message in messages_]
        result = self._call(messages.SignatureMany, "SignMany", key=key, items=args, scheme=scheme)
        _complete(result.signatures, args)
        return result

    def verify_many(
        self,
        key: str,
        items: Iterable[tuple[bytes, bytes]],
        *,
        scheme: str | None = None,
        version: int | None = None,
    ) -> messages.VerificationMany:
        """Verifies (message, signature) pairs. Look at every verdict: none raises."""
        args = [{"message": message, "signature": signature} for message, signature in items]
        result = self._call(
            messages.VerificationMany, "VerifyMany", key=key, items=args, scheme=scheme, version=version
        )
        _complete(result.valid, args)
        return result

    def mac_many(self, key: str, messages_: Iterable[bytes]) -> messages.MacMany:
        args = [{"message": message} for message in messages_]
        result = self._call(messages.MacMany, "MacMany", key=key, items=args)
        _complete(result.macs, args)
        return result

    def verify_mac_many(
        self, key: str, items: Iterable[tuple[bytes, bytes]], *, version: int | None = None
    ) -> messages.VerificationMany:
        """Verifies (message, MAC) pairs. Look at every verdict: none raises."""
        args = [{"message": message, "mac": mac} for message, mac in items]
        result = self._call(messages.VerificationMany, "VerifyMacMany", key=key, items=args, version=version)
        _complete(result.valid, args)
        return result


def _complete(answered: tuple[object, ...], asked: list[dict[str, Any]]) -> None:
    """One answer for each item: a list that is shorter would silently leave items out of a `zip`."""
    if len(answered) != len(asked):
        raise TransportError("the host's answer has an unexpected shape")
