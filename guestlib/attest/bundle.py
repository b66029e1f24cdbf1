"""The trust bundle `hostd-trust/1`: what a verifier accepts. Explicit in all; there are no defaults.

    {"format": "hostd-trust/1",
     "require": ["posture", "ima", "files"],      components that must be verified; not empty
     "aks": [base64, …],                          pinned attestation keys, TPM2B_PUBLIC
     "host_roots": [PEM, …],                      CAs whose host certificates stand for a pinned key
     "hosts": [name, …],                          of the hosts that these certify; only with host_roots
     "ek_roots": [PEM, …],                        the TPM's endorsement certificate must chain to one
     "channel_ca": PEM or [PEM, …],               the channel CA itself is pinned: it is one of these
     "pcrs": {"7": [hex, …]},                     accepted values of PCRs of the SHA-256 bank
     "reference": [hex, …],                       accepted digests of reference values
     "ledger": [key, …]}                          keys that sign checkpoints of the ledger (`notekey`)

All but `format` and `require` may be left out; what is left out is not checked, and what is there must
hold. An attestation key is accepted if it is pinned **or** certified. A bundle that names nobody does not
parse. One without `aks` and `host_roots` cannot verify evidence: an endorsement certificate is public, so
showing it proves nothing about the key that signs.

Standard library only, so that a client can read a bundle that pins a channel CA without `cryptography`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import ssl
from dataclasses import dataclass
from typing import Any, Final

from guestlib.attest.hostname import HOST_NAME
from guestlib.attest.notekey import parse_key
from guestlib.errors import MalformedError

FORMAT: Final = "hostd-trust/1"
MAX_BUNDLE_BYTES: Final = 1 << 20
MAX_LIST: Final = 1024
MAX_PUBLIC_BYTES: Final = 1024
_DIGEST_BYTES: Final = 32
_FIELDS: Final = frozenset(
    {
        *("format", "require", "aks", "host_roots", "hosts", "ek_roots", "channel_ca", "pcrs"),
        *("reference", "ledger"),
    }
)
_COMPONENT: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """What is accepted. Certificates are DER here; an empty tuple or None: not checked.

    Raises:
        ValueError: nothing is required, nothing is pinned, or hosts are named that nobody certifies.
    """

    require: frozenset[str]
    aks: tuple[bytes, ...] = ()
    ek_roots: tuple[bytes, ...] = ()
    channel_cas: tuple[bytes, ...] = ()
    """More than one while another is to come into force: whichever it is, is accepted."""
    pcrs: tuple[tuple[int, frozenset[bytes]], ...] = ()
    reference: frozenset[bytes] = frozenset()
    ledger: tuple[str, ...] = ()
    host_roots: tuple[bytes, ...] = ()
    hosts: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.require or not all(_COMPONENT.fullmatch(component) for component in self.require):
            raise ValueError("require must name components, at least one")
        if not (self.aks or self.host_roots or self.ek_roots or self.channel_cas):
            raise ValueError("nothing is pinned: no aks, no host_roots, no ek_roots, no channel_ca")
        if not all(HOST_NAME.fullmatch(host) for host in self.hosts):
            raise ValueError("hosts: not a host's name")
        if self.hosts and not self.host_roots:
            raise ValueError("hosts without host_roots: nobody certifies their names")


def parse_bundle(data: bytes) -> TrustBundle:
    """Parses a bundle of at most 1 MiB.

    Raises:
        MalformedError: it is not one, has an unknown field, or would accept anybody.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise MalformedError(f"trust bundle: over {MAX_BUNDLE_BYTES} bytes")
    try:
        fields = json.loads(data, object_pairs_hook=_no_duplicates)
        return _bundle(fields)
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        raise MalformedError(f"trust bundle: {error}") from error


