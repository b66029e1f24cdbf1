"""The documents of an enrolment, which provider and host send each other as files (docs/protocol.md).

    host      request    its keys, the maker's certificate, a quote that says which EK the AK is under
    provider  challenge  a secret that the TPM of that EK alone opens, and only for that AK
    host      answer     a proof of that secret, for this very challenge
    provider  host certificate (`guestlib.attest.hostcert`)

Strict JSON in one form each, byte strings in base64: what is not byte for byte what `encode` writes is
refused. Pure; nothing is verified here but the form.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from guestlib.attest.hostname import HOST_NAME
from guestlib.errors import MalformedError

MAX_DOCUMENT_BYTES: Final = 64 << 10
SECRET_BYTES: Final = 32
_REQUEST_LABEL: Final = b"hostd host request v1\0"
_ANSWER_LABEL: Final = b"hostd host answer v1\0"

_Public = Annotated[bytes, msgspec.Meta(min_length=2, max_length=1024)]
_Structure = Annotated[bytes, msgspec.Meta(min_length=2, max_length=1024)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Name = Annotated[bytes, msgspec.Meta(min_length=34, max_length=34)]
_Text = Annotated[str, msgspec.Meta(pattern=r"^[ -~]{1,253}\Z")]
_HostName = Annotated[str, msgspec.Meta(pattern=rf"^{HOST_NAME.pattern}\Z")]
_MAX_TIME: Final = 253402300799
"""The end of the year 9999."""


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all."""


class Identity(_Document, frozen=True):
    """A host by its keys. Public areas are TPM2B_PUBLIC."""

    host: _Text
    """As it calls itself."""
    ak_public: _Public
    ek_public: _Public
    ek_certificate: Annotated[bytes, msgspec.Meta(min_length=1, max_length=16384)] | None
    """The maker's, DER; None if the TPM has none."""

    def qualifying(self) -> bytes:
        """What the quote of a request signs along; 32 bytes."""
        return hashlib.sha256(_REQUEST_LABEL + encode(self)).digest()


class Request(_Document, frozen=True):
    format: Literal["hostd-host-request/1"]
    identity: Identity
    pcrs: dict[str, _Digest]
    """PCR index in decimal → value: what the quote signs. What is accepted of them is for trust bundles to
    say."""
    attest: _Structure
    """TPMS_ATTEST of a quote by the AK over `identity`."""
    signature: _Structure
    """TPMT_SIGNATURE."""


class Challenge(_Document, frozen=True):
    format: Literal["hostd-host-challenge/1"]
    host: _HostName
    """Whom the provider will certify."""
    ak_name: _Name
    request: _Digest
    """SHA-256 of the request's bytes."""
    credential: _Structure
    """TPM2B_ID_OBJECT."""
    secret: _Structure
    """TPM2B_ENCRYPTED_SECRET."""


class Answer(_Document, frozen=True):
    format: Literal["hostd-host-answer/1"]
    challenge: _Digest
    """SHA-256 of the challenge's bytes."""
    proof: _Digest


class Pending(_Document, frozen=True):
    """What the provider keeps until the answer comes, for itself alone."""

    format: Literal["hostd-host-pending/1"]
    challenge: _Digest
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    host: _HostName
    ak_public: _Public
    ek_public: _Public
    made: Annotated[int, msgspec.Meta(ge=0, le=_MAX_TIME)]
    """Unix time, seconds."""


_T = TypeVar("_T", bound=_Document)


def proof(secret: bytes, challenge: bytes) -> bytes:
    """What answers a challenge (SHA-256 of its bytes); 32 bytes that do not tell the secret."""
    return hmac.digest(secret, _ANSWER_LABEL + challenge, "sha256")


def digest(document: bytes) -> bytes:
    return hashlib.sha256(document).digest()


def encode(document: _Document) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=2) + b"\n"


def parse(data: bytes, kind: type[_T]) -> _T:
    """A document of that kind.

    Raises:
        MalformedError: it is none, or not in the form that `encode` gives it.
    """
    what = f"host {kind.__name__.lower()}"
    if len(data) > MAX_DOCUMENT_BYTES:
        raise MalformedError(f"{what}: over {MAX_DOCUMENT_BYTES} bytes")
    try:
        document = msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{what}: {error}") from error
    if encode(document) != data:
        raise MalformedError(f"{what}: not in the form that hostd writes")
    return document
