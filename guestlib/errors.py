"""One exception tree, split by who is to blame, and the table wire code ↔ class.

Codes are append-only: a released code keeps its meaning for ever (docs/protocol.md, "Errors").
Messages are written for the person who reads them and never carry key material or another
tenant's names.
"""

from __future__ import annotations

from typing import ClassVar


class HostdError(Exception):
    """Base of everything that hostd or guestlib raises on purpose.

    `ledger` is the sequence number of the ledger entry that records the refusal, where there is one.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, ledger: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.ledger = ledger

    def __str__(self) -> str:
        reference = "" if self.ledger is None else f" (ledger entry {self.ledger})"
        return f"{self.code}: {self.message}{reference}"


# ── The caller is to blame ────────────────────────────────────────────────────────────────────────


class CallerError(HostdError):
    """The request cannot succeed as it is; sending it again will not help."""


class MalformedError(CallerError):
    """The bytes are not a message of the protocol, or a field breaks its published limit."""

    code = "malformed"


class UnauthenticatedError(CallerError):
    """The channel does not prove who is asking."""

    code = "unauthenticated"


class DeniedError(CallerError):
    """Who asks is known and may not do this."""

    code = "denied"


class NotFoundError(CallerError):
    """No such thing among what the caller may see."""

    code = "not_found"


class ConflictError(CallerError):
    """The request contradicts something that exists (an alias in use, a reused idempotency token)."""

    code = "conflict"


class WrongStateError(CallerError):
    """The key's state or usage does not allow the operation."""

    code = "wrong_state"


class InvalidCiphertextError(CallerError):
    """The ciphertext, its additional data or its key do not belong together, or it was altered."""

    code = "invalid_ciphertext"


# ── The host is to blame ──────────────────────────────────────────────────────────────────────────


class HostError(HostdError):
    """The request may be right; the host will not or cannot answer it now."""


class RefusedDriftError(HostError):
    """A measurement that the caller's safety rests on has drifted. Operators see which one."""

    code = "refused_drift"


class OverloadedError(HostError):
    """A published limit on what may wait is reached; try again later."""

    code = "overloaded"


class UnavailableError(HostError):
    """A part that an answer needs (TPM, ledger, store, measurer) is not there."""

    code = "unavailable"


class DeadlineError(HostError):
    """The request's own deadline passed before it could be released."""

    code = "deadline"


class InternalError(HostError):
    """A defect in hostd. Nothing of the request was released."""

    code = "internal"


# ── The path between is to blame ──────────────────────────────────────────────────────────────────


class TransportError(HostdError):
    """The connection failed, was closed, or timed out; whether the host acted is unknown."""

    code = "transport"


class VerificationError(HostdError):
    """Something that was to be verified (evidence, certificate, signature) does not hold.

    `step` is the number and name of the failing step in docs/protocol.md, "Verification".
    """

    code = "verification"

    def __init__(self, step: str, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step


class ChannelChangedError(VerificationError):
    """The connection's certificate is by another channel CA than the one that was to be. The host's has
    changed since the connection began, or since the pinned one was; or it is not that host."""


class InvalidSignatureError(VerificationError):
    """A signature or MAC does not belong to the message and the key. hostd answered so; nothing failed."""

    code = "invalid_signature"

    def __init__(self, message: str, *, ledger: int | None = None) -> None:
        super().__init__("signature", message)
        self.ledger = ledger


class InvalidFileError(VerificationError):
    """An encrypted file (`guestlib.files`) was altered, cut, or is not for this additional data."""

    code = "invalid_file"


_WIRE_CLASSES: tuple[type[HostdError], ...] = (
    MalformedError,
    UnauthenticatedError,
    DeniedError,
    NotFoundError,
    ConflictError,
    WrongStateError,
    InvalidCiphertextError,
    RefusedDriftError,
    OverloadedError,
    UnavailableError,
    DeadlineError,
    InternalError,
)

BY_CODE: dict[str, type[HostdError]] = {cls.code: cls for cls in _WIRE_CLASSES}


def from_wire(code: str, message: str, ledger: int | None) -> HostdError:
    """The exception for an error response; a code this version does not know is an `InternalError`."""
    cls = BY_CODE.get(code)
    if cls is None:
        return InternalError(f"unknown error code {code!r}: {message}", ledger=ledger)
    return cls(message, ledger=ledger)
