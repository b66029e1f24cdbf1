"""`hostctl host`: a provider's certificate for this host's TPM, step by step or at once.

    host      request  →  provider  challenge  →  host  answer  →  provider  certify  →  host  install

Each step writes a file for the next machine. The provider's steps need no hostd there.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from guestlib.errors import MalformedError, NotFoundError
from hostd.admin.context import Context, made
from hostd.admin.render import safe
from hostd.core import enrolment as docs
from hostd.ipc import enrolling as enr
from hostd.ipc import operating as adm
from hostd.platform.durable import sync_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostd.admin.hostca import Ca

FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)
OUTPUT: Final = click.Path(path_type=Path, dir_okay=False)
TPM_S: Final = 60.0
DAYS: Final = 365
MAX_DAYS: Final = 3650
MAX_INPUT_BYTES: Final = 1 << 20

EK_ROOT: Final = click.option(
    "--ek-root", "ek_roots", type=FILE, multiple=True, required=True, help="Root of a TPM maker. Repeatable."
)
EK_BETWEEN: Final = click.option(
    "--ek-intermediate", "between", type=FILE, multiple=True, help="Of the maker's, to the root. Repeatable."
)
NAME: Final = click.option("--name", help="The host's in its certificate; default: as it calls itself.")
CA: Final = click.option("--ca", "ca_path", type=FILE, required=True, help="The provider's CA certificate.")
KEY: Final = click.option("-k", "--key", type=FILE, required=True, help="Its private key, PEM.")
VALID: Final = click.option(
    "--days", type=click.IntRange(1, MAX_DAYS), default=DAYS, show_default=True, help="Validity."
)


@click.group()
def host() -> None:
    """Enrolment: a provider certifies this host's TPM."""


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise MalformedError(f"{path}: over {MAX_INPUT_BYTES} bytes")
    return data


def _certificates(paths: Sequence[Path]) -> list[bytes]:
    from hostd.admin.hostca import certificates

    found: list[bytes] = []
    for path in paths:
        try:
            found += certificates(_read(path))
        except MalformedError as error:
            raise MalformedError(f"{path}: {error.message}") from error
    return found


def _ca(ca_path: Path, key: Path) -> Ca:
    from hostd.admin.hostca import is_encrypted, read_ca

    private = _read(key)
    passphrase = None
    if is_encrypted(private):
        passphrase = click.prompt(f"passphrase of {key}", hide_input=True, err=True).encode()
    return read_ca(_read(ca_path), private, passphrase)


def _pem(der: bytes) -> bytes:
    import ssl

    return ssl.DER_cert_to_PEM_cert(der).encode()


def _wrote(context: Context, output: Path, **more: Any) -> None:
    context.show(
        {"file": str(output), **more},
        lambda: click.echo("\n".join([f"wrote {output}", *(f"{k} {safe(v)}" for k, v in more.items())])),
    )


@host.command("request")
@click.option("-o", "--output", type=OUTPUT, required=True, help="For the provider.")
@click.pass_obj
def host_request(context: Context, output: Path) -> None:
    """On the host: ask for a certificate, with the TPM's keys and its maker's certificate."""
    found = context.ask(enr.RequestHost(), adm.Document, TPM_S)
    output.write_bytes(found.document)
    _wrote(context, output, digest=found.digest)


@host.command("challenge")
@click.argument("request", type=FILE)
@EK_ROOT
@EK_BETWEEN
@NAME
@click.option("-o", "--output", type=OUTPUT, required=True, help="For the host.")
@click.option("--state", type=OUTPUT, required=True, help="A new file, kept here until `certify`: a secret.")
@click.pass_obj
def host_challenge(
    context: Context,
    request: Path,
    ek_roots: tuple[Path, ...],
    between: tuple[Path, ...],
    name: str | None,
    output: Path,
    state: Path,
) -> None:
    """At the provider: check who asks, and challenge its TPM."""
    from hostd.admin import hostca

    challenge, pending = hostca.challenge(
        _read(request),
        name=name,
        ek_roots=_certificates(ek_roots),
        intermediates=_certificates(between),
        now=datetime.now(UTC),
    )
    _write_new(state, docs.encode(pending))
    output.write_bytes(docs.encode(challenge))
    _wrote(context, output, state=str(state), host=challenge.host, ak_name=challenge.ak_name.hex())


