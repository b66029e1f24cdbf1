"""What can go wrong with the TPM: one tree, which names the thing.

Every exception of `tpm2_pytss` and of the transport is converted into one of these at the place
where it is caught. None of them carries a secret.
"""

from __future__ import annotations

from dataclasses import dataclass


class TpmError(Exception):
    """Base of everything that `hostd.platform.tpm*` raises on purpose."""


class TpmUnavailableError(TpmError):
    """The TPM did not answer: no device, connection lost, deadline over. Later it may answer again."""


class TpmBusyError(TpmError):
    """The TPM answers, but what was asked did not come to an end within its bounded retries."""


class TpmIdentityError(TpmError):
    """The keys in this TPM are not the pinned ones: another TPM, or a TPM that was cleared."""


class TpmBlobError(TpmError):
    """A sealed blob or a TPM record is malformed, was altered, or belongs to another TPM."""


class TpmCredentialError(TpmError):
    """A credential was made for other keys than this TPM's, or was altered."""


class TpmCommandError(TpmError):
    """The TPM refused a command. `rc` is the TPM's response code (TPM 2.0 part 2, section 6.6)."""

    def __init__(self, rc: int, command: str, text: str) -> None:
        super().__init__(f"{command}: 0x{rc:x} ({text})")
        self.rc = rc
        self.command = command


@dataclass(frozen=True, slots=True, order=True)
class PcrMismatch:
    """PCR `index` of the SHA-256 bank is not what it must be. Values are 32 bytes."""

    index: int
    expected: bytes
    seen: bytes

    def __str__(self) -> str:
        return f"PCR {self.index}: expected {self.expected.hex()}, seen {self.seen.hex()}"


class TpmPolicyError(TpmError):
    """The TPM refused to unseal: these PCRs are not what the secret was sealed to."""

    def __init__(self, mismatches: tuple[PcrMismatch, ...]) -> None:
        super().__init__("; ".join(str(mismatch) for mismatch in mismatches))
        self.mismatches = mismatches


class TpmPoisonError(TpmError):
    """The configured PCR cannot be the poison PCR of this TPM; the text says why."""
