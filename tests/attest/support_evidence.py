"""A host in small: its TPM, a measurement log that PCR 10 swallowed, a channel CA, evidence."""

from __future__ import annotations

import datetime
import hashlib
import struct
from dataclasses import dataclass, replace

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from guestlib.attest.binding import evidence_qualifying
from guestlib.attest.bundle import TrustBundle
from guestlib.attest.evidence import (
    Evidence,
    HostIdentity,
    ImaPosition,
    LedgerHead,
    QuotedBytes,
    Statement,
    Status,
    TpmIdentity,
    encode_evidence,
    encode_statement,
)
from hostd.platform.tpm import Tpm

NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
NONCE = bytes(range(32))
PCRS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 14)
HOUR = datetime.timedelta(hours=1)


def certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    ca: bool,
    server: bool = True,
    extensions: bool = True,
    start: datetime.datetime = NOW - HOUR,
    end: datetime.datetime = NOW + HOUR,
) -> bytes:
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )
    if extensions:
        builder = _extended(builder, ca=ca, server=server)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.DER)


def _extended(builder: x509.CertificateBuilder, *, ca: bool, server: bool) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    constraints = x509.BasicConstraints(ca=ca, path_length=0 if ca else None)
    builder = builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)
    if ca:
        return builder
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    return builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)


def ima_entry(path: str) -> tuple[bytes, bytes]:
    """An `ima-ng` entry, and what it extends PCR 10 with."""
    digest = b"sha256:\0" + hashlib.sha256(path.encode()).digest()
    name = path.encode() + b"\0"
    body = b"".join(struct.pack("<I", len(field)) + field for field in (digest, name))
    head = struct.pack("<I20sI", 10, hashlib.sha1(body).digest(), 6) + b"ima-ng"
    return head + struct.pack("<I", len(body)) + body, hashlib.sha256(body).digest()


@dataclass
class Host:
    """What a host has, and evidence it gives."""

    tpm: Tpm
    ek_root: bytes
    log: bytes
    entries: int
    ca_key: ec.EllipticCurvePrivateKey
    ca: bytes

    def statement(self) -> Statement:
        record = self.tpm.record
        return Statement(
            nonce=NONCE,
            issued=NOW,
            host=HostIdentity("host1.example", "0.1.0"),
            tpm=TpmIdentity(record.ak_public, record.ek_public, record.ek_certificate),
            ima=ImaPosition("01234567-89ab-cdef-0123-456789abcdef", len(self.log), self.entries),
            channel_ca=self.ca,
            claims=dict.fromkeys(("guests", "posture", "ima", "files"), Status.VERIFIED),
            reference=hashlib.sha256(b"reference").digest(),
            gate_open=True,
            ledger=LedgerHead(17, hashlib.sha256(b"root").digest()),
            findings=0,
        )

    def evidence(
        self, statement: Statement | None = None, *, selection: tuple[int, ...] = PCRS, **changes: object
    ) -> bytes:
        """Really quoted, over whatever statement."""
        statement = replace(statement or self.statement(), **changes)  # type: ignore[arg-type]
        qualifying = evidence_qualifying(statement.nonce, encode_statement(statement))
        quote, pcrs = self.tpm.quote_with_pcrs(qualifying, selection)
        return encode_evidence(Evidence(statement, pcrs, QuotedBytes(quote.attest, quote.signature)))

    def bundle(self, **changes: object) -> TrustBundle:
        """All that a bundle can demand, and this host satisfies."""
        bundle = TrustBundle(
            require=frozenset({"posture", "ima", "files"}),
            aks=(self.tpm.record.ak_public,),
            ek_roots=(self.ek_root,),
            channel_cas=(self.ca,),
            pcrs=((7, frozenset({self.tpm.read_pcrs((7,))[7], bytes([9]) * 32})),),
            reference=frozenset({hashlib.sha256(b"reference").digest()}),
        )
        return replace(bundle, **changes)  # type: ignore[arg-type]

    def leaf(self, **changes: object) -> bytes:
        key = ec.generate_private_key(ec.SECP256R1())
        arguments = {"ca": False} | changes
        return certificate("hostd.channel", key, "channel CA", self.ca_key, **arguments)  # type: ignore[arg-type]