def _write_new(path: Path, data: bytes) -> None:
    """Raises: FileExistsError, a challenge that is still open is never written over."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


@host.command("answer")
@click.argument("challenge", type=FILE)
@click.option("-o", "--output", type=OUTPUT, required=True, help="For the provider.")
@click.pass_obj
def host_answer(context: Context, challenge: Path, output: Path) -> None:
    """On the host: have the TPM open a challenge. Goes into the ledger."""
    found = context.ask(made(enr.AnswerHost, challenge=_read(challenge)), adm.Document, TPM_S)
    output.write_bytes(found.document)
    _wrote(context, output, digest=found.digest)


@host.command("certify")
@click.argument("answer", type=FILE)
@click.option("--state", type=OUTPUT, required=True, help="Of `challenge`; it is gone afterwards.")
@CA
@KEY
@VALID
@click.option("-o", "--output", type=OUTPUT, required=True, help="The host certificate, PEM.")
@click.pass_obj
def host_certify(
    context: Context, answer: Path, state: Path, ca_path: Path, key: Path, days: int, output: Path
) -> None:
    """At the provider: check the answer and issue the certificate, once."""
    from hostd.admin import hostca

    used = NotFoundError(f"{state}: no challenge is open there: it was answered, or made elsewhere")
    try:
        pending = docs.parse(_read(state), docs.Pending)
    except FileNotFoundError:
        raise used from None
    der = hostca.certify(_read(answer), pending, _ca(ca_path, key), days=days, now=datetime.now(UTC))
    try:
        # Whoever removes it has the certificate; of two at the same time it is one.
        state.unlink()
    except FileNotFoundError:
        raise used from None
    sync_folder(state.parent)
    output.write_bytes(_pem(der))
    _wrote(context, output, host=pending.host)


@host.command("install")
@click.argument("certificate", type=FILE)
@click.pass_obj
def host_install(context: Context, certificate: Path) -> None:
    """On the host: put a host certificate into evidence. The vault checks that it is for this TPM."""
    found = _certificates([certificate])
    if len(found) != 1:
        raise MalformedError(f"{certificate}: not exactly one certificate")
    _report(context, context.ask(made(enr.InstallHost, certificate=found[0]), enr.HostReport))


@host.command("show")
@click.option("-o", "--output", type=OUTPUT, help="Write the host certificate, PEM.")
@click.pass_obj
def host_show(context: Context, output: Path | None) -> None:
    """This host's keys and its certificate."""
    found = context.ask(enr.ShowHost(), enr.HostReport)
    if output is not None:
        if not found.certificate:
            raise NotFoundError("no host certificate is installed")
        output.write_bytes(_pem(found.certificate))
    _report(context, found)


def _report(context: Context, found: enr.HostReport) -> None:
    def render() -> None:
        click.echo(f"host         {safe(found.host)}")
        click.echo(f"ak name      {found.ak_name}")
        click.echo(f"ek digest    {found.ek_digest}")
        click.echo(f"maker        {'certified the EK' if found.maker else 'did NOT certify the EK'}")
        if not found.certificate:
            click.echo("certificate  none")
            return
        click.echo(f"certificate  for {safe(found.certified)} by {safe(found.issuer)}")
        start, end = (datetime.fromtimestamp(t, UTC) for t in (found.not_before, found.not_after))
        over = "" if found.valid else "  NOT VALID NOW"
        click.echo(f"valid        {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC{over}")

    context.show(found, render)


def certified_bundle(document: bytes, roots: Sequence[Path], hosts: Sequence[str]) -> bytes:
    """A host's trust bundle with its own keys (AK, channel CA, ledger) replaced by CAs of host certificates.

    Raises:
        MalformedError: a file is not certificates of CAs, or a name is no host's.
    """
    from dataclasses import replace

    from guestlib.attest.bundle import encode_bundle, parse_bundle
    from guestlib.attest.hostcert import load_ca
    from guestlib.errors import VerificationError

    found = tuple(_certificates(roots))
    try:
        for der in found:
            load_ca(der)
        bundle = replace(
            parse_bundle(document),
            aks=(),
            channel_cas=(),
            ledger=(),
            host_roots=found,
            hosts=frozenset(hosts),
        )
    except (VerificationError, ValueError) as error:
        raise MalformedError(str(error)) from error
    return encode_bundle(bundle)


@host.command("enroll")
@EK_ROOT
@EK_BETWEEN
@NAME
@CA
@KEY
@VALID
@click.pass_obj
def host_enroll(
    context: Context,
    ek_roots: tuple[Path, ...],
    between: tuple[Path, ...],
    name: str | None,
    ca_path: Path,
    key: Path,
    days: int,
) -> None:
    """All steps on one machine that has the CA's key, for small set-ups."""
    from hostd.admin import hostca

    ca = _ca(ca_path, key)
    request = context.ask(enr.RequestHost(), adm.Document, TPM_S).document
    challenge, pending = hostca.challenge(
        request,
        name=name,
        ek_roots=_certificates(ek_roots),
        intermediates=_certificates(between),
        now=datetime.now(UTC),
    )
    asked = made(enr.AnswerHost, challenge=docs.encode(challenge))
    answer = context.ask(asked, adm.Document, TPM_S).document
    der = hostca.certify(answer, pending, ca, days=days, now=datetime.now(UTC))
    _report(context, context.ask(made(enr.InstallHost, certificate=der), enr.HostReport))
