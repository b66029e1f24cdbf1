"""`hostd-guest`: hostd's operations from the command line of a guest, and the checking of evidence.

Data comes from a file or standard input (`-`) and goes to standard output as it is; with `--json`
the whole result is printed, bytes as base64. Whom to believe is read from the trust bundle (`--trust`):
there is no default that accepts anything. Exit codes say who is to blame: 2 the command line,
3 the request, 4 the host, 5 the connection, 6 something that does not verify.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from guestlib import errors, evidencecommands, filecommands, receiptcommands
from guestlib.attest.steps import Step
from guestlib.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Client
from guestlib.commandio import UsageError, parse_aad, read_bundle, read_bytes, show, to_json
from guestlib.trust import Trust
from guestlib.wire import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEFAULT_TRUST: Final = "/etc/hostd/trust.json"

_HINTS: Final[dict[type[errors.HostdError], str]] = {
    errors.MalformedError: "see docs/protocol.md for what the operation takes; larger data goes by"
    " `hostd-guest file encrypt`",
    errors.DeniedError: "the tenant's policy decides; the ledger entry says what was asked",
    errors.UnauthenticatedError: "this VM or user is not bound to a tenant; ask the host's operators",
    errors.NotFoundError: "`hostd-guest list-keys` shows the keys of this tenant",
    errors.ConflictError: "use another alias, or the same --token to repeat the same call",
    errors.WrongStateError: "`hostd-guest describe-key` shows the key's state and usage",
    errors.InvalidCiphertextError: "give the same --aad that it was encrypted with, and the whole ciphertext",
    errors.RefusedDriftError: "the host has drifted; its operators see where (give them the ledger entry)",
    errors.OverloadedError: "try again in a moment",
    errors.UnavailableError: "try again in a moment; `hostd-guest health` says more",
    errors.DeadlineError: "try again with a longer --timeout",
    errors.TransportError: "is hostd running on the host, and is --address right? (vsock:2:7700, unix:PATH)",
    errors.InvalidSignatureError: "message, signature and key must be the ones that belong together",
    errors.InvalidFileError: "use nothing of what came out; give the whole file, and the same --aad",
    errors.VerificationError: "do not use this host until you know why (the steps are in docs/protocol.md)",
}

_OF_THE_BUNDLE: Final = (Step.REFERENCE, Step.CHANNEL_CA)
"""Steps that fail when the host has changed since its bundle was made."""


def exit_code(error: errors.HostdError) -> int:
    if isinstance(error, errors.VerificationError):
        return 6
    if isinstance(error, errors.TransportError):
        return 5
    return 3 if isinstance(error, errors.CallerError) else 4


def fail(message: str, hint: str | None, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


# ── Input ─────────────────────────────────────────────────────────────────────────────────────────


def read_trust(options: argparse.Namespace) -> Trust:
    """From the bundle: attestation; with --channel-ca-only, its `channel_ca` alone."""
    bundle = read_bundle(options.trust)
    if not options.channel_ca_only:
        return Trust.attested(bundle)
    if not bundle.channel_cas:
        raise UsageError(f"{options.trust}: it pins no `channel_ca`")
    return Trust.channel_ca("".join(map(ssl.DER_cert_to_PEM_cert, bundle.channel_cas)))


def key_line(key: messages.KeyInfo) -> str:
    return f"{key.id}  {key.algorithm}  {key.state}  v{key.version}  {key.alias or '-'}"


# ── Commands ──────────────────────────────────────────────────────────────────────────────────────


def create_key(client: Client, o: argparse.Namespace) -> None:
    result = client.create_key(o.algorithm, o.alias, token=o.token)
    show(o, result, result.key.id)


def describe_key(client: Client, o: argparse.Namespace) -> None:
    result = client.describe_key(o.key)
    show(o, result, key_line(result.key))


def list_keys(client: Client, o: argparse.Namespace) -> None:
    keys = list(client.list_keys())
    if o.json or keys:
        show(o, keys, "\n".join(map(key_line, keys)))


def encrypt(client: Client, o: argparse.Namespace) -> None:
    result = client.encrypt(o.key, read_bytes(o.file), parse_aad(o.aad))
    show(o, result, result.ciphertext)


def decrypt(client: Client, o: argparse.Namespace) -> None:
    result = client.decrypt(read_bytes(o.file), parse_aad(o.aad), key=o.key)
    show(o, result, result.plaintext)


def data_key(client: Client, o: argparse.Namespace) -> None:
    if not o.json and not o.ciphertext:
        raise UsageError("data-key gives two values: use --json, or --ciphertext FILE for the encrypted one")
    result = client.generate_data_key(
        o.key, parse_aad(o.aad), length=o.length, plaintext=not o.without_plaintext
    )
    if o.ciphertext:
        try:
            Path(o.ciphertext).write_bytes(result.ciphertext)
        except OSError as error:
            raise UsageError(f"{o.ciphertext}: {error.strerror}") from error
    show(o, result, result.plaintext or b"")


def sign(client: Client, o: argparse.Namespace) -> None:
    result = client.sign(o.key, read_bytes(o.file), scheme=o.scheme)
    show(o, result, result.signature)


def verify(client: Client, o: argparse.Namespace) -> None:
    result = client.verify(
        o.key, read_bytes(o.file), read_bytes(o.signature), scheme=o.scheme, version=o.version
    )
    show(o, result, "valid")


def public_key(client: Client, o: argparse.Namespace) -> None:
    result = client.get_public_key(o.key, version=o.version)
    body = base64.encodebytes(result.public_key).decode()
    pem = f"-----BEGIN PUBLIC KEY-----\n{body}-----END PUBLIC KEY-----" if not o.der else ""
    show(o, result, result.public_key if o.der else pem)


def mac(client: Client, o: argparse.Namespace) -> None:
    result = client.mac(o.key, read_bytes(o.file))
    show(o, result, result.mac)


def verify_mac(client: Client, o: argparse.Namespace) -> None:
    result = client.verify_mac(o.key, read_bytes(o.file), read_bytes(o.mac), version=o.version)
    show(o, result, "valid")


def random(client: Client, o: argparse.Namespace) -> None:
    result = client.random(o.length)
    show(o, result, result.random)


def rotate(client: Client, o: argparse.Namespace) -> None:
    result = client.rotate(o.key, token=o.token)
    show(o, result, key_line(result.key))


def shred(client: Client, o: argparse.Namespace) -> None:
    if not o.yes:
        raise UsageError("shred cannot be undone, and what the key encrypted is lost: say --yes")
    result = client.shred(o.key, token=o.token)
    show(o, result, key_line(result.key))


def file_command(client: Client, o: argparse.Namespace) -> None:
    if o.receipt:
        raise UsageError("a file's receipt is that of its data key: `hostd-guest receipt list`, then `get`")
    result = filecommands.run(client, o, parse_aad(o.aad))
    if o.json and o.out != "-":
        print(json.dumps(to_json(result)))


def health(client: Client, o: argparse.Namespace) -> None:
    result = client.health()
    lines = [f"gate: {result.gate}" + (f" ({result.reason})" if result.reason else "")]
    lines += [f"{kind}: {status}" for kind, status in sorted(result.components.items())]
    show(o, result, "\n".join(lines))


# ── The command line ──────────────────────────────────────────────────────────────────────────────


class _Parser(argparse.ArgumentParser):
    """Takes a command's options before, between and after its arguments."""

    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._mixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(message, f"`{self.prog} --help` explains", 2))


