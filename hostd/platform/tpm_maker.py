"""Being the maker of an embedded TPM: what a chip's factory does before it is sold.

On a fresh swtpm: leaves only the SHA-256 bank, derives the P-256 endorsement key (TCG template L-2),
certifies it by a CA made for this one TPM, stores the certificate at the TCG's NV index 0x01c0000a. The
CA's private key is thrown away. It proves nothing about hardware: it is there so that a development
host goes the same way as a real one (TCG EK Credential Profile 2.5, section 3).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509.oid import NameOID

from hostd.platform.tpm_esys import Esys
from hostd.platform.tpm_tcti import Link
from hostd.platform.tpm_templates import ESYS_TR

# isort: split
from tpm2_pytss.constants import TPM2_ALG, TPM2_SU, TPMA_NV
from tpm2_pytss.types import TPM2B_NV_PUBLIC, TPML_PCR_SELECTION, TPMS_NV_PUBLIC
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

EK_CERTIFICATE_INDEX: Final = 0x01C0000A
_NV_CHUNK: Final = 1024
_YEARS: Final = datetime.timedelta(days=365 * 20)
_TCG_EK_CERTIFICATE: Final = x509.ObjectIdentifier("2.23.133.8.1")
_TPM_MANUFACTURER: Final = x509.ObjectIdentifier("2.23.133.2.1")
_TPM_MODEL: Final = x509.ObjectIdentifier("2.23.133.2.2")
_TPM_VERSION: Final = x509.ObjectIdentifier("2.23.133.2.3")


@dataclass(frozen=True, slots=True)
class Made:
    """Certificates, DER: of the endorsement key, and of the CA that issued it."""

    ek_certificate: bytes
    ca_certificate: bytes


def allocate_sha256_only(connect: Callable[[], Link], *, command_s: float) -> None:
    """Leaves SHA-256 as the only bank of PCRs; takes effect when the TPM starts again."""
    esys = Esys(connect, command_s)
    try:
        # Marshalled by hand: the library cannot say an empty bank. Count, then algorithm, size 3, bit map.
        banks, _used = TPML_PCR_SELECTION.unmarshal(
            bytes.fromhex("00000004000b03ffffff000403000000000c03000000000d03000000")
        )
        esys.call("PCR_Allocate", lambda e: e.pcr_allocate(banks))
        _shutdown(esys)
    finally:
        esys.close()


def certify(connect: Callable[[], Link], *, now: datetime.datetime, command_s: float) -> Made:
    """Derives the endorsement key, certifies it and stores the certificate."""
    esys = Esys(connect, command_s)
    try:
        _none, template = create_ek_template("EK-ECC256", _no_nv)
        ek, public, *_ = esys.call(
            "CreatePrimary", lambda e: e.create_primary(None, template, ESYS_TR.ENDORSEMENT)
        )
        esys.flush(ek)
        made = _issue(public.to_der(), now)
        _store(esys, made.ek_certificate)
        _shutdown(esys)
    finally:
        esys.close()
    return made


def _shutdown(esys: Esys) -> None:
    esys.call("Shutdown", lambda e: e.shutdown(TPM2_SU.CLEAR))


def _no_nv(index: int) -> bytes:
    raise NoSuchIndex(index)


def _store(esys: Esys, certificate: bytes) -> None:
    public = TPM2B_NV_PUBLIC(
        nvPublic=TPMS_NV_PUBLIC(
            nvIndex=EK_CERTIFICATE_INDEX,
            nameAlg=TPM2_ALG.SHA256,
            attributes=TPMA_NV.PLATFORMCREATE
            | TPMA_NV.PPWRITE
            | TPMA_NV.WRITEDEFINE
            | TPMA_NV.PPREAD
            | TPMA_NV.OWNERREAD
            | TPMA_NV.AUTHREAD
            | TPMA_NV.NO_DA,
            dataSize=len(certificate),
        )
    )
    index = esys.call(
        "NV_DefineSpace", lambda e: e.nv_define_space(b"", public, auth_handle=ESYS_TR.PLATFORM)
    )

    def write(esapi: Any) -> None:
        for offset in range(0, len(certificate), _NV_CHUNK):
            chunk = certificate[offset : offset + _NV_CHUNK]
            esapi.nv_write(index, chunk, offset, auth_handle=ESYS_TR.PLATFORM)

    esys.call("NV_Write", write)


def _issue(ek_der: bytes, now: datetime.datetime) -> Made:
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hostd embedded TPM maker")])
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    usage = {
        "digital_signature": False,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": False,
        "crl_sign": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    ca = (
        x509.CertificateBuilder()
        .subject_name(ca_name)
        .issuer_name(ca_name)
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**{**usage, "key_cert_sign": True}), critical=True)
        .add_extension(ca_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    model = x509.Name(
        [
            x509.NameAttribute(_TPM_MANUFACTURER, "id:00001014"),
            x509.NameAttribute(_TPM_MODEL, "swtpm"),
            x509.NameAttribute(_TPM_VERSION, "id:20191023"),
        ]
    )
    ek_key = load_der_public_key(ek_der)
    assert isinstance(ek_key, ec.EllipticCurvePublicKey)
    ek = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca_name)
        .public_key(ek_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _YEARS)
        .add_extension(x509.SubjectAlternativeName([x509.DirectoryName(model)]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{**usage, "key_agreement": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_TCG_EK_CERTIFICATE]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return Made(ek.public_bytes(Encoding.DER), ca.public_bytes(Encoding.DER))
