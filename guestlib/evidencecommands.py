"""`hostd-guest evidence get | verify`: what the host's TPM says of the host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from guestlib.commandio import UsageError, read_bundle, read_bytes, show

if TYPE_CHECKING:
    import argparse

    from guestlib.client import Client

MAX_LOG_BYTES: Final = 256 << 20


def add_commands(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Adds `evidence` and its parts."""
    evidence = commands.add_parser("evidence", help="what the host's TPM says of the host")
    parts = evidence.add_subparsers(required=True, metavar="COMMAND", parser_class=parser_class)
    get = parts.add_parser("get", help="fetch evidence; prints the nonce")
    get.set_defaults(run=get_evidence, offline=False)
    verifier = parts.add_parser("verify", help="verify evidence, without a connection")
    verifier.set_defaults(run=verify_evidence_file, offline=True)
    get.add_argument("--nonce", metavar="HEX", help="16 to 64 bytes (default: 32 random ones)")
    get.add_argument("--out", default="evidence.json", metavar="FILE")
    get.add_argument("--log", default="ima.log", metavar="FILE")
    verifier.add_argument("evidence", metavar="EVIDENCE")
    verifier.add_argument("--log", required=True, metavar="FILE")
    verifier.add_argument("--nonce", required=True, metavar="HEX")


def get_evidence(client: Client, o: argparse.Namespace) -> None:
    nonce = _nonce(o.nonce) if o.nonce else os.urandom(32)
    document, log = client.evidence(nonce)
    try:
        Path(o.out).write_bytes(document)
        Path(o.log).write_bytes(log)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
    show(o, {"nonce": nonce.hex(), "evidence": o.out, "log": o.log}, nonce.hex())


def verify_evidence_file(o: argparse.Namespace) -> None:
    import datetime

    from guestlib.attest.verifier import verify_evidence

    document, log = read_bytes(o.evidence, MAX_LOG_BYTES), read_bytes(o.log, MAX_LOG_BYTES)
    now = datetime.datetime.now(datetime.UTC)
    bundle = read_bundle(o.trust)
    verified = verify_evidence(document, log, bundle=bundle, nonce=_nonce(o.nonce), now=now)
    key = verified.key_trust
    show(o, {"verified": True, "attestation_key": key}, f"verified; attestation key {key}")


def _nonce(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise UsageError("--nonce is hexadecimal") from None
