"""hostctl: the officers' command line.

Every command is one request on the operators' socket; the vault decides. `--json` prints the answer
as it came. Exit codes by blame, as guestlib's: 2 usage, 3 the caller, 4 the host, 5 the connection.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from guestlib.errors import CallerError, HostdError, RefusedDriftError, TransportError, UnavailableError
from hostd.admin.channel import channel
from hostd.admin.context import LONG_S, Context, made, uuid
from hostd.admin.host import FILE, certified_bundle, host
from hostd.admin.ledger import ledger
from hostd.admin.manifest import manifest
from hostd.admin.measure import COLUMNS, explanation, rows
from hostd.admin.render import drift_lines, safe
from hostd.config import DEFAULT_PATH, ConfigError
from hostd.ipc import operating as adm

_HINTS: tuple[tuple[type[HostdError], str], ...] = (
    (RefusedDriftError, "`hostctl drift list` names what drifted"),
    (UnavailableError, "`hostctl status` says why the gate is closed"),
    (TransportError, "check `systemctl status hostd-vault`, or that `hostd run` is up"),
)


def _plain(text: str) -> str:
    """Text inside a line with colours: no control characters, and its brackets are brackets."""
    return safe(text).replace("[", "\\[")


def _status(line: adm.ComponentLine | adm.VmInfo) -> str:
    return f"DRIFTED ({line.status})" if line.drifted else line.status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), default=DEFAULT_PATH, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@click.pass_context
def cli(context: click.Context, config: Path, as_json: bool) -> None:
    """Operate hostd on this host."""
    context.obj = Context(config, as_json)


@cli.command()
@click.pass_obj
def status(context: Context) -> None:
    """The gate, the measurements, keys and ledger on one screen."""
    report = context.ask(adm.Status(), adm.StatusReport)

    def render() -> None:
        out = context.out
        colour = "green" if report.gate == "open" else "red"
        reason = f"  {_plain(report.reason)}" if report.reason else ""
        out.print(f"gate       [{colour}]{report.gate}[/]{reason}", highlight=False)
        for component in report.drifted:
            out.print(f"drift      [red]{_plain(component)}[/]", highlight=False)
        locked = "unlocked" if report.keys_unlocked else "locked"
        states = ", ".join(f"{count} {_plain(state)}" for state, count in sorted(report.keys.items()))
        out.print(f"keys       {locked}; by state: {states or 'none'}")
        out.print(f"reference  {report.reference[:16] or 'none in force'}")
        out.print(f"tpm        {report.tpm}")
        out.print(f"ledger     {report.ledger_size} entries, root {report.ledger_root[:16]}")
        out.print(f"passes     {report.passes}; waiting {report.waiting}; callers {report.channels}\n")
        context.table(
            "",
            ("COMPONENT", "STATUS", "AGE ms", "TOOK ms"),
            (
                (
                    c.component,
                    f"{c.status}{' (latched)' if c.drifted else ''}",
                    f"{c.age_ms:.0f}",
                    f"{c.cost_ms:.1f}",
                )
                for c in report.components
            ),
        )

    context.show(report, render)


@cli.command()
@click.option("--vm", type=uuid, default=None, metavar="UUID", help="Only what this VM's requests rest on.")
@click.option("--explain", is_flag=True, help="With every claim and finding.")
@click.pass_obj
def measure(context: Context, vm: str | None, explain: bool) -> None:
    """Read everything anew and tell how each component was judged. Exit code 4 if something drifted."""
    found = context.ask(made(adm.Measure, vm=vm or ""), adm.Measured, LONG_S)

    def render() -> None:
        context.table("", COLUMNS, rows(found))
        if explain:
            click.echo("\n" + "\n".join(explanation(found)))

    context.show(found, render)
    if any(line.latched or line.status == "drifted" for line in found.components):
        sys.exit(4)


@cli.group()
def tenant() -> None:
    """Owners of keys."""


@tenant.command("create")
@click.argument("name")
@click.pass_obj
def tenant_create(context: Context, name: str) -> None:
    """Make a tenant."""
    context.ask(made(adm.CreateTenant, name=name), adm.Nothing)
    click.echo(f"tenant {name} created")


@tenant.command("on-drift")
@click.argument("name")
@click.argument("what", type=click.Choice(["keep", "shred"]))
@click.pass_obj
def tenant_on_drift(context: Context, name: str, what: str) -> None:
    """Choose what becomes of a tenant's keys when its own VM, or the host, drifts.

    Keys that were shredded do not come back.
    """
    context.ask(made(adm.SetOnDrift, tenant=name, what=what), adm.Nothing)
    click.echo(f"tenant {name}: {what} on drift")


@tenant.command("list")
@click.pass_obj
def tenant_list(context: Context) -> None:
    """Tenants, how many keys they have, and who belongs to them."""
    found = context.ask(adm.ListTenants(), adm.Tenants)

    def render() -> None:
        members: dict[str, list[str]] = {}
        for principal, name in found.bindings:
            members.setdefault(name, []).append(principal)
        context.table(
            "",
            ("TENANT", "KEYS", "ON DRIFT", "MEMBERS"),
            (
                (
                    name,
                    count,
                    "shred" if name in found.shred_on_drift else "keep",
                    ", ".join(members.get(name, [])),
                )
                for name, count in found.tenants
            ),
        )

    context.show(found, render)


@tenant.command("add-user")
@click.argument("name")
@click.argument("uid", type=int)
@click.pass_obj
def tenant_add_user(context: Context, name: str, uid: int) -> None:
    """Let a host-local user (by uid, over the unix socket) act for a tenant."""
    context.ask(made(adm.BindUser, uid=uid, tenant=name), adm.Nothing)
    click.echo(f"uid {uid} acts for tenant {name}")


@tenant.command("remove-user")
@click.argument("uid", type=int)
@click.pass_obj
def tenant_remove_user(context: Context, uid: int) -> None:
    """Take a host-local user's tenant away."""
    context.ask(made(adm.UnbindUser, uid=uid), adm.Nothing)
    click.echo(f"uid {uid} acts for no tenant")


