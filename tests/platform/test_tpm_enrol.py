"""Opening credentials as the vault does: for its own keys only, with nothing left in the TPM."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from support_tpm import Embedded, make_embedded
from test_tpm import leftovers
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

from guestlib.attest.credential import Credential, make_credential
from guestlib.attest.tpm2 import (
    RH_ENDORSEMENT,
    EccKey,
    RsaKey,
    parse_attest,
    parse_public,
    qualified_name,
)
from hostd.platform import tpm_enrol, tpm_maker, tpm_provision
from hostd.platform.tpm import Tpm
from hostd.platform.tpm_errors import (
    TpmCommandError,
    TpmCredentialError,
    TpmIdentityError,
    TpmUnavailableError,
)
from hostd.platform.tpm_esys import ESYS_TR, Esys
from hostd.platform.tpm_files import TpmRecord
from hostd.platform.tpm_provision import provision


def credential(host: Embedded, secret: bytes, name: bytes | None = None) -> Credential:
    return make_credential(parse_public(host.record.ek_public), name or host.record.ak_name, secret)


def test_opens_a_credential_and_leaves_nothing(tpm: Tpm, host: Embedded) -> None:
    for size in (1, 31, 32):
        secret = os.urandom(size)
        assert tpm.activate(credential(host, secret)) == secret
        assert leftovers(host) == ()


def test_beside_the_session_that_reads_pcrs(tpm: Tpm, host: Embedded) -> None:
    """A TPM has room for three sessions, of which the vault may keep one."""
    tpm.check_pcrs((0, 7))
    kept = leftovers(host)
    assert tpm.activate(credential(host, b"secret")) == b"secret"
    assert leftovers(host) == kept
    tpm.check_pcrs((0, 7))


def test_of_another_tpm(tpm: Tpm, host: Embedded, own_host: Embedded) -> None:
    with pytest.raises(TpmCredentialError, match="made for other keys, or altered"):
        tpm.activate(credential(own_host, b"secret"))
    # Its EK with our key's Name, and the other way round.
    with pytest.raises(TpmCredentialError):
        tpm.activate(credential(own_host, b"secret", host.record.ak_name))
    with pytest.raises(TpmCredentialError):
        tpm.activate(credential(host, b"secret", own_host.record.ak_name))
    assert leftovers(host) == ()


def test_altered(tpm: Tpm, host: Embedded) -> None:
    good = credential(host, bytes(32))
    for field in ("id_object", "encrypted_secret"):
        data: bytes = getattr(good, field)
        for at in range(0, len(data), 7):
            altered = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            with pytest.raises(TpmCredentialError):
                tpm.activate(replace(good, **{field: altered}))
        for broken in (b"", data[:-1], data + b"\0"):
            with pytest.raises(TpmCredentialError, match=r"not a TPM structure|not in the TPM's form"):
                tpm.activate(replace(good, **{field: broken}))
    assert leftovers(host) == ()
    assert tpm.activate(good) == bytes(32)


def test_the_record_of_another_endorsement_key(host: Embedded, own_host: Embedded) -> None:
    tpm = own_host.open()
    tpm.record = msgspec.structs.replace(tpm.record, ek_public=host.record.ek_public)
    with pytest.raises(TpmIdentityError, match="its endorsement key is another"):
        tpm.activate(credential(own_host, b"secret"))
    assert leftovers(own_host) == ()
    tpm.close()


def test_a_cleared_tpm(own_host: Embedded) -> None:
    """TPM2_Clear takes the keys away; the EK is made again, and a new AK is another."""
    made = credential(own_host, b"secret")
    tpm = own_host.open()
    assert tpm.activate(made) == b"secret"
    esys = Esys(own_host.connect, 20.0)
    esys.call("Clear", lambda e: e.clear(ESYS_TR.LOCKOUT))
    esys.close()
    with pytest.raises(TpmIdentityError, match="another TPM, or one that was cleared"):
        own_host.open()
    tpm.close()
    record = provision(own_host.connect, command_s=20)
    assert record.ek_public == own_host.record.ek_public
    assert record.ak_name != own_host.record.ak_name
    own_host.record = record
    again = own_host.open()
    with pytest.raises(TpmCredentialError):
        again.activate(made)
    again.close()


def test_whatever_fails_leaves_nothing(tpm: Tpm, host: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    made = credential(host, b"secret")

    def refused(*_: object) -> None:
        raise TpmCommandError(0x9A2, "PolicySecret", "bad authorisation")

    with monkeypatch.context() as patched:
        patched.setattr(tpm_enrol, "open_by_policy", refused)
        with pytest.raises(TpmCommandError):
            tpm.activate(made)
        assert leftovers(host) == ()
        # Without the policy the TPM does not use the key.
        patched.setattr(tpm_enrol, "open_by_policy", lambda *_: None)
        with pytest.raises(TpmCommandError, match="ActivateCredential"):
            tpm.activate(made)
        assert leftovers(host) == ()
    assert tpm.activate(made) == b"secret"


def test_the_wire_does_not_show_the_secret(own_host: Embedded) -> None:
    secret = os.urandom(32)
    tpm = own_host.open()
    made = credential(own_host, secret)
    assert tpm.activate(made) == secret
    tpm.close()
    own_host.process.stop()
    wire = "".join(own_host.log.read_text().split()).lower()
    assert made.id_object.hex() in wire
    assert secret.hex() not in wire


def test_no_tpm(own_host: Embedded) -> None:
    tpm = own_host.open()
    own_host.process.kill()
    with pytest.raises(TpmUnavailableError):
        tpm.activate(credential(own_host, b"secret"))
    tpm.close()


def test_an_rsa_endorsement_key(own_host: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a policy too; a TPM without a certificate for it."""
    monkeypatch.setattr(tpm_provision, "_EK_TEMPLATES", (("EK-RSA2048", 0x01C00002),))
    _works(own_host, provision(own_host.connect, command_s=60, ak_handle=0x81010020), RsaKey)


