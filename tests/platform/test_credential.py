"""Credentials made in pure Python, opened by a real TPM with every kind of endorsement key it can make."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from support_tpm import Embedded
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

from guestlib.attest.credential import MAX_SECRET_BYTES, Credential, make_credential
from guestlib.attest.tpm2 import Attribute, EccKey, Public, parse_public, qualified_name
from guestlib.errors import MalformedError
from hostd.platform.tpm_errors import TpmCommandError
from hostd.platform.tpm_esys import ESYS_TR, Esys, Handle
from hostd.platform.tpm_provision import _ek_authority
from hostd.platform.tpm_templates import attestation_key_template, credential_from

KINDS = ("EK-RSA2048", "EK-ECC256", "EK-HIGH-RSA2048", "EK-HIGH-ECC256", "EK-HIGH-ECC384")
Open = Callable[[Credential], bytes]


@contextmanager
def keys(host: Embedded, kind: str) -> Iterator[tuple[Public, bytes, bytes, Open]]:
    """An EK of that template and an AK under it: the EK, the AK's Name and qualified Name, and the TPM's
    TPM2_ActivateCredential for them."""
    esys = Esys(host.connect, 20.0)

    def read(index: int) -> bytes:
        # The library gives no template of the high range for a TPM without a certificate there.
        if "HIGH" in kind and index % 2 == 0:
            return b"certificate"
        raise NoSuchIndex(index)

    _certificate, template = create_ek_template(kind, read)
    ek, public, *_ = esys.call(
        "CreatePrimary", lambda e: e.create_primary(None, template, ESYS_TR.ENDORSEMENT)
    )
    with esys.flushing(ek):
        with _ek_authority(esys, public) as authority:
            made = esys.call(
                "Create", lambda e: e.create(ek, None, attestation_key_template(), session1=authority)
            )
        with _ek_authority(esys, public) as authority:
            ak = esys.call("Load", lambda e: e.load(ek, made[0], made[1], session1=authority))
        with esys.flushing(ak):
            _public, name, qualified = esys.call("ReadPublic", lambda e: e.read_public(ak))
            opened = _opener(esys, ek, public, ak)
            yield parse_public(public.marshal()), bytes(name), bytes(qualified), opened
    esys.close()


def _opener(esys: Esys, ek: Handle, public: Any, ak: Handle) -> Open:
    def opened(credential: Credential) -> bytes:
        parts = credential_from(credential.id_object, credential.encrypted_secret)
        with _ek_authority(esys, public) as authority:
            return esys.call(
                "ActivateCredential",
                lambda e: bytes(
                    e.activate_credential(ak, ek, *parts, session1=ESYS_TR.PASSWORD, session2=authority)
                ),
            )

    return opened


@pytest.mark.parametrize("kind", KINDS)
def test_the_tpm_opens_what_was_made_for_it(host: Embedded, kind: str) -> None:
    with keys(host, kind) as (ek, name, qualified, opened):
        assert qualified == qualified_name(qualified_name(bytes.fromhex("4000000b"), ek.name), name)

        @settings(max_examples=15)
        @given(st.binary(min_size=1, max_size=MAX_SECRET_BYTES))
        def every(secret: bytes) -> None:
            assert opened(make_credential(ek, name, secret)) == secret

        every()
        # Another key's Name, and every altered byte: the TPM gives nothing.
        secret = os.urandom(32)
        for other in (name[:-1] + bytes([name[-1] ^ 1]), ek.name, b""):
            with pytest.raises(TpmCommandError):
                opened(make_credential(ek, other, secret))
        good = make_credential(ek, name, secret)
        assert opened(good) == secret
        for field in ("id_object", "encrypted_secret"):
            data: bytes = getattr(good, field)
            for at in range(2, len(data), 5):
                altered = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
                with pytest.raises(TpmCommandError):
                    opened(replace(good, **{field: altered}))


@pytest.mark.parametrize("kind", ["EK-ECC256", "EK-HIGH-ECC384"])
def test_a_coordinate_that_begins_with_zeros(host: Embedded, kind: str) -> None:
    """The sender's coordinates have the curve's length, in the derivation as on the wire."""
    with keys(host, kind) as (ek, name, _qualified, opened):
        assert isinstance(ek.key, EccKey)
        curve: ec.EllipticCurve = ec.SECP256R1() if len(ek.key.x) == 32 else ec.SECP384R1()
        short = 8 * (len(ek.key.x) - 1)
        for axis in ("x", "y"):
            ephemeral = next(
                key
                for key in (ec.derive_private_key(number, curve) for number in itertools.count(1))
                if getattr(key.public_key().public_numbers(), axis).bit_length() <= short
            )
            assert opened(make_credential(ek, name, b"short", ephemeral=ephemeral)) == b"short"


NAME = bytes.fromhex("000b") + bytes(range(32))
VECTORS = {
    # EK (TPM2B_PUBLIC, private scalar 1234567), TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET: of bytes 32 to 63
    # for `NAME`, the sender's scalar 7654321. Made with another implementation, that of tpm2-pytss.
    "P-256": (
        ec.SECP256R1(),
        bytes.fromhex(
            "005a0023000b000300000000000600800043001000030010002065de15fecb7ec3cdfb570fa87ab71ce1f18e89d5976b"
            "07057cdbbff5ff85b760002067d85098b6903bad82beb0c988f79f1f295e9c1285c580b199836120ed1bbf7e"
        ),
        bytes.fromhex(
            "0044002018909bb641fdcf96c6d8b282235f02ea1d5b0e72bd3093ec32a25821b1f2c366e53ff271bb32148cf81821ab"
            "3d2e023225c574736669db90d5eb75371bd99e21f83a"
        ),
        bytes.fromhex(
            "004400206fb949d79b64b1471a9e09c76850bccbd891fe476df080f861a50b1d3e89c9a50020f9166a57790241a4ba50"
            "de356335e0cc504746f314343bb946349784fcfcab4a"
        ),
    ),
    "P-384": (
        ec.SECP384R1(),
        bytes.fromhex(
            "007a0023000c00030000000000060100004300100004001000300b9eeb6fed0ee2e53ed882ab96e5abc0c17df74e85d6"
            "bdd86df83a635b0be059ad48cdda906eb74a09e6b670cd88383200307039ed25e843ba051cc8f5c9039c11b6b6e2630b"
            "b833ffba6a26c172f035d0750e871474bba992279c852e1371ac727f"
        ),
        bytes.fromhex(
            "0054003082bfaa93caf2da4ccbb07bf978108126a5accd813f6f5c2d0162e3944e1a6e1d1f9ce1a8b63aab19ad772990"
            "42332569a9464dbf264118fa9bd3f72893b235786e599d309e809aa6f8f735f1f31951c79238"
        ),
        bytes.fromhex(
            "00640030ca24f5657e7b39636a11e7fa3678d21a6a8fbca4646ed2d7150d5392dd04cd5f32f174f8699eba273e5ba73f"
            "afdd967b0030a5be222dfd592ad01ba2f9cd5a19fb3026e3a81897211e187962688a6e08c629d313156ef5f6b42517de"
            "39883ddbf6db"
        ),
    ),
}


@pytest.mark.parametrize("curve", VECTORS)
def test_known_answers(curve: str) -> None:
    group, ek, id_object, encrypted = VECTORS[curve]
    ephemeral = ec.derive_private_key(7654321, group)
    made = make_credential(parse_public(ek), NAME, bytes(range(32, 64)), ephemeral=ephemeral)
    assert made == Credential(id_object, encrypted)


def test_a_fresh_sender_each_time() -> None:
    ek = parse_public(VECTORS["P-256"][1])
    one, two = (make_credential(ek, NAME, bytes(32)) for _ in range(2))
    assert one.id_object != two.id_object
    assert one.encrypted_secret != two.encrypted_secret


@pytest.mark.parametrize("size", [0, MAX_SECRET_BYTES + 1])
def test_a_secret_has_a_length(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 32 bytes"):
        make_credential(parse_public(VECTORS["P-256"][1]), NAME, bytes(size))


def test_only_for_a_key_that_opens_credentials(host: Embedded) -> None:
    """Somebody could show the public area of any key; to a signing one nothing is encrypted."""
    ek = parse_public(host.record.ek_public)
    wrong = (
        parse_public(host.record.ak_public),
        replace(ek, attributes=ek.attributes & ~Attribute.RESTRICTED),
        replace(ek, attributes=ek.attributes & ~Attribute.DECRYPT),
        replace(ek, attributes=ek.attributes | Attribute.SIGN),
        replace(ek, aes_bits=0),
    )
    for key in wrong:
        with pytest.raises(MalformedError, match="not a restricted decryption key"):
            make_credential(key, NAME, bytes(32))
    # The mode of another kind than CFB (0043) is read as none.
    at = host.record.ek_public.index(bytes.fromhex("000600800043"))
    ctr = host.record.ek_public[:at] + bytes.fromhex("000600800040") + host.record.ek_public[at + 6 :]
    assert parse_public(ctr).aes_bits == 0


@pytest.mark.parametrize("name", [b"", b"\0", bytes(34), b"\0\x0b" + bytes(31), b"\0\x0c" + bytes(32)])
def test_what_is_no_name_has_no_qualified_name(name: bytes) -> None:
    with pytest.raises(MalformedError, match="not a Name"):
        qualified_name(bytes.fromhex("4000000b"), name)