@cli.group()
def vm() -> None:
    """Virtual machines."""


@vm.command("list")
@click.pass_obj
def vm_list(context: Context) -> None:
    """Hypervisor processes that are measured, and whose they are."""
    found = context.ask(adm.ListVms(), adm.Vms)
    context.show(
        found,
        lambda: context.table(
            "",
            ("NAME", "UUID", "PID", "CID", "ACCEL", "TENANT", "STATUS"),
            (
                (
                    v.name,
                    v.vm,
                    v.pid,
                    v.cid or "-",
                    v.accel,
                    v.tenant or "-",
                    "DRIFTED" if v.drifted else v.status,
                )
                for v in found.vms
            ),
        ),
    )


@vm.command("bind")
@click.argument("vm_uuid", metavar="UUID", type=uuid)
@click.argument("tenant_name", metavar="TENANT")
@click.pass_obj
def vm_bind(context: Context, vm_uuid: str, tenant_name: str) -> None:
    """Let a VM act for a tenant."""
    context.ask(made(adm.BindVm, vm=vm_uuid, tenant=tenant_name), adm.Nothing)
    click.echo(f"VM {vm_uuid} acts for tenant {tenant_name}")


@vm.command("unbind")
@click.argument("vm_uuid", metavar="UUID", type=uuid)
@click.pass_obj
def vm_unbind(context: Context, vm_uuid: str) -> None:
    """Take a VM's tenant away."""
    context.ask(made(adm.UnbindVm, vm=vm_uuid), adm.Nothing)
    click.echo(f"VM {vm_uuid} acts for no tenant")


@cli.group()
def key() -> None:
    """Keys (what they are, never what they hold)."""


@key.command("list")
@click.argument("tenant_name", metavar="TENANT")
@click.pass_obj
def key_list(context: Context, tenant_name: str) -> None:
    """Keys of a tenant."""
    found = context.ask(made(adm.ListKeys, tenant=tenant_name), adm.Keys)
    context.show(
        found,
        lambda: context.table(
            "",
            ("KEY", "ALIAS", "ALGORITHM", "STATE", "VERSIONS"),
            ((k.id, k.alias or "-", k.algorithm, k.state, k.versions) for k in found.keys),
        ),
    )


cli.add_command(channel)
cli.add_command(manifest)
cli.add_command(host)


@cli.group(invoke_without_command=True)
@click.pass_context
def drift(context: click.Context) -> None:
    """What is not as it should be (alone: `drift list`)."""
    if context.invoked_subcommand is None:
        context.invoke(drift_list)


@drift.command("list")
@click.pass_obj
def drift_list(context: Context) -> None:
    """Every finding that no officer has cleared: what, where, expected, seen."""
    found = context.ask(adm.ListDrift(), adm.Drift)

    context.show(found, lambda: click.echo("\n".join(drift_lines(found))))


@drift.command("clear")
@click.argument("component")
@click.option("--reason", required=True, help="Goes into the ledger.")
@click.pass_obj
def drift_clear(context: Context, component: str, reason: str) -> None:
    """Vouch for a component again; fresh good readings are still needed before anything is answered."""
    if not reason.strip():
        raise click.BadParameter("say why it may go on", param_hint="'--reason'")
    context.ask(made(adm.ClearDrift, component=component, reason=reason), adm.Nothing)
    click.echo(f"{component} cleared")


cli.add_command(ledger)


@cli.group()
def trust() -> None:
    """What guests need to trust this host."""


@trust.command("bundle")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: standard output.")
@click.option(
    "--host-root",
    "host_roots",
    type=FILE,
    multiple=True,
    help="CA of host certificates, in place of all that is this host's alone. Repeatable.",
)
@click.option("--host", "hosts", multiple=True, help="With --host-root: accept this host only. Repeatable.")
@click.pass_obj
def trust_bundle(
    context: Context, output: Path | None, host_roots: tuple[Path, ...], hosts: tuple[str, ...]
) -> None:
    """A trust bundle that pins this host's TPM, PCRs, channel CA and reference values.

    With --host-root: one for every host that this CA certifies, with this host's PCRs and reference values.
    """
    if hosts and not host_roots:
        raise click.UsageError("--host needs --host-root: nobody else certifies names")
    document = context.ask(adm.TrustBundle(), adm.Document).document
    if host_roots:
        document = certified_bundle(document, host_roots, hosts)
    if output is None:
        click.echo(document)
    else:
        output.write_bytes(document)
        click.echo(f"wrote {output}")


def main() -> None:
    """Console entry."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except (HostdError, ConfigError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        # It may quote a document that somebody sent.
        click.echo("\n".join(safe(line) for line in f"error: {text}".split("\n")), err=True)
        hint = next((text for cls, text in _HINTS if isinstance(error, cls)), None)
        if hint:
            click.echo(f"hint: {hint}", err=True)
        sys.exit(3 if isinstance(error, CallerError) else 5 if isinstance(error, TransportError) else 4)


if __name__ == "__main__":
    main()
