"""TPM structures that hostd makes: key templates, the sealed object, selections, session flags.

Storage key and P-256 endorsement key are the TCG's templates (TPM v2.0 Provisioning Guidance, 7.5.1;
EK Credential Profile 2.5, template L-2), so every TPM derives the same keys from its seeds again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

from hostd.platform.tpm_errors import TpmBlobError
from hostd.platform.tpm_policy import check_selection

# isort: split
from tpm2_pytss.constants import ESYS_TR as ESYS_TR
from tpm2_pytss.constants import TPM2_ALG, TPMA_OBJECT, TPMA_SESSION
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_DIGEST_VALUES,
    TPML_PCR_SELECTION,
    TPMS_ECC_POINT,
    TPMS_KEYEDHASH_PARMS,
    TPMS_SENSITIVE_CREATE,
    TPMT_HA,
    TPMT_KEYEDHASH_SCHEME,
    TPMT_PUBLIC,
    TPMU_HA,
    TPMU_PUBLIC_PARMS,
)

from hostd.platform.tpm_esys import TSS2_Exception

ENCRYPT_BOTH: Final = int(TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT)
"""First parameter of the command and of the response are encrypted."""
ENCRYPT_RESPONSE: Final = int(TPMA_SESSION.ENCRYPT)
AUDIT: Final = int(TPMA_SESSION.AUDIT)
"""For commands that take no authorisation, as PCR_Read: the response carries an HMAC all the same."""

_OURS: Final = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.SENSITIVEDATAORIGIN
STORAGE_KEY_ATTRIBUTES: Final = int(
    _OURS | TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.RESTRICTED | TPMA_OBJECT.DECRYPT
)
"""What a storage key must have; noDA may come with it."""


def storage_key_template() -> Any:
    """P-256 storage key (SRK)."""
    public = TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC.parse(
            "ecc256:aes128cfb", nameAlg="sha256", objectAttributes=STORAGE_KEY_ATTRIBUTES | TPMA_OBJECT.NODA
        )
    )
    public.publicArea.unique.ecc = TPMS_ECC_POINT(x=bytes(32), y=bytes(32))
    return public


def attestation_key_template() -> Any:
    """P-256 key that signs only what the TPM itself says (restricted)."""
    return TPM2B_PUBLIC.parse(
        "ecc256:ecdsa-sha256:null",
        nameAlg="sha256",
        objectAttributes=_OURS
        | TPMA_OBJECT.USERWITHAUTH
        | TPMA_OBJECT.RESTRICTED
        | TPMA_OBJECT.SIGN_ENCRYPT
        | TPMA_OBJECT.NODA,
    )


def sealed_template(policy: bytes) -> Any:
    """A sealed object that only `policy` (32 bytes) opens: without USERWITHAUTH there is no password."""
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.KEYEDHASH,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.NODA,
            authPolicy=policy,
            parameters=TPMU_PUBLIC_PARMS(
                keyedHashDetail=TPMS_KEYEDHASH_PARMS(scheme=TPMT_KEYEDHASH_SCHEME(scheme=TPM2_ALG.NULL))
            ),
        )
    )


@contextlib.contextmanager
def sensitive(secret: bytes | bytearray) -> Iterator[Any]:
    """TPM2B_SENSITIVE_CREATE with `secret` as data and no authValue; its copy is wiped in the end."""
    area = TPM2B_SENSITIVE_CREATE(sensitive=TPMS_SENSITIVE_CREATE(userAuth=b"", data=bytes(secret)))
    try:
        yield area
    finally:
        view = area.sensitive.data.buffer
        view[:] = bytes(len(view))


def selection_of(selection: Iterable[int]) -> Any:
    """TPML_PCR_SELECTION of the SHA-256 bank."""
    indices = ",".join(str(index) for index in check_selection(selection))
    return TPML_PCR_SELECTION.parse(f"sha256:{indices}")


def digest_values(digest: bytes) -> Any:
    """TPML_DIGEST_VALUES for one SHA-256 digest."""
    return TPML_DIGEST_VALUES([TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=digest))])


def _unmarshalled(cls: Any, data: bytes, what: str) -> Any:
    try:
        value, used = cls.unmarshal(data)
    except (TSS2_Exception, ValueError) as error:
        raise TpmBlobError(f"{what}: not a TPM structure") from error
    if used != len(data) or value.marshal() != data:
        raise TpmBlobError(f"{what}: not in the TPM's form")
    return value


def public_from(data: bytes) -> Any:
    """TPM2B_PUBLIC from bytes.

    Raises:
        TpmBlobError: it is not one, or has trailing bytes.
    """
    return _unmarshalled(TPM2B_PUBLIC, data, "public area")


def private_from(data: bytes) -> Any:
    """TPM2B_PRIVATE from bytes.

    Raises:
        TpmBlobError: it is not one, or has trailing bytes.
    """
    return _unmarshalled(TPM2B_PRIVATE, data, "private area")


def credential_from(id_object: bytes, secret: bytes) -> tuple[Any, Any]:
    """TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET from bytes.

    Raises:
        TpmBlobError: they are not, or have trailing bytes.
    """
    return (
        _unmarshalled(TPM2B_ID_OBJECT, id_object, "credential"),
        _unmarshalled(TPM2B_ENCRYPTED_SECRET, secret, "secret of a credential"),
    )


def policy_of(public: Any) -> bytes:
    """The policy digest of a sealed object.

    Raises:
        TpmBlobError: it is not an object as `sealed_template` makes it.
    """
    policy = bytes(public.publicArea.authPolicy)
    expected = sealed_template(policy)
    expected.publicArea.unique.keyedHash = public.publicArea.unique.keyedHash
    if expected.marshal() != public.marshal():
        raise TpmBlobError("public area: not that of a sealed secret")
    return policy
