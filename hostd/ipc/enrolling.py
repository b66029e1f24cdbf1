"""Operators ↔ vault: the commands by which a host is enrolled with a provider (`hostd.core.enrolment`).

None of them passes the gate: they change nobody's rights. What is certified is which TPM this is, not that
all is well with the host.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from guestlib.attest.evidence import MAX_HOST_CERTIFICATE_BYTES
from hostd.core.enrolment import MAX_DOCUMENT_BYTES
from hostd.core.reading_types import Struct


class RequestHost(Struct, frozen=True, tag="request-host"):
    """A fresh request: `operating.Document`."""


class AnswerHost(Struct, frozen=True, tag="answer-host"):
    """The answer to a challenge, by the TPM: `operating.Document`. Recorded."""

    challenge: Annotated[bytes, msgspec.Meta(max_length=MAX_DOCUMENT_BYTES)]


class InstallHost(Struct, frozen=True, tag="install-host"):
    """A host certificate, DER, goes into evidence from now on: `HostReport`. Recorded."""

    certificate: Annotated[bytes, msgspec.Meta(max_length=MAX_HOST_CERTIFICATE_BYTES)]


class ShowHost(Struct, frozen=True, tag="show-host"):
    """`HostReport`."""


EnrolmentCommand = RequestHost | AnswerHost | InstallHost | ShowHost


class HostReport(msgspec.Struct, frozen=True):
    host: str
    """As it calls itself."""
    ak_name: str
    """Hexadecimal, as are digests."""
    ek_digest: str
    maker: bool
    """Whether the TPM has an EK certificate."""
    certificate: bytes = b""
    """DER; empty, as all that follows, if none is installed."""
    certified: str = ""
    """The name that it certifies."""
    issuer: str = ""
    not_before: int = 0
    not_after: int = 0
    """Unix time, seconds."""
    valid: bool = False
    """Now."""
