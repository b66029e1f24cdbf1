"""`Client`: hostd's operations as methods; blocking, thread-safe, pipelined, reconnecting.

One connection is shared by all threads. When it ends, the next request opens a new one (bounded
tries, growing pauses). A request that may have reached the host is sent again, once, only if doing it
twice is the same as doing it once: `RESENT`. All others raise `TransportError`, because whether the
host acted is unknown.

Standard library only, unless the trust is `Trust.attested`.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from guestlib.batch import BatchOperations
from guestlib.errors import (
    ChannelChangedError,
    HostdError,
    InvalidSignatureError,
    TransportError,
    UnavailableError,
)
from guestlib.host import HostOperations, fetch_evidence
from guestlib.link import Address, Link, Pending
from guestlib.receipts import ReceiptOperations
from guestlib.wire import messages
from guestlib.wire.messages import Result

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from guestlib.trust import Trust
    from guestlib.wire.messages import ReceiptWanted

RESENT: Final = frozenset(
    {
        # Done once per idempotency token.
        "CreateKey", "Rotate", "Shred",
        # Change nothing and make nothing new.
        "DescribeKey", "ListKeys", "GetPublicKey", "Decrypt", "Verify", "VerifyMac",
        "DecryptMany", "VerifyMany", "VerifyMacMany",
        "Health", "GetEvidence", "GetEvidenceLog", "GetReceipt", "GetAuditLog",
    }
)  # fmt: skip
"""Not among them: Encrypt, GenerateDataKey, Sign, Mac, their batch forms, GenerateRandom. A second try would
be a second use of the key in the ledger that the caller never asked for."""
DEFAULT_ADDRESS: Final = "vsock:"
DEFAULT_TIMEOUT_S: Final = 30.0
CONNECT_TRIES: Final = 4
CONNECT_PAUSE_S: Final = 0.1
"""Before the second try; doubled for each further one."""
_MAX_DEADLINE_MS: Final = 600_000

R = TypeVar("R", bound=Result)


class Handle:
    """A request on its way (`Client.submit`)."""

    __slots__ = ("_again", "_client", "_pending", "_until")

    def __init__(
        self, client: Client, pending: Pending, again: Mapping[str, Any] | None, until: float
    ) -> None:
        self._client = client
        self._pending = pending
        self._again = again
        self._until = until

    def result(self) -> Result:
        """Waits for the answer, at most until the client's time-out after `submit`.

        Raises:
            HostdError: what the host answered.
            TransportError: no answer in time, or the connection ended.
        """
        pending = self._pending
        try:
            return pending.link.wait(pending, self._until - time.monotonic())
        except TransportError:
            again, self._again = self._again, None
            if again is None or pending.outcome is None:
                raise
            self._pending = self._client._send(**again, until=self._until)
            return self.result()


class Client(BatchOperations, HostOperations, ReceiptOperations):
    """A client of the hostd at `address`, believed because of `trust`.

    Nothing is sent before the first request. `timeout_s` bounds every request, the connecting
    included, and is told to the host as the request's deadline. `receipts`: what of its receipt each result
    carries; with `full` it also keeps its request and answer, for `guestlib.attest.receipt`.
    """

    def __init__(
        self,
        trust: Trust,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        name: str = "guestlib",
        receipts: ReceiptWanted = "reference",
    ) -> None:
        if timeout_s <= 0:
            raise ValueError("timeout_s must be positive")
        self._trust = trust
        self._address = Address.parse(address)
        self._context = trust.context()
        self._timeout_s = timeout_s
        self._name = name[:64]
        self._receipts: ReceiptWanted = receipts
        self._link: Link | None = None
        self._left: list[Link] = []
        """Connections that were given up for a newer one, and may still have answers to give."""
        self._connecting = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; requests that wait raise `TransportError`."""
        self._closed = True
        with self._connecting:
            for link in (*self._left, *([] if self._link is None else [self._link])):
                link.close()
            self._link, self._left = None, []

    # ── Connection ────────────────────────────────────────────────────────────────────────────────

    def limits(self) -> dict[str, float]:
        """The limits that the host told in its hello (docs/protocol.md, "Limits")."""
        return dict(self._connected(time.monotonic() + self._timeout_s).hello.limits)

    def _connected(self, until: float) -> Link:
        with self._connecting:
            if self._closed:
                raise TransportError("the client is closed")
            link = self._link
            if link is not None and link.usable:
                return link
            if link is not None:
                link.close()
                self._link = None
            pause = CONNECT_PAUSE_S
            for last in (*([False] * (CONNECT_TRIES - 1)), True):
                try:
                    self._link = self._open(until - time.monotonic())
                    return self._link
                except (TransportError, UnavailableError, ChannelChangedError):
                    if last or time.monotonic() + pause >= until:
                        raise
                time.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable")

    def _open(self, timeout_s: float) -> Link:
        if timeout_s <= 0:
            raise TransportError("no time left to connect")
        until = time.monotonic() + timeout_s
        link = Link.open(self._address, self._context, self._name, timeout_s)
        try:
            self._trust.admit(link.peer_certificate, lambda nonce: fetch_evidence(link, nonce, until))
        except HostdError:
            link.close()
            raise
        return link

    def _leave(self, link: Link) -> None:
        """No new requests on this connection; those that wait on it get their answers."""
        with self._connecting:
            if self._link is link:
                for old in [old for old in self._left if not old.busy]:
                    old.close()
                    self._left.remove(old)
                self._left.append(link)
                self._link = None

    def _send(
        self,
        *,
        operation: str,
        args: Mapping[str, Any],
        receipt: ReceiptWanted,
        deadline_ms: int,
        until: float,
    ) -> Pending:
        link = self._connected(until)
        left = until - time.monotonic()
        deadline = deadline_ms or max(1, min(int(left * 1000), _MAX_DEADLINE_MS))
        return link.submit(operation, args, receipt=receipt, deadline_ms=deadline, timeout_s=left)

    def submit(
        self,
        operation: str,
        args: Mapping[str, Any] | None = None,
        *,
        receipt: ReceiptWanted | None = None,
        deadline_ms: int = 0,
    ) -> Handle:
        """Sends one operation of docs/protocol.md and does not wait for the answer.

        `bytes` in `args` are encoded as base64, None is left out. `receipt`: instead of the client's own.

        Raises:
            ValueError: no operation of this version.
            MalformedError: it does not fit a frame.
            TransportError: no connection.
        """
        if operation not in messages.OPERATIONS:
            raise ValueError(f"no such operation: {operation!r}")
        until = time.monotonic() + self._timeout_s
        request: dict[str, Any] = {
            "operation": operation, "args": dict(args or {}), "receipt": receipt or self._receipts,
            "deadline_ms": deadline_ms,
        }  # fmt: skip
        again = request if operation in RESENT else None
        try:
            pending = self._send(**request, until=until)
        except TransportError:
            if again is None or self._closed or time.monotonic() >= until:
                raise
            pending, again = self._send(**again, until=until), None
        return Handle(self, pending, again, until)

    def call_many(self, requests: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Result | HostdError]:
        """Sends all requests at once and collects the answers in their order, errors included."""
        handles: list[Handle | HostdError] = []
        for operation, args in requests:
            try:
                handles.append(self.submit(operation, args))
            except HostdError as error:
                handles.append(error)
        return [handle if isinstance(handle, HostdError) else _settled(handle) for handle in handles]

    def _call(self, kind: type[R], operation: str, **args: Any) -> R:
        result = self.submit(operation, args).result()
        if not isinstance(result, kind):
            raise TransportError("the host's answer has an unexpected shape")
        return result

    # ── Keys ──────────────────────────────────────────────────────────────────────────────────────

    def create_key(
        self, algorithm: str = "AES-256-GCM", alias: str | None = None, *, token: str | None = None
    ) -> messages.KeyResult:
        """Makes a key. With the same `token` it is made once, however often this is called."""
        return self._call(
            messages.KeyResult, "CreateKey", token=token or _token(), algorithm=algorithm, alias=alias
        )

    def describe_key(self, key: str) -> messages.KeyResult:
        return self._call(messages.KeyResult, "DescribeKey", key=key)

    def list_keys(self, *, page: int | None = None) -> Iterator[messages.KeyInfo]:
        """All keys that the caller may see, fetched page by page."""
        after: str | None = None
        while True:
            answer = self._call(messages.KeyPage, "ListKeys", after=after, limit=page)
            yield from answer.keys
            if answer.next is None:
                return
            if answer.next == after or not answer.keys:
                raise TransportError("the host's list of keys does not end")
            after = answer.next

    def rotate(self, key: str, *, token: str | None = None) -> messages.KeyResult:
        """Adds a version, which encrypts and signs from now on."""
        return self._call(messages.KeyResult, "Rotate", key=key, token=token or _token())

    def shred(self, key: str, *, token: str | None = None) -> messages.KeyResult:
        """Destroys a key at once and for ever: what it encrypted is lost."""
        return self._call(messages.KeyResult, "Shred", key=key, token=token or _token())

    # ── Use ───────────────────────────────────────────────────────────────────────────────────────

    def encrypt(self, key: str, plaintext: bytes, aad: Mapping[str, str] | None = None) -> messages.Encrypted:
        return self._call(messages.Encrypted, "Encrypt", key=key, plaintext=plaintext, aad=_aad(aad))

    def decrypt(
        self, ciphertext: bytes, aad: Mapping[str, str] | None = None, *, key: str | None = None
    ) -> messages.Decrypted:
        """Decrypts; with `key`, only what that key encrypted."""
        return self._call(messages.Decrypted, "Decrypt", ciphertext=ciphertext, aad=_aad(aad), key=key)

    def generate_data_key(
        self, key: str, aad: Mapping[str, str] | None = None, *, length: int = 32, plaintext: bool = True
    ) -> messages.DataKey:
        return self._call(
            messages.DataKey, "GenerateDataKey", key=key, aad=_aad(aad), length=length, plaintext=plaintext
        )

    def sign(self, key: str, message: bytes, *, scheme: str | None = None) -> messages.Signature:
        return self._call(messages.Signature, "Sign", key=key, message=message, scheme=scheme)

    def verify(
        self,
        key: str,
        message: bytes,
        signature: bytes,
        *,
        scheme: str | None = None,
        version: int | None = None,
    ) -> messages.Verification:
        """Raises InvalidSignatureError unless the signature is the key's over the message."""
        return _valid(
            self._call(
                messages.Verification, "Verify",
                key=key, message=message, signature=signature, scheme=scheme, version=version,
            )
        )  # fmt: skip

    def get_public_key(self, key: str, *, version: int | None = None) -> messages.PublicKey:
        return self._call(messages.PublicKey, "GetPublicKey", key=key, version=version)

    def mac(self, key: str, message: bytes) -> messages.Mac:
        return self._call(messages.Mac, "Mac", key=key, message=message)

    def verify_mac(
        self, key: str, message: bytes, mac: bytes, *, version: int | None = None
    ) -> messages.Verification:
        """Raises InvalidSignatureError unless the MAC is the key's over the message."""
        return _valid(
            self._call(messages.Verification, "VerifyMac", key=key, message=message, mac=mac, version=version)
        )

    def random(self, length: int) -> messages.Random:
        return self._call(messages.Random, "GenerateRandom", length=length)


def _settled(handle: Handle) -> Result | HostdError:
    try:
        return handle.result()
    except HostdError as error:
        return error


def _valid(verdict: messages.Verification) -> messages.Verification:
    if not verdict.valid:
        ledger = None if verdict.receipt is None else verdict.receipt.ledger
        raise InvalidSignatureError("it does not belong to this message and key", ledger=ledger)
    return verdict


def _token() -> str:
    return secrets.token_hex(16)


def _aad(aad: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if aad is None else dict(aad)
