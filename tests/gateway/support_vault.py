"""A vault played over real sockets: the contract of `hostd.ipc.serving`, real certificates, no keys.

`SimulatedVault` listens on `broker.sock`, binds every caller, issues real TLS certificates from a
channel CA of its own, and answers operations by a function of the test.
"""

from __future__ import annotations

import datetime
import select
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hostd.ipc import many_operations as many
from hostd.ipc import operations as ops
from hostd.ipc.channel import Channel, ChannelError
from hostd.ipc.loop import Loop
from hostd.ipc.serving import (
    Bind,
    Bound,
    Call,
    ChannelIdentity,
    Fault,
    FromBroker,
    FromWorker,
    OpenChannel,
    Receipt,
    Renew,
    Reply,
    Unbound,
)

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = ops.Result | Fault | None


class ChannelCa:
    """A channel CA as the vault has one."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hostd channel CA")])
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True
            )
            .sign(self.key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, *, dns: str = "hostd.channel", life_s: float = 3600.0) -> ChannelIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        end = now + datetime.timedelta(seconds=life_s)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, dns)]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return ChannelIdentity(
            certificate_chain=certificate.public_bytes(serialization.Encoding.PEM),
            private_key=key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            not_after=int(end.timestamp()),
        )


def echo(operation: object) -> Answer:
    """Plausible answers: encryption reverses, a key named `missing` does not exist, `hold` never answers."""
    key = getattr(operation, "key", None)
    if key == "missing":
        return Fault(0, "not_found", "no such key", 7)
    if key == "hold":
        return None
    match operation:
        case ops.Encrypt():
            return ops.EncryptResult(b"CT" + operation.plaintext[::-1], operation.key, 1)
        case ops.Decrypt():
            return ops.DecryptResult(operation.ciphertext[:1:-1], "key-1", 1)
        case ops.GenerateRandom():
            return ops.RandomResult(b"\x5a" * operation.length)
        case ops.GenerateDataKey():
            return ops.DataKeyResult(
                b"CT", operation.key, 1, b"k" * operation.length if operation.plaintext else None
            )
        case ops.CreateKey() | ops.DescribeKey() | ops.Rotate() | ops.Shred():
            return ops.KeyResult(key_info("key-1", getattr(operation, "alias", None)))
        case ops.ListKeys():
            first = 0 if operation.after is None else int(operation.after.removeprefix("key-")) + 1
            keys = tuple(key_info(f"key-{n}") for n in range(first, min(first + operation.limit, 250)))
            return ops.KeyListResult(keys, keys[-1].id if first + operation.limit < 250 else None)
        case ops.Sign():
            return ops.SignResult(
                b"S:" + operation.message[:8], operation.key, 1, operation.scheme or "ed25519"
            )
        case ops.Verify():
            return ops.VerifyResult(operation.signature == b"S:" + operation.message[:8], operation.key, 1)
        case ops.Mac():
            return ops.MacResult(b"M:" + operation.message[:8], operation.key, 1)
        case ops.VerifyMac():
            return ops.VerifyResult(operation.mac == b"M:" + operation.message[:8], operation.key, 1)
        case many.EncryptMany():
            sealed = tuple(b"CT" + item.plaintext[::-1] for item in operation.items)
            return many.EncryptManyResult(sealed, operation.key, 1)
        case many.DecryptMany():
            return many.DecryptManyResult(tuple(map(opened, operation.items)), operation.key)
        case many.SignMany():
            made = tuple(b"S:" + item.message[:8] for item in operation.items)
            return many.SignManyResult(made, operation.key, 1, operation.scheme or "ed25519")
        case many.VerifyMany():
            valid = tuple(item.signature == b"S:" + item.message[:8] for item in operation.items)
            return many.VerifyManyResult(valid, operation.key, 1)
        case many.MacMany():
            return many.MacManyResult(
                tuple(b"M:" + item.message[:8] for item in operation.items), operation.key, 1
            )
        case many.VerifyMacMany():
            valid = tuple(item.mac == b"M:" + item.message[:8] for item in operation.items)
            return many.VerifyManyResult(valid, operation.key, 1)
        case ops.GetPublicKey():
            return ops.PublicKeyResult(b"DER", operation.key, operation.version or 1, "Ed25519")
        case ops.Health():
            return ops.HealthResult("open", "", {"ima": "verified"})
        case ops.GetEvidence():
            return ops.EvidenceResult(b'{"nonce":"' + operation.nonce.hex().encode() + b'"}', 5)
        case ops.GetEvidenceLog():
            return ops.EvidenceLogResult(b"12345"[operation.offset :])
        case ops.GetReceipt():
            return ops.ReceiptResult(b'{"format":"hostd-receipt/1"}')
        case ops.GetAuditLog():
            after = -1 if operation.after is None else operation.after
            entries = tuple(
                ops.AuditEntry(n, "{}", (b"p" * 32,), n == 2) for n in range(after + 1, after + 3)
            )
            return ops.AuditLogResult(b"{}", entries, after + 2 if after < 3 else None)
    return Fault(0, "internal", "the simulator does not know that")


def opened(item: many.DecryptItem) -> many.DecryptedItem:
    if not item.ciphertext.startswith(b"CT"):
        return many.DecryptedItem(error=many.ItemError("invalid_ciphertext", "not a ciphertext"))
    return many.DecryptedItem(item.ciphertext[:1:-1], 1)


def key_info(key: str, alias: str | None = None) -> ops.KeyInfo:
    created = "2026-01-02T03:04:05Z"
    versions = (ops.KeyVersionInfo(1, "active", created),)
    return ops.KeyInfo(
        key, "AES-256-GCM", "active", 1, created, ("encrypt", "decrypt"), versions, alias=alias
    )


class SimulatedVault:
    """Runs in a thread of its own from `start` to `stop`."""

    def __init__(
        self, run: Path, answer: Callable[[object], Answer] = echo, *, life_s: float = 3600.0
    ) -> None:
        self.ca = ChannelCa()
        self.answer = answer
        self.life_s = life_s
        self.identity: ChannelIdentity | None = None
        """Given instead of a fresh one, if set."""
        self.refuse: str | None = None
        """Reason of `Unbound` for every caller, if set."""
        self.silent = False
        """Never answers `Bind`."""
        self.shuffle = False
        """Answers each batch of calls in reverse order."""
        self.document = b'{"format":"hostd-receipt/1"}'
        """Given with every answer whose receipt is wanted in full."""
        self.binds: list[Bind] = []
        self.calls = 0
        self.held: list[tuple[Channel[FromWorker], Call]] = []
        self._path = run / "broker.sock"
        self._loop = Loop()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._channels: set[Channel[object]] = set()
        self._by_bind: dict[int, tuple[Channel[object], Channel[FromWorker]]] = {}
        self._opened: set[Channel[FromWorker]] = set()
        self._thread = threading.Thread(target=self._loop.run, name="vault")
        self._jobs: list[Callable[[], None]] = []
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._loop.watch(self._bell, self._ring)
        self._loop.watch(self._listener, self._accept)

    def __enter__(self) -> SimulatedVault:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._loop.stop)
        self._thread.join(10)
        for channel in list(self._channels):
            channel.close()
        for sock in (self._listener, self._bell, self._rope):
            sock.close()
        self._loop.close()

    def run_here(self) -> None:
        self._loop.run()

    def do(self, job: Callable[[], None]) -> None:
        """Runs `job` in the vault's thread."""
        self._jobs.append(job)
        self._rope.send(b"!")

    def unbind(self, bind: int, reason: str = "gone") -> None:
        self.do(lambda: self._by_bind[bind][0].send(Unbound(bind, reason)))

    def rotate(self) -> ChannelCa:
        """Another channel CA from now on; gives the one before."""

        def job() -> None:
            for link in {link for link, _ in self._by_bind.values()}:
                link.send(Renew())

        before, self.ca = self.ca, ChannelCa()
        self.do(job)
        return before

    def _ring(self, _events: int) -> None:
        self._bell.recv(4096)
        while self._jobs:
            self._jobs.pop(0)()

    def _accept(self, _events: int) -> None:
        sock, _ = self._listener.accept()
        link: Channel[FromBroker] = Channel(sock, FromBroker)
        self._channels.add(link)
        self._loop.watch(link, lambda _events: self._broker(link))

    def _drop(self, channel: Channel[object]) -> None:
        self._loop.forget(channel)
        self._channels.discard(channel)
        channel.close()

    def _broker(self, link: Channel[FromBroker]) -> None:
        try:
            records = link.receive()
        except ChannelError:
            self._drop(link)
            return
        for bind in records:
            self.binds.append(bind)
            fd = link.take_descriptor()
            assert fd is not None
            worker: Channel[FromWorker] = Channel(socket.socket(fileno=fd), FromWorker)
            self._channels.add(worker)
            self._by_bind[bind.bind] = (link, worker)
            if self.silent:
                continue
            if self.refuse is not None:
                link.send(Unbound(bind.bind, self.refuse))
                continue
            self._loop.watch(worker, lambda _events, worker=worker: self._worker(worker))
            link.send(Bound(bind.bind, f'Host::"uid:{bind.uid}"'))

    def _worker(self, worker: Channel[FromWorker]) -> None:
        try:
            if worker.wants_write:
                worker.flush()
            records = worker.receive()
            replies: list[object] = []
            for record in records:
                if isinstance(record, OpenChannel):
                    assert worker not in self._opened
                    self._opened.add(worker)
                    worker.send(self.identity or self.ca.issue(life_s=self.life_s))
                    continue
                assert worker in self._opened
                self.calls += 1
                answer = self.answer(record.operation)
                if answer is None:
                    self.held.append((worker, record))
                elif isinstance(answer, Fault):
                    replies.append(Fault(record.seq, answer.code, answer.message, answer.ledger))
                else:
                    named = record.receipt != "none"
                    document = self.document if record.receipt == "full" else b""
                    receipt = Receipt(self.calls, 3, document) if named else None
                    replies.append(Reply(record.seq, msgspec.msgpack.encode(answer), receipt))
            if self.shuffle:
                replies.reverse()
            if replies:
                worker.send(*replies)
            self._loop.watch(worker, lambda _events: self._worker(worker), write=worker.wants_write)
        except ChannelError:
            self._drop(worker)

    def release(self) -> None:
        """Answers what was held (as DescribeKey)."""

        def job() -> None:
            held, self.held = self.held, []
            for worker, call in held:
                result = msgspec.msgpack.encode(ops.KeyResult(key_info("key-1")))
                worker.send(Reply(call.seq, result, None))

        self.do(job)


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def readable(sock: socket.socket, seconds: float) -> bool:
    return bool(select.select([sock], [], [], seconds)[0])
