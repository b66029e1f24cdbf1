"""Checkpoints of the ledger: C2SP tlog-checkpoint in a C2SP signed note, which witnesses and log tools read.

    hostd-ledger/4f1c…                    origin, also the name of the key
    1234                                  entries
    9uYh…=                                root, base64
                                          (an empty line)
    — hostd-ledger/4f1c… base64(key id (4 bytes) || Ed25519 signature (64 bytes) over the three lines)
    — hostd-ledger/4f1c… base64(key id (4 bytes) || the TPM's quote over the same size and root)

The second signature is of a type of our own (0xff): a signed head as canonical JSON (`signedhead`). Whoever
does not know it ignores it, as the specification demands.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.attest.canonical import canonical
from guestlib.attest.ledgerentry import no_duplicates
from guestlib.attest.notekey import ID_BYTES, VerifierKey, key_id, parse_key
from guestlib.attest.signedhead import SignedHead, head_of, verify_head
from guestlib.attest.steps import Step
from guestlib.errors import MalformedError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from guestlib.attest.bundle import TrustBundle

MAX_NOTE_BYTES: Final = 64 << 10
MAX_SIGNATURES: Final = 100
"""As Go's `note` package; the specification asks for 16 at least."""
QUOTE: Final = b"\xffhostd tpm quote v1\0"
"""Signature type: 0xff is for those without an assigned byte, followed by a longer name."""
_ROOT_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_DASH: Final = "\u2014 "


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Parsed and **not** verified."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...]
    body: bytes
    """What is signed."""
    signatures: tuple[tuple[str, bytes, bytes], ...]
    """(key name, key id, signature)."""


def body_of(origin: str, size: int, root: bytes) -> bytes:
    """What is signed: origin, size and root, a line each."""
    return f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n".encode()


def encode_checkpoint(
    origin: str, head: SignedHead, ak: bytes, public: bytes, sign: Callable[[bytes], bytes]
) -> bytes:
    """The note of a signed head. `public` and `sign` are the Ed25519 key's, `ak` the TPM's public area."""
    body = body_of(origin, head.size, head.root)
    lines = (
        VerifierKey(origin, public).id + sign(body),
        key_id(origin, QUOTE, ak) + canonical(head.fields),
    )
    signed = "".join(f"{_DASH}{origin} {base64.b64encode(line).decode()}\n" for line in lines)
    return body + b"\n" + signed.encode()


def parse_checkpoint(note: bytes) -> Checkpoint:
    """Raises: MalformedError, it is no signed note or no checkpoint."""
    try:
        return _checkpoint(note)
    except (ValueError, binascii.Error) as error:
        raise MalformedError(f"checkpoint: {error}") from error


def _checkpoint(note: bytes) -> Checkpoint:
    if len(note) > MAX_NOTE_BYTES:
        raise ValueError(f"over {MAX_NOTE_BYTES} bytes")
    text = note.decode()
    if any(c < " " and c != "\n" for c in text):
        raise ValueError("a control character")
    body, between, signed = text.rpartition("\n\n")
    if not between or not signed.endswith("\n"):
        raise ValueError("no signatures")
    body += "\n"
    origin, _, rest = body.partition("\n")
    size, _, rest = rest.partition("\n")
    root, _, rest = rest.partition("\n")
    if not origin or _SIZE.fullmatch(size) is None or int(size) >= 1 << 63:
        raise ValueError("no origin or no size")
    hashed = base64.b64decode(root, validate=True)
    if len(hashed) != _ROOT_BYTES or base64.b64encode(hashed).decode() != root:
        raise ValueError("the root is not 32 bytes")
    extensions = tuple(rest.split("\n")[:-1])
    if "" in extensions:
        raise ValueError("an empty extension line")
    lines = signed.split("\n")[:-1]
    if len(lines) > MAX_SIGNATURES:
        raise ValueError(f"over {MAX_SIGNATURES} signatures")
    return Checkpoint(origin, int(size), hashed, extensions, body.encode(), tuple(map(_signature, lines)))


def _signature(line: str) -> tuple[str, bytes, bytes]:
    if not line.startswith(_DASH):
        raise ValueError("not a signature line")
    name, between, encoded = line.removeprefix(_DASH).partition(" ")
    raw = base64.b64decode(encoded, validate=True)
    if not between or not name or "+" in name or any(c.isspace() for c in name) or len(raw) <= ID_BYTES:
        raise ValueError("not a signature line")
    return name, raw[:ID_BYTES], raw[ID_BYTES:]


def verify_checkpoint(checkpoint: Checkpoint, bundle: TrustBundle) -> tuple[str, ...]:
    """What of the bundle vouches for the checkpoint: its ledger key's signature and, if the note has it, a
    quote by one of its attestation keys. At least one does, and none that is there is wrong. A quote is over
    size and root: what else the note says needs the key.

    Raises:
        VerificationError: nobody known signed it, or somebody known signed something else.
    """
    keys = tuple(map(parse_key, bundle.ledger))
    vouching = [key.name for key in keys if _signed_by(checkpoint, key)]
    # A quote is over size and root: neither over whose ledger it is, nor over extension lines.
    known = not keys or checkpoint.origin in {key.name for key in keys}
    covered = known and not checkpoint.extensions
    for ak in bundle.aks if vouching or covered else ():
        wanted = key_id(checkpoint.origin, QUOTE, ak)
        for name, id_, signature in checkpoint.signatures:
            if (name, id_) == (checkpoint.origin, wanted):
                _verify_quote(checkpoint, signature, bundle)
                vouching.append("TPM quote")
    if not vouching:
        raise VerificationError(Step.KEY, "no key of the trust bundle signed the checkpoint")
    return tuple(vouching)


def _signed_by(checkpoint: Checkpoint, key: VerifierKey) -> bool:
    """Whether the key signed; a signature that names it and is wrong raises."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if checkpoint.origin != key.name:
        return False
    for name, id_, signature in checkpoint.signatures:
        if (name, id_) == (key.name, key.id):
            try:
                if len(signature) != _SIGNATURE_BYTES:
                    raise InvalidSignature
                Ed25519PublicKey.from_public_bytes(key.public).verify(signature, checkpoint.body)
            except (InvalidSignature, ValueError) as error:
                raise VerificationError(Step.SIGNATURE, f"not a signature of {key.name}") from error
            return True
    return False


def _verify_quote(checkpoint: Checkpoint, signature: bytes, bundle: TrustBundle) -> None:
    head = quoted_head(signature)
    if (head.size, head.root) != (checkpoint.size, checkpoint.root):
        raise VerificationError(Step.QUALIFYING, "the quote in the checkpoint is of another head")
    verify_head(head, bundle)


def quoted_head(signature: bytes) -> SignedHead:
    """The signed head in a signature of type `QUOTE`; not verified. Raises: MalformedError."""
    try:
        return head_of(json.loads(signature, object_pairs_hook=no_duplicates))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MalformedError(f"checkpoint: not a signed head: {error}") from error