def encode_bundle(bundle: TrustBundle) -> bytes:
    """The bundle as a file to hand out."""
    fields: dict[str, Any] = {"format": FORMAT, "require": sorted(bundle.require)}
    if bundle.aks:
        fields["aks"] = [base64.b64encode(ak).decode() for ak in bundle.aks]
    if bundle.host_roots:
        fields["host_roots"] = [ssl.DER_cert_to_PEM_cert(root) for root in bundle.host_roots]
    if bundle.hosts:
        fields["hosts"] = sorted(bundle.hosts)
    if bundle.ek_roots:
        fields["ek_roots"] = [ssl.DER_cert_to_PEM_cert(root) for root in bundle.ek_roots]
    if bundle.channel_cas:
        # One is written as it always was, for verifiers that know no list.
        pinned = [ssl.DER_cert_to_PEM_cert(ca) for ca in bundle.channel_cas]
        fields["channel_ca"] = pinned[0] if len(pinned) == 1 else pinned
    if bundle.pcrs:
        fields["pcrs"] = {str(index): sorted(v.hex() for v in values) for index, values in bundle.pcrs}
    if bundle.reference:
        fields["reference"] = sorted(digest.hex() for digest in bundle.reference)
    if bundle.ledger:
        fields["ledger"] = list(bundle.ledger)
    return json.dumps(fields, indent=2).encode() + b"\n"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is given twice")
    return fields


def _bundle(fields: Any) -> TrustBundle:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"not a {FORMAT} document")
    unknown = sorted(fields.keys() - _FIELDS)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}")
    return TrustBundle(
        require=frozenset(_strings(fields, "require", required=True)),
        aks=tuple(_structure(text) for text in _strings(fields, "aks")),
        ek_roots=tuple(_certificate(text) for text in _strings(fields, "ek_roots")),
        channel_cas=_channel_cas(fields["channel_ca"]) if "channel_ca" in fields else (),
        pcrs=_pcrs(fields["pcrs"]) if "pcrs" in fields else (),
        reference=frozenset(_sha256(text) for text in _strings(fields, "reference")),
        ledger=tuple(str(parse_key(text)) for text in _strings(fields, "ledger")),
        host_roots=tuple(_certificate(text) for text in _strings(fields, "host_roots")),
        hosts=frozenset(_strings(fields, "hosts")),
    )


def _strings(fields: dict[str, Any], name: str, *, required: bool = False) -> list[str]:
    """A list of strings; if the field is there it is not empty: an empty list would check nothing."""
    if name not in fields and not required:
        return []
    return _string_list(fields.get(name), name)


def _string_list(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} is not a list of strings")
    if not 0 < len(value) <= MAX_LIST:
        raise ValueError(f"{name} has {len(value)} items, not 1 to {MAX_LIST}")
    return value


def _structure(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    if not 0 < len(data) <= MAX_PUBLIC_BYTES:
        raise ValueError("aks: not a public area")
    return data


def _certificate(text: Any) -> bytes:
    if not isinstance(text, str):
        raise TypeError("a certificate is not a string")
    der = ssl.PEM_cert_to_DER_cert(text)
    if text.count("-----BEGIN") != 1 or not der:
        raise ValueError("not exactly one certificate")
    return der


def _channel_cas(value: Any) -> tuple[bytes, ...]:
    if isinstance(value, list):
        return tuple(_certificate(text) for text in _string_list(value, "channel_ca"))
    return (_certificate(value),)


def _sha256(text: str) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != _DIGEST_BYTES:
        raise ValueError("a digest is not 32 bytes")
    return digest


def _pcrs(value: Any) -> tuple[tuple[int, frozenset[bytes]], ...]:
    if not isinstance(value, dict) or not value:
        raise TypeError("pcrs is not an object with PCRs")
    accepted = []
    for name, values in value.items():
        if name not in {str(index) for index in range(24)}:
            raise ValueError(f"pcrs: {name!r} is no PCR")
        accepted.append((int(name), frozenset(map(_sha256, _string_list(values, f"pcrs.{name}")))))
    return tuple(sorted(accepted, key=lambda pair: pair[0]))
