"""Making or finding hostd's keys in a TPM, once, and the record that pins them.

Storage key (SRK): the TCG's P-256 one at 0x81000001, made if the handle is free. Endorsement key (EK):
whichever the maker certified; where no certificate is in the TPM, the TCG's P-256 one, and the record says
so. Attestation key (AK): a child of the EK, so that the reset count and firmware version in quotes are true,
at a persistent handle of ours.

Doing it again changes nothing and gives the same record. What it finds is believed at this moment: do
it when you trust the machine. An object at one of the handles that is not such a key is refused,
never replaced.

TCG EK Credential Profile for TPM Family 2.0, 2.5; TCG TPM v2.0 Provisioning Guidance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from guestlib.attest.certs import load_certificate
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import RH_ENDORSEMENT, qualified_name
from guestlib.errors import VerificationError
from hostd.platform.tpm_errors import TpmCommandError, TpmIdentityError
from hostd.platform.tpm_esys import Esys, Handle, base_error
from hostd.platform.tpm_files import TpmRecord
from hostd.platform.tpm_tcti import Link
from hostd.platform.tpm_templates import (
    ESYS_TR,
    STORAGE_KEY_ATTRIBUTES,
    attestation_key_template,
    storage_key_template,
)

# isort: split
from tpm2_pytss.constants import TPM2_ALG, TPM2_SE, TPMA_OBJECT
from tpm2_pytss.utils import NVReadEK, create_ek_template

SRK_HANDLE: Final = 0x81000001
AK_HANDLE: Final = 0x81010010
_RC_HANDLE: Final = 0x08B
_EK_TEMPLATES: Final = (
    ("EK-ECC256", 0x01C0000A),
    ("EK-RSA2048", 0x01C00002),
    ("EK-HIGH-ECC384", 0x01C00016),
)
"""In order of preference: name of the template, NV index of its certificate."""


def provision(connect: Callable[[], Link], *, command_s: float, ak_handle: int = AK_HANDLE) -> TpmRecord:
    """Makes what is missing and returns the record; store it with `encode_record`.

    `command_s` bounds each command, in seconds; making an RSA key takes some chips ten of them.

    Raises:
        TpmIdentityError: something else is where our keys should be, or the EK certificate is not the EK's.
        TpmError: the TPM is not there or refuses.
    """
    esys = Esys(connect, command_s)
    try:
        return _provision(esys, ak_handle)
    finally:
        esys.close()


def _provision(esys: Esys, ak_handle: int) -> TpmRecord:
    srk = _storage_key(esys)
    with endorsement_key(esys) as (ek, ek_public, certificate):
        if certificate is not None:
            _check_certificate(certificate, ek_public)
        ak = _attestation_key(esys, ek, ek_public, ak_handle)
    return TpmRecord(
        format="hostd-tpm/1",
        srk_handle=SRK_HANDLE,
        srk_public=srk.marshal(),
        ak_handle=ak_handle,
        ak_public=ak.marshal(),
        ek_public=ek_public.marshal(),
        ek_certificate=certificate,
    )


def _read_public(esys: Esys, key: Handle) -> tuple[Any, bytes, bytes]:
    public, name, qualified = esys.call("ReadPublic", lambda e: e.read_public(key))
    return public, bytes(name), bytes(qualified)


def _at(esys: Esys, handle: int) -> Handle | None:
    """The persistent object or NV index at a TPM handle, if there is one."""
    try:
        return esys.attach(handle)
    except TpmCommandError as error:
        if base_error(error.rc) == _RC_HANDLE:
            return None
        raise


def _persist(esys: Esys, key: Handle, handle: int) -> Handle:
    return esys.call("EvictControl", lambda e: e.evict_control(ESYS_TR.OWNER, key, handle))


def _storage_key(esys: Esys) -> Any:
    found = _at(esys, SRK_HANDLE)
    if found is None:
        made, *_ = esys.call(
            "CreatePrimary", lambda e: e.create_primary(None, storage_key_template(), ESYS_TR.OWNER)
        )
        with esys.flushing(made):
            found = _persist(esys, made, SRK_HANDLE)
    public, _name, _qualified = _read_public(esys, found)
    attributes = int(public.publicArea.objectAttributes) & ~int(TPMA_OBJECT.NODA)
    if attributes != STORAGE_KEY_ATTRIBUTES or public.publicArea.nameAlg != TPM2_ALG.SHA256:
        raise TpmIdentityError(f"what is at 0x{SRK_HANDLE:x} is not a storage key")
    return public


@contextlib.contextmanager
def endorsement_key(esys: Esys) -> Iterator[tuple[Handle, Any, bytes | None]]:
    """The EK as a transient primary (made from the TPM's endorsement seed, always the same), its public area,
    and its certificate."""
    chosen = next((name for name, index in _EK_TEMPLATES if _at(esys, index) is not None), None)
    certificate, template = esys.call(
        "NV_Read", lambda e: create_ek_template(chosen or _EK_TEMPLATES[0][0], NVReadEK(e))
    )
    ek, public, *_ = esys.call(
        "CreatePrimary", lambda e: e.create_primary(None, template, ESYS_TR.ENDORSEMENT)
    )
    with esys.flushing(ek):
        yield ek, public, None if certificate is None else trim_der(certificate)


def trim_der(data: bytes) -> bytes:
    """A DER object without the filling (00 or ff) that follows it in an NV index.

    Raises:
        TpmIdentityError: it is no DER sequence, or something else follows.
    """
    if len(data) < 4 or data[0] != 0x30 or not 0x81 <= data[1] <= 0x83:
        raise TpmIdentityError("the EK certificate in the TPM is not DER")
    octets = data[1] & 0x7F
    size = 2 + octets + int.from_bytes(data[2 : 2 + octets], "big")
    if size > len(data) or data[size:].strip(b"\x00\xff"):
        raise TpmIdentityError("the EK certificate in the TPM is not DER")
    return data[:size]


def _check_certificate(certificate: bytes, ek_public: Any) -> None:
    try:
        certified = load_certificate(certificate, Step.ENDORSEMENT).spki
    except VerificationError as error:
        raise TpmIdentityError(f"the EK certificate in the TPM: {error.message}") from error
    if certified != ek_public.to_der():
        raise TpmIdentityError("the EK certificate in the TPM is not that of its endorsement key")


def _attestation_key(esys: Esys, ek: Handle, ek_public: Any, handle: int) -> Any:
    found = _at(esys, handle)
    if found is None:
        found = _make_attestation_key(esys, ek, ek_public, handle)
    public, name, qualified = _read_public(esys, found)
    expected = attestation_key_template()
    expected.publicArea.unique.ecc = public.publicArea.unique.ecc
    if expected.marshal() != public.marshal():
        raise TpmIdentityError(f"what is at 0x{handle:x} is not an attestation key of hostd")
    ek_name = bytes(ek_public.get_name())
    if qualified != qualified_name(qualified_name(RH_ENDORSEMENT, ek_name), name):
        raise TpmIdentityError(f"the attestation key at 0x{handle:x} is not a child of this endorsement key")
    return public


def _make_attestation_key(esys: Esys, ek: Handle, ek_public: Any, handle: int) -> Handle:
    with _ek_authority(esys, ek_public) as authority:
        private, public, *_ = esys.call(
            "Create", lambda e: e.create(ek, None, attestation_key_template(), session1=authority)
        )
    with _ek_authority(esys, ek_public) as authority:
        ak = esys.call("Load", lambda e: e.load(ek, private, public, session1=authority))
    with esys.flushing(ak):
        return _persist(esys, ak, handle)


@contextlib.contextmanager
def _ek_authority(esys: Esys, ek_public: Any) -> Iterator[Handle]:
    """What authorises one use of the EK: PolicySecret(endorsement) for the L templates, the empty
    authValue for the H ones."""
    if is_used_by_password(ek_public):
        yield ESYS_TR.PASSWORD
        return
    session = esys.call(
        "StartAuthSession",
        lambda e: e.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, None, TPM2_ALG.SHA256),
    )
    with esys.flushing(session):
        open_by_policy(esys, session)
        yield session


def is_used_by_password(ek_public: Any) -> bool:
    """Whether the (empty) authValue authorises the EK's use, as in the H templates."""
    return bool(ek_public.publicArea.objectAttributes & TPMA_OBJECT.USERWITHAUTH)


def open_by_policy(esys: Esys, session: Handle) -> None:
    """Has a policy session authorise one use of an EK of the L templates; the TPM forgets it with that."""
    esys.call("PolicySecret", lambda e: e.policy_secret(ESYS_TR.ENDORSEMENT, session, b"", b"", b"", 0))