def test_a_p384_endorsement_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the high range: its Name is made with SHA-384, and its use needs no policy."""

    def template(_kind: str, _read: object) -> object:
        return create_ek_template("EK-HIGH-ECC384", lambda index: _nothing(index, 0x01C00016))

    with monkeypatch.context() as patched:
        patched.setattr(tpm_maker, "create_ek_template", template)
        patched.setattr(tpm_maker, "EK_CERTIFICATE_INDEX", 0x01C00016)
        made = make_embedded(tmp_path)
    try:
        assert made.record.ek_certificate is not None
        assert made.record.ek_public[4:6] == bytes.fromhex("000c")
        assert provision(made.connect, command_s=20) == made.record
        _works(made, made.record, EccKey)
    finally:
        made.process.kill()


def _nothing(index: int, certificate: int) -> bytes:
    if index == certificate:
        return b"a certificate that is yet to be made"
    raise NoSuchIndex(index)


def _works(host: Embedded, record: TpmRecord, kind: type) -> None:
    host.record = record
    ek = parse_public(record.ek_public)
    assert isinstance(ek.key, kind)
    tpm = host.open()
    try:
        assert tpm.activate(make_credential(ek, record.ak_name, b"secret")) == b"secret"
        other = record.ak_name[:-1] + bytes([record.ak_name[-1] ^ 1])
        with pytest.raises(TpmCredentialError):
            tpm.activate(make_credential(ek, other, b"secret"))
        quote, _values = tpm.quote_with_pcrs(b"", (0,))
        child = qualified_name(qualified_name(RH_ENDORSEMENT, ek.name), record.ak_name)
        assert parse_attest(quote.attest).qualified_signer == child
        assert leftovers(host) == ()
    finally:
        tpm.close()
