"""What hostd says of itself: the statement that a quote signs, and the digest each batch's quote carries.

Evidence works while the gate is closed: it then says so, with the status of every component. It
names no VM, tenant or key: the claims of a caller's evidence are the host's and that caller's own.
"""

from __future__ import annotations

import datetime
import hashlib
from typing import TYPE_CHECKING

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

import hostd
from guestlib.attest.evidence import HostIdentity, ImaPosition, LedgerHead, Statement, Status, TpmIdentity
from hostd.core.findings import IMA, VM_KINDS
from hostd.platform.hostname import this_host

if TYPE_CHECKING:
    from hostd.core.callers import Caller
    from hostd.platform.tpm_files import TpmRecord
    from hostd.vault.gate import Gate
    from hostd.vault.ledger import Ledger
    from hostd.vault.measuring import Measuring
    from hostd.vault.waiting import Pass


def spki_digest(certificate_der: bytes) -> bytes:
    """SHA-256 over the SubjectPublicKeyInfo (DER) of a certificate."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    return hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def pass_digest(passed: Pass, reference: bytes, channel_ca: bytes) -> bytes:
    """Evidence digest in the quote of a batch: SHA-256 over canonical JSON of the reference values'
    digest, the channel CA's key digest, and the components with their statuses and reading numbers.

    Components of VMs are named by kind only, in order of their reading's number.
    """
    readings = sorted((str(c.kind), stamp.number, str(stamp.status)) for c, stamp in passed.readings)
    body = msgspec.json.encode(
        {"channel_ca": channel_ca.hex(), "readings": readings, "reference": reference.hex()},
        order="deterministic",
    )
    return hashlib.sha256(b"hostd pass evidence v1\0" + body).digest()


def claims_for(caller: Caller, gate: Gate, asked: int) -> dict[str, Status]:
    """Kind of component → status; of several (a host-local caller's VMs) the worst. What was read last before
    it was `asked` for (the vault's monotonic nanoseconds) is `pending`: nobody knows how it is now."""
    order = (Status.VERIFIED, Status.ABSENT, Status.PENDING, Status.DRIFTED)
    claims: dict[str, Status] = {}
    stamps, latched = gate.stamps, gate.latched
    for component in gate.needs(caller):
        stamp, fresh = stamps.get(component), gate.until(component, good=False) >= asked
        status = Status(stamp.status.value) if stamp is not None and fresh else Status.PENDING
        if component in latched:
            status = Status.DRIFTED
        kind = component.kind.value
        claims[kind] = max(claims.get(kind, Status.VERIFIED), status, key=order.index)
    for component in latched:
        if component.kind not in VM_KINDS:
            claims[component.kind.value] = Status.DRIFTED
    return claims


def statement_for(
    caller: Caller,
    nonce: bytes,
    *,
    asked: int,
    now: datetime.datetime,
    gate: Gate,
    measuring: Measuring,
    ledger: Ledger,
    tpm: TpmRecord,
    host_certificate: bytes | None,
    channel_ca: bytes,
    reference: bytes | None,
) -> Statement:
    """The statement of this moment. The IMA position is what has been appraised so far; the quote
    that follows may cover more, never less."""
    claims = claims_for(caller, gate, asked)
    ima = None
    log = None if measuring.appraiser is None else measuring.appraiser.ima
    if log is not None and log.boot_id and gate.stamps.get(IMA) is not None:
        ima = ImaPosition(log.boot_id, log.position, log.entries)
    return Statement(
        nonce=nonce,
        issued=now.astimezone(datetime.UTC).replace(microsecond=0),
        host=HostIdentity(this_host(), hostd.__version__),
        tpm=TpmIdentity(tpm.ak_public, tpm.ek_public, tpm.ek_certificate, host_certificate),
        ima=ima,
        channel_ca=channel_ca,
        claims=claims,
        reference=reference,
        gate_open=gate.shut is None and gate.latched_for(caller) is None,
        ledger=LedgerHead(ledger.size, ledger.tree.root()),
        findings=sum(len(f) for c, f in gate.latched.items() if c.kind not in VM_KINDS or c.vm == caller.vm),
    )