def build_parser() -> argparse.ArgumentParser:
    codes = "Exit codes: 2 usage, 3 your request, 4 the host, 5 no connection, 6 it does not verify."
    text = "Keys of the host's hostd, from a guest."
    parser = _Parser(prog="hostd-guest", description=text, epilog=codes)
    parser.add_argument(
        "--address", default=DEFAULT_ADDRESS, help="vsock:CID:PORT (default the host) or unix:PATH"
    )
    parser.add_argument(
        "--trust", default=DEFAULT_TRUST, metavar="FILE", help=f"trust bundle ({DEFAULT_TRUST})"
    )
    parser.add_argument(
        "--channel-ca-only", action="store_true", help="believe the bundle's channel CA, without evidence"
    )
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="SECONDS")
    parser.add_argument("--json", action="store_true", help="print the whole result")
    parser.add_argument(
        "--receipt", metavar="FILE", help="save the receipt, and FILE.request and FILE.answer"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[..., None], *arguments: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, offline=False)
        for argument in arguments:
            _ARGUMENTS[argument](sub)
        return sub

    sub = command("create-key", create_key, "token", text="make a key and print its id")
    known = "AES-256-GCM (default), HMAC-SHA-256, ECDSA-P256, Ed25519, RSA-3072"
    sub.add_argument("--algorithm", default="AES-256-GCM", metavar="NAME", help=known)
    sub.add_argument("--alias", help="alias/NAME")
    command("list-keys", list_keys, text="the keys of this tenant")
    command("describe-key", describe_key, "key", text="what may be said of a key")
    command("encrypt", encrypt, "key", "file", "aad", text="encrypt a file (64 KiB at most)")
    sub = command("decrypt", decrypt, "file", "aad", text="decrypt a file")
    sub.add_argument("--key", help="accept only what this key encrypted")
    sub = command("data-key", data_key, "key", "aad", text="a fresh data key, and the same encrypted")
    sub.add_argument("--length", type=int, default=32)
    sub.add_argument("--without-plaintext", action="store_true")
    sub.add_argument("--ciphertext", metavar="FILE", help="where the encrypted data key goes")
    command("sign", sign, "key", "file", "scheme", text="sign a message")
    sub = command("verify", verify, "key", "file", "scheme", "version", text="verify a signature")
    sub.add_argument("--signature", required=True, metavar="FILE")
    sub = command("public-key", public_key, "key", "version", text="the public key, PEM")
    sub.add_argument("--der", action="store_true")
    command("mac", mac, "key", "file", text="authenticate a message")
    sub = command("verify-mac", verify_mac, "key", "file", "version", text="verify a message's MAC")
    sub.add_argument("--mac", required=True, metavar="FILE")
    command("random", random, text="random bytes").add_argument("length", type=int)
    command("rotate", rotate, "key", "token", text="add a version to a key")
    sub = command("shred", shred, "key", "token", text="destroy a key for ever")
    sub.add_argument("--yes", action="store_true")
    command("health", health, text="whether the host answers, and if not, why")

    data = commands.add_parser("file", help="encrypt and decrypt files of any size, and pipes")
    filecommands.add(
        data.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser), file_command
    )

    evidencecommands.add_commands(commands, _Parser)
    receiptcommands.add_commands(commands, _Parser)
    return parser


