"""Opening a credential: what shows a provider that the attestation key is in this TPM.

The EK is made again from the TPM's endorsement seed, is compared with the recorded one, and is gone
afterwards; one salted session authorises its use and encrypts the answer on the way back. Nothing is left
behind in the TPM, whatever happens.

TPM 2.0 part 3, section 12.5 (TPM2_ActivateCredential).
"""

from __future__ import annotations

from guestlib.attest.credential import Credential
from hostd.platform.tpm_errors import TpmBlobError, TpmCommandError, TpmCredentialError, TpmIdentityError
from hostd.platform.tpm_esys import Esys, Handle, is_parameter_error
from hostd.platform.tpm_provision import endorsement_key, is_used_by_password, open_by_policy
from hostd.platform.tpm_templates import ENCRYPT_RESPONSE, ESYS_TR, credential_from


def activate(esys: Esys, srk: Handle, ak: Handle, ek_public: bytes, credential: Credential) -> bytes:
    """The credential's secret, at most 64 bytes. `srk` is the pinned storage key: sessions are salted with
    it; `ek_public` (TPM2B_PUBLIC) is the recorded EK.

    An RSA EK takes some chips seconds to make, during which the TPM does nothing else.

    Raises:
        TpmCredentialError: it was made for other keys, or was altered.
        TpmIdentityError: this TPM's EK is not the recorded one.
        TpmError: the TPM is not there or refuses.
    """
    try:
        id_object, secret = credential_from(credential.id_object, credential.encrypted_secret)
    except TpmBlobError as error:
        raise TpmCredentialError(str(error)) from error
    with endorsement_key(esys) as (ek, public, _certificate):
        if public.marshal() != ek_public:
            raise TpmIdentityError("another TPM, or one that was cleared: its endorsement key is another")
        policy = not is_used_by_password(public)
        with esys.salted_session(srk, policy=policy, attributes=ENCRYPT_RESPONSE) as session:
            if policy:
                open_by_policy(esys, session)
            try:
                opened = esys.call(
                    "ActivateCredential",
                    lambda e: e.activate_credential(
                        ak, ek, id_object, secret, session1=ESYS_TR.PASSWORD, session2=session
                    ),
                )
            except TpmCommandError as error:
                if is_parameter_error(error.rc):
                    raise TpmCredentialError(f"made for other keys, or altered ({error})") from error
                raise
    return bytes(opened)
