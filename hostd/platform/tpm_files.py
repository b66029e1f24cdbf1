"""The two files that belong to the TPM: the record of its keys, and a sealed secret.

Both are strict JSON with a version. A record is the pin: at every open the TPM's storage key and
attestation key must be the recorded ones. A sealed file also carries the PCR values that it was
sealed to, so that a refusal can name each PCR; they are checked against the policy inside the
blob, so they cannot be made to say something else.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from hostd.platform.durable import sync_folder
from hostd.platform.tpm_errors import TpmBlobError
from hostd.platform.tpm_policy import DIGEST_BYTES, check_selection

MAX_FILE_BYTES: Final = 64 << 10
"""An EK certificate is some 2 KiB, a blob some hundred bytes."""

_Public = Annotated[bytes, msgspec.Meta(min_length=2, max_length=1024)]
_Blob = Annotated[bytes, msgspec.Meta(min_length=2, max_length=2048)]
_Certificate = Annotated[bytes, msgspec.Meta(min_length=1, max_length=16384)]
_Handle = Annotated[int, msgspec.Meta(ge=0x81000000, le=0x81FFFFFF)]
_T = TypeVar("_T", bound=msgspec.Struct)


def name_of(public: bytes) -> bytes:
    """The Name of an object with nameAlg SHA-256: 000b and SHA-256 of its TPMT_PUBLIC; 34 bytes.

    `public` is a TPM2B_PUBLIC (TPM 2.0 part 1, section 16).
    """
    return b"\x00\x0b" + hashlib.sha256(public[2:]).digest()


class TpmRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `provision` made or found. Public areas are TPM2B_PUBLIC: 2 bytes of length, TPMT_PUBLIC."""

    format: Literal["hostd-tpm/1"]
    srk_handle: _Handle
    srk_public: _Public
    ak_handle: _Handle
    ak_public: _Public
    ek_public: _Public
    ek_certificate: _Certificate | None
    """DER, from the TPM's NV memory; None if the TPM has none."""

    @property
    def srk_name(self) -> bytes:
        return name_of(self.srk_public)

    @property
    def ak_name(self) -> bytes:
        return name_of(self.ak_public)


class SealedBlob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A secret of at most 128 bytes, sealed under the storage key to values of PCRs (SHA-256 bank)."""

    format: Literal["hostd-sealed/1"]
    public: _Blob
    """TPM2B_PUBLIC of the sealed object."""
    private: _Blob
    """TPM2B_PRIVATE: encrypted by the TPM."""
    pcrs: dict[str, str]
    """PCR index in decimal → value in lower-case hex."""

    def values(self) -> dict[int, bytes]:
        return {int(index): bytes.fromhex(value) for index, value in self.pcrs.items()}


def sealed_blob(public: bytes, private: bytes, values: Mapping[int, bytes]) -> SealedBlob:
    """A blob for the given parts."""
    pcrs = {str(index): values[index].hex() for index in sorted(values)}
    return SealedBlob(format="hostd-sealed/1", public=public, private=private, pcrs=pcrs)


def encode_record(record: TpmRecord) -> bytes:
    return _encode(record)


def parse_record(data: bytes) -> TpmRecord:
    """Parses a record.

    Raises:
        TpmBlobError: it is not one.
    """
    return _decode(data, TpmRecord, "TPM record")


def encode_blob(blob: SealedBlob) -> bytes:
    return _encode(blob)


def parse_blob(data: bytes) -> SealedBlob:
    """Parses a sealed file.

    Raises:
        TpmBlobError: it is not one, or its PCRs are not a selection with values of 32 bytes.
    """
    blob = _decode(data, SealedBlob, "sealed file")
    try:
        values = blob.values()
        check_selection(values)
    except ValueError as error:
        raise TpmBlobError("sealed file: its PCRs are not PCRs") from error
    if any(len(value) != DIGEST_BYTES for value in values.values()):
        raise TpmBlobError("sealed file: a PCR value is not 32 bytes")
    if sealed_blob(blob.public, blob.private, values) != blob:
        raise TpmBlobError("sealed file: its PCRs are not in canonical form")
    return blob


def _encode(thing: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(thing, order="deterministic"), indent=2) + b"\n"


def _decode(data: bytes, cls: type[_T], what: str) -> _T:
    if len(data) > MAX_FILE_BYTES:
        raise TpmBlobError(f"{what}: over {MAX_FILE_BYTES} bytes")
    try:
        thing = msgspec.json.decode(data, type=cls)
    except (ValueError, RecursionError) as error:
        raise TpmBlobError(f"{what}: {error}") from error
    if _encode(thing) != data:
        raise TpmBlobError(f"{what}: not in the form that hostd writes")
    return thing


def read_file(path: Path) -> bytes:
    """The bytes of one of these files.

    Raises:
        TpmBlobError: it cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TpmBlobError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise TpmBlobError(f"{path}: over {MAX_FILE_BYTES} bytes")
    return data


def write_file(path: Path, data: bytes) -> None:
    """Writes the file with mode 0600; it is there whole and durable, or the old one is.

    Raises:
        OSError: it cannot be written.
    """
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)