_ARGUMENTS: Final[dict[str, Callable[[argparse.ArgumentParser], object]]] = {
    "key": lambda sub: sub.add_argument("key", metavar="KEY", help="key id or alias/NAME"),
    "file": lambda sub: sub.add_argument(
        "file", nargs="?", default="-", metavar="FILE", help="default: standard input"
    ),
    "aad": lambda sub: sub.add_argument("--aad", action="append", default=[], metavar="NAME=VALUE"),
    "token": lambda sub: sub.add_argument("--token", help="idempotency token (default: a random one)"),
    "scheme": lambda sub: sub.add_argument("--scheme", help="of those that --json describe-key shows"),
    "version": lambda sub: sub.add_argument("--version", type=int),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        if options.offline:
            options.run(options)
            return 0
        wanted: messages.ReceiptWanted = "full" if options.receipt else "reference"
        trust, timeout_s = read_trust(options), options.timeout
        with Client(
            trust, options.address, timeout_s=timeout_s, name="hostd-guest", receipts=wanted
        ) as client:
            options.run(client, options)
    except (UsageError, ValueError) as error:
        return fail(str(error), None, 2)
    except errors.HostdError as error:
        hints = [*getattr(options, "hints", {}).items(), *_HINTS.items()]
        hint = next((text for cls, text in hints if isinstance(error, cls)), None)
        old = isinstance(error, errors.ChannelChangedError) and options.channel_ca_only
        if isinstance(error, errors.VerificationError) and (old or error.step in _OF_THE_BUNDLE):
            hint = (
                "a new manifest or a new channel CA needs a new trust bundle, from the host's operators; "
                f"else {hint}"
            )
        return fail(str(error), hint, exit_code(error))
    except BrokenPipeError:
        # Nothing more can be written: neither the rest, nor the flush at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
