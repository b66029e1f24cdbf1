"""PCR selections and policy digests, computed without a TPM.

TPM 2.0 part 2, section 10.9 (TPML_PCR_SELECTION) and part 3, section 23.7 (TPM2_PolicyPCR).
Only the SHA-256 bank is spoken of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

PCR_COUNT: Final = 24
DIGEST_BYTES: Final = 32
_ALG_SHA256: Final = 0x000B
_CC_POLICY_PCR: Final = 0x0000017F
_SELECT_BYTES: Final = 3


def check_selection(selection: Iterable[int]) -> tuple[int, ...]:
    """The indices in order.

    Raises:
        ValueError: empty, or an index that is not 0 to 23, or one given twice.
    """
    indices = tuple(sorted(selection))
    if not indices or len(set(indices)) != len(indices):
        raise ValueError(f"not a selection of PCRs: {indices}")
    if indices[0] < 0 or indices[-1] >= PCR_COUNT:
        raise ValueError(f"no such PCR: {indices}")
    return indices


def marshal_selection(selection: Iterable[int]) -> bytes:
    """TPML_PCR_SELECTION with one bank: count (4 bytes), algorithm (2), size 3 (1), bit map (3)."""
    bits = sum(1 << index for index in check_selection(selection))
    return (
        (1).to_bytes(4, "big")
        + _ALG_SHA256.to_bytes(2, "big")
        + bytes([_SELECT_BYTES])
        + bits.to_bytes(_SELECT_BYTES, "little")
    )


def pcr_digest(values: Mapping[int, bytes]) -> bytes:
    """SHA-256 over the values, in the order of their indices: 32 bytes.

    Raises:
        ValueError: a value is not 32 bytes, or the selection is not one.
    """
    indices = check_selection(values)
    if any(len(values[index]) != DIGEST_BYTES for index in indices):
        raise ValueError("a PCR value is not 32 bytes")
    return hashlib.sha256(b"".join(values[index] for index in indices)).digest()


def policy_pcr(values: Mapping[int, bytes], start: bytes = bytes(DIGEST_BYTES)) -> bytes:
    """The policy digest after TPM2_PolicyPCR over `values`, from `start` on: 32 bytes."""
    return hashlib.sha256(
        start + _CC_POLICY_PCR.to_bytes(4, "big") + marshal_selection(values) + pcr_digest(values)
    ).digest()
