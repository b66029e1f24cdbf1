"""The evidence document `hostd-evidence/1`: what a host says of itself, with the quote that binds it.

One canonical form: JSON with sorted keys, no spaces, ASCII only; binary fields are hex where they are
digests and base64 where they are structures. What is not byte for byte what `encode_evidence` would
write is refused, so duplicate keys, other spellings of a number, unknown fields or white space cannot
hide anything. Parsing verifies nothing: `verifier` does.

    {"channel_ca": base64 DER, "claims": {component: status}, "findings": count, "format": "hostd-evidence/1",
     "gate": "open" | "closed", "host": {"name", "version"}, "ima": {"boot_id", "bytes", "entries"} | null,
     "issued": "2026-01-31T12:00:00Z", "ledger": {"root": hex, "size"}, "nonce": hex,
     "pcrs": {index: hex}, "quote": {"attest": base64, "signature": base64}, "reference": hex | null,
     "tpm": {"ak_public": base64, "ek_certificate": base64 | null, "ek_public": base64,
             "host_certificate": base64 DER}}

The statement (`statement`) is the same without `pcrs` and `quote`; its digest is in the quote's
qualifying data (`binding`). `host_certificate` (`hostcert`) is left out where there is none. `findings` is
a number only: a tenant learns nothing of other VMs.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import enum
import json
import re
from dataclasses import dataclass
from typing import Any, Final

from guestlib.attest.binding import MAX_NONCE_BYTES, MIN_NONCE_BYTES
from guestlib.errors import MalformedError

FORMAT: Final = "hostd-evidence/1"
MAX_EVIDENCE_BYTES: Final = 64 << 10
MAX_STRUCTURE_BYTES: Final = 1024
MAX_CERTIFICATE_BYTES: Final = 16 << 10
MAX_HOST_CERTIFICATE_BYTES: Final = 4 << 10
MAX_NAME_CHARACTERS: Final = 253
MAX_CLAIMS: Final = 64
MAX_COUNT: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""
_DIGEST_BYTES: Final = 32
_PCRS: Final = range(24)
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_TEXT: Final = re.compile(r"[ -~]*")
_COMPONENT: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_BOOT_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Status(enum.StrEnum):
    """What a component's last reading came to."""

    VERIFIED = "verified"
    DRIFTED = "drifted"
    ABSENT = "absent"
    PENDING = "pending"


@dataclass(frozen=True, slots=True)
class HostIdentity:
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class TpmIdentity:
    """Public areas are TPM2B_PUBLIC; certificates are DER: the maker's, and the provider's (`hostcert`)."""

    ak_public: bytes
    ek_public: bytes
    ek_certificate: bytes | None
    host_certificate: bytes | None = None


@dataclass(frozen=True, slots=True)
class ImaPosition:
    """How far the host had read its own measurement log: bytes and entries of this boot."""

    boot_id: str
    bytes: int
    entries: int


@dataclass(frozen=True, slots=True)
class LedgerHead:
    size: int
    root: bytes


@dataclass(frozen=True, slots=True)
class QuotedBytes:
    """TPMS_ATTEST and TPMT_SIGNATURE."""

    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Statement:
    """Everything that the host states, before the TPM has signed it.

    Raises:
        ValueError: a field breaks its limit.
    """

    nonce: bytes
    issued: datetime.datetime
    """UTC, whole seconds."""
    host: HostIdentity
    tpm: TpmIdentity
    ima: ImaPosition | None
    channel_ca: bytes
    """Certificate of the key service's channel CA, DER."""
    claims: dict[str, Status]
    reference: bytes | None
    """Digest of the reference values in force."""
    gate_open: bool
    ledger: LedgerHead
    findings: int

    def __post_init__(self) -> None:
        checks = (
            (MIN_NONCE_BYTES <= len(self.nonce) <= MAX_NONCE_BYTES, "nonce"),
            (self.issued.tzinfo is datetime.UTC and not self.issued.microsecond, "issued"),
            (_is_text(self.host.name) and bool(self.host.name), "host.name"),
            (_is_text(self.host.version) and bool(self.host.version), "host.version"),
            (0 < len(self.tpm.ak_public) <= MAX_STRUCTURE_BYTES, "tpm.ak_public"),
            (0 < len(self.tpm.ek_public) <= MAX_STRUCTURE_BYTES, "tpm.ek_public"),
            (_is_certificate(self.tpm.ek_certificate), "tpm.ek_certificate"),
            (_is_certificate(self.tpm.host_certificate, MAX_HOST_CERTIFICATE_BYTES), "tpm.host_certificate"),
            (self.ima is None or _BOOT_ID.fullmatch(self.ima.boot_id) is not None, "ima.boot_id"),
            (self.ima is None or (_is_count(self.ima.bytes) and _is_count(self.ima.entries)), "ima"),
            (_is_certificate(self.channel_ca), "channel_ca"),
            (0 < len(self.claims) <= MAX_CLAIMS, "claims"),
            (all(_COMPONENT.fullmatch(component) for component in self.claims), "claims"),
            (self.reference is None or len(self.reference) == _DIGEST_BYTES, "reference"),
            (_is_count(self.ledger.size) and len(self.ledger.root) == _DIGEST_BYTES, "ledger"),
            (_is_count(self.findings), "findings"),
        )
        for holds, field in checks:
            if not holds:
                raise ValueError(f"{field} breaks its limit")


