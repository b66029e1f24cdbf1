"""`hostctl manifest`: reference values, from their making to their being in force.

Documents are made and changed here, on the officers' side; officers sign them; the vault verifies the
signatures and takes them or not.
"""

from __future__ import annotations

from pathlib import Path

import click

from hostd.admin import manifest_change, manifest_make
from hostd.admin.context import Context, made
from hostd.admin.manifest_files import load, read, sign, signatures, signatures_of
from hostd.admin.manifest_show import document_lines, host_text
from hostd.admin.render import safe
from hostd.core.manifest import Counts
from hostd.core.reference import NAMESPACE, date_of, parse_reference, reference_digest
from hostd.ipc import operating as adm
from hostd.ipc.manifest_status import ManifestReport, ManifestStatus

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
NEAR_DAYS = 7
"""Retirements that `status` names one by one are those within so many days."""


@click.group()
def manifest() -> None:
    """Reference values: what good looks like, signed by officers."""


for _command in (
    manifest_make.create,
    manifest_make.from_packages,
    manifest_make.from_host,
    manifest_make.import_keylime,
    manifest_change.approve,
    manifest_change.retire,
    manifest_change.propose,
    manifest_make.compare,
):
    manifest.add_command(_command)


@manifest.command("sign")
@click.argument("file", type=FILE)
@click.option("-k", "--key", type=FILE, required=True, help="SSH private key, or .pub of one in an agent.")
@click.pass_obj
def manifest_sign(context: Context, file: Path, key: Path) -> None:
    """Sign a manifest as an officer; the signature is added to FILE.sig."""
    reference = load(context, str(file))
    digest = reference_digest(reference).hex()
    click.echo(f"signing version {reference.version}, digest {digest}", err=True)
    sign(file, key)
    context.show(
        {"file": str(file), "signatures": str(signatures_of(file)), "digest": digest},
        lambda: click.echo(f"signed: {signatures_of(file)}"),
    )


@manifest.command("verify")
@click.argument("file", type=FILE)
@click.pass_obj
def manifest_verify(context: Context, file: Path) -> None:
    """Verify a manifest's signatures against the officers of this configuration, as the vault will."""
    from guestlib.attest.sshsig import verify_quorum

    reference = load(context, str(file))
    officers = context.config.officers
    names = verify_quorum(
        signatures(file),
        read(file),
        namespace=NAMESPACE,
        officers=officers.public_keys,
        quorum=officers.quorum,
    )
    value = {
        "version": reference.version,
        "host": reference.host,
        "digest": reference_digest(reference).hex(),
        "signed_by": list(names),
        "quorum": officers.quorum,
    }
    context.show(
        value,
        lambda: click.echo(
            f"version {reference.version} for {host_text(reference)}, signed by {', '.join(names)}"
        ),
    )


@manifest.command("install")
@click.argument("file", type=FILE)
@click.pass_obj
def manifest_install(context: Context, file: Path) -> None:
    """Put a signed manifest into force. The vault verifies it; the ledger says who signed."""
    command = made(adm.InstallManifest, document=read(file), signatures=signatures(file))
    found = context.ask(command, adm.Installed, 120.0)
    context.show(
        found,
        lambda: click.echo(
            f"in force: version {found.version}, signed by {', '.join(map(safe, found.signed_by))}\n"
            f"digest {found.digest}"
        ),
    )


@manifest.command("show")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="With its signatures in FILE.sig.")
@click.pass_obj
def manifest_show(context: Context, output: Path | None) -> None:
    """The manifest in force. `--json`: its very bytes, as they were signed."""
    found = context.ask(adm.ShowManifest(), adm.Document)
    if output is None:
        if context.as_json:
            click.echo(found.document, nl=False)
        else:
            reference = parse_reference(found.document)
            click.echo("\n".join(document_lines(reference, found.digest, manifest_make.now())))
        return
    output.write_bytes(found.document)
    signatures_of(output).write_bytes(found.signatures)
    click.echo(f"wrote {output} and {signatures_of(output)}, digest {found.digest}")


@manifest.command("status")
@click.pass_obj
def manifest_status(context: Context) -> None:
    """What is coming and going: which approved builds were seen, and which old ones end soon."""
    found = context.ask(ManifestStatus(), ManifestReport)

    def render() -> None:
        signed = ", ".join(map(safe, found.signed_by))
        counted = Counts(found.files, len(found.next), len(found.retire), len(found.remove))
        click.echo(
            f"version {found.version} of {date_of(found.created)}, signed by {signed}\n"
            f"digest {found.digest}\n{counted}\n{found.unseen} digests of files were not seen in use here\n"
        )
        seen = sum(line.seen for line in found.next)
        click.echo(f"next: {len(found.next)} digests, {seen} of them seen")
        for line in found.next:
            click.echo(f"  {'seen  ' if line.seen else 'unseen'}  {safe(line.path)}  {line.digest[:16]}")
        click.echo(f"retire: {len(found.retire)} digests")
        for item in sorted(found.retire, key=lambda r: (r.retires, r.path)):
            use = "in use" if item.seen else "unused"
            near = "  SOON" if item.retires - manifest_make.now() < NEAR_DAYS * 86_400 else ""
            click.echo(f"  {date_of(item.retires)}  {use}  {safe(item.path)}  {item.digest[:16]}{near}")

        click.echo(f"remove: {len(found.remove)} files")
        for path in found.remove:
            click.echo(f"  {safe(path)}")

    context.show(found, render)
