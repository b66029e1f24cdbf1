"""The steps of verification, numbered as in docs/protocol.md, "Verification".

Each check raises `VerificationError` with the step it belongs to; numbers are append-only.
"""

from __future__ import annotations

import enum


class Step(enum.StrEnum):
    FORMAT = "1 format"
    """The evidence and what is inside it are what they claim to be, byte for byte."""
    NONCE = "2 nonce"
    """The evidence answers the challenge of this verifier."""
    KEY = "3 attestation key"
    """The key that signs is pinned by the trust bundle, or certified by a CA that it names for this host's
    TPM, and is a key that only a TPM can use."""
    ENDORSEMENT = "4 endorsement"
    """The TPM's endorsement key is certified by a maker that the bundle names."""
    SIGNATURE = "5 quote signature"
    QUALIFYING = "6 qualifying data"
    """The TPM signed this very statement: no field of the evidence was altered."""
    DIGEST = "7 pcr digest"
    """The PCR values shown are the ones the TPM signed."""
    PCRS = "8 pcr values"
    """The boot state is one the bundle accepts."""
    IMA = "9 ima log"
    """The measurement log leads to the PCR 10 that the TPM signed."""
    FRESHNESS = "10 freshness"
    REFERENCE = "11 reference values"
    """The host judged itself by reference values that the bundle accepts."""
    CLAIMS = "12 claims"
    """Every component that the bundle requires is verified."""
    CHANNEL_CA = "13 channel CA"
    """The channel CA in the evidence is a CA, and a pinned one if the bundle pins any."""
    CHANNEL = "14 channel certificate"
    """The certificate of this connection was issued by the channel CA of the evidence."""