@dataclass(frozen=True, slots=True)
class Evidence:
    """A statement, the PCR values that were quoted, and the quote. Parsed and **not** verified.

    Raises:
        ValueError: a field breaks its limit.
    """

    statement: Statement
    pcrs: dict[int, bytes]
    quote: QuotedBytes

    def __post_init__(self) -> None:
        if not self.pcrs or any(
            index not in _PCRS or len(value) != _DIGEST_BYTES for index, value in self.pcrs.items()
        ):
            raise ValueError("pcrs breaks its limit")
        if not all(
            0 < len(part) <= MAX_STRUCTURE_BYTES for part in (self.quote.attest, self.quote.signature)
        ):
            raise ValueError("quote breaks its limit")


def _is_text(value: str) -> bool:
    return len(value) <= MAX_NAME_CHARACTERS and _TEXT.fullmatch(value) is not None


def _is_certificate(value: bytes | None, limit: int = MAX_CERTIFICATE_BYTES) -> bool:
    return value is None or 0 < len(value) <= limit


def _is_count(value: int) -> bool:
    return 0 <= value <= MAX_COUNT


def encode_statement(statement: Statement) -> bytes:
    """The canonical bytes whose digest the TPM signs (`binding.evidence_qualifying`)."""
    return _canonical(_statement_fields(statement))


def encode_evidence(evidence: Evidence) -> bytes:
    """The canonical document."""
    fields = _statement_fields(evidence.statement)
    fields["pcrs"] = {str(index): value.hex() for index, value in evidence.pcrs.items()}
    fields["quote"] = {
        "attest": _base64(evidence.quote.attest),
        "signature": _base64(evidence.quote.signature),
    }
    return _canonical(fields)


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _statement_fields(statement: Statement) -> dict[str, Any]:
    ima, certificate = statement.ima, statement.tpm.ek_certificate
    tpm = {
        "ak_public": _base64(statement.tpm.ak_public),
        "ek_certificate": None if certificate is None else _base64(certificate),
        "ek_public": _base64(statement.tpm.ek_public),
    }
    if statement.tpm.host_certificate is not None:
        tpm["host_certificate"] = _base64(statement.tpm.host_certificate)
    return {
        "channel_ca": _base64(statement.channel_ca),
        "claims": {component: str(status) for component, status in statement.claims.items()},
        "findings": statement.findings,
        "format": FORMAT,
        "gate": "open" if statement.gate_open else "closed",
        "host": {"name": statement.host.name, "version": statement.host.version},
        "ima": None if ima is None else {"boot_id": ima.boot_id, "bytes": ima.bytes, "entries": ima.entries},
        "issued": statement.issued.strftime(_TIME),
        "ledger": {"root": statement.ledger.root.hex(), "size": statement.ledger.size},
        "nonce": statement.nonce.hex(),
        "reference": None if statement.reference is None else statement.reference.hex(),
        "tpm": tpm,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def parse_evidence(data: bytes) -> Evidence:
    """Parses a document of at most 64 KiB.

    Raises:
        MalformedError: it is not one, or not in its canonical form.
    """
    if len(data) > MAX_EVIDENCE_BYTES:
        raise MalformedError(f"evidence: over {MAX_EVIDENCE_BYTES} bytes")
    try:
        fields = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise MalformedError("evidence: not JSON") from error
    try:
        evidence = _evidence(_object(fields))
    except (KeyError, ValueError, TypeError, binascii.Error) as error:
        raise MalformedError(f"evidence: {error}") from error
    # Whatever the reading above let pass (an unknown field, `1.0`, a key given twice) is caught here.
    if encode_evidence(evidence) != data:
        raise MalformedError("evidence: not in canonical form")
    return evidence


def _evidence(fields: dict[str, Any]) -> Evidence:
    if fields["format"] != FORMAT:
        raise ValueError(f"format is not {FORMAT}")
    gate = fields["gate"]
    if gate not in ("open", "closed"):
        raise ValueError("gate is neither open nor closed")
    host, tpm, ledger = _object(fields["host"]), _object(fields["tpm"]), _object(fields["ledger"])
    certificate, ima, reference = tpm["ek_certificate"], fields["ima"], fields["reference"]
    quote = _object(fields["quote"])
    statement = Statement(
        nonce=_unhex(fields["nonce"]),
        issued=_time(_string(fields["issued"])),
        host=HostIdentity(_string(host["name"]), _string(host["version"])),
        tpm=TpmIdentity(
            _unbase64(tpm["ak_public"]),
            _unbase64(tpm["ek_public"]),
            None if certificate is None else _unbase64(certificate),
            _unbase64(tpm["host_certificate"]) if "host_certificate" in tpm else None,
        ),
        ima=None if ima is None else _ima(_object(ima)),
        channel_ca=_unbase64(fields["channel_ca"]),
        claims={name: Status(_string(status)) for name, status in _object(fields["claims"]).items()},
        reference=None if reference is None else _unhex(reference),
        gate_open=gate == "open",
        ledger=LedgerHead(_count(ledger["size"]), _unhex(ledger["root"])),
        findings=_count(fields["findings"]),
    )
    pcrs = {int(index): _unhex(value) for index, value in _object(fields["pcrs"]).items()}
    return Evidence(statement, pcrs, QuotedBytes(_unbase64(quote["attest"]), _unbase64(quote["signature"])))


def _ima(fields: dict[str, Any]) -> ImaPosition:
    return ImaPosition(_string(fields["boot_id"]), _count(fields["bytes"]), _count(fields["entries"]))


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object is missing")
    return value


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a string is missing")
    return value


def _count(value: object) -> int:
    if type(value) is not int:
        raise TypeError("an integer is missing")
    return value


def _unhex(value: object) -> bytes:
    return bytes.fromhex(_string(value))


def _unbase64(value: object) -> bytes:
    return base64.b64decode(_string(value), validate=True)
