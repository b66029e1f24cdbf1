"""`hostd ROLE`: starts one role, or `hostd run` all of them; `hostd setup` prepares a host.

A role imports only what it needs: the import of its module is here, inside its own branch, and a
test looks at what each role's process has really loaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hostd.config import DEFAULT_PATH, ConfigError, load_config

ROLES = ("vault", "measurer", "gateway", "metrics")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hostd", description="The key service's roles and its set-up.")
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, help="configuration file (default: %(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for role in ROLES:
        commands.add_parser(role, help=f"serve as the {role} (started by systemd or by `hostd run`)")
    commands.add_parser("run", help="all roles under one supervisor, with the embedded TPM if configured")
    setup = commands.add_parser("setup", help="make state directory, TPM objects, root key, store")
    setup.add_argument("--state-dir", help="with --write-config: where the state is kept")
    setup.add_argument("--run-dir", help="with --write-config: where the sockets are")
    setup.add_argument(
        "--write-config",
        action="store_true",
        help="write a development configuration (embedded TPM, QEMU processes found in /proc)",
    )
    setup.add_argument(
        "--officer",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.pub",
        help="SSH public key of an officer who signs manifests (for each one); needed once",
    )
    setup.add_argument("--quorum", type=int, default=1, metavar="K", help="how many officers must sign")
    commands.add_parser("mint")
    commands.add_parser("thaw", help="thaw what a measurer that was killed left frozen (started by systemd)")
    commands.add_parser("kernel-images").add_argument("names", nargs="+")
    return parser


def main() -> None:
    """Console entry."""
    arguments = _parser().parse_args()
    if arguments.command == "mint":
        from hostd.vault.mint import main as mint

        mint()
        return
    if arguments.command == "kernel-images":
        from hostd.measurer.kernel_builder import main as build

        build(arguments.names)
        return
    try:
        _run(arguments)
    except _expected_errors() as error:
        sys.exit(f"error: {error}")


def _expected_errors() -> tuple[type[Exception], ...]:
    """What a role says in one line instead of a traceback: the host is not as it needs to be."""
    from guestlib.errors import HostdError
    from hostd.platform.confine import ConfineError

    errors: list[type[Exception]] = [ConfigError, HostdError, ConfineError, OSError]
    if "hostd.platform.tpm_errors" in sys.modules:
        errors.append(sys.modules["hostd.platform.tpm_errors"].TpmError)
    if "hostd.admin.setup" in sys.modules:
        errors.append(sys.modules["hostd.admin.setup"].SetupError)
    return tuple(errors)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "setup":
        from hostd.admin import setup

        setup.run(
            arguments.config,
            write_config=arguments.write_config,
            state_dir=arguments.state_dir,
            run_dir=arguments.run_dir,
            officers=arguments.officer,
            quorum=arguments.quorum,
        )
        return
    config = load_config(arguments.config)
    if arguments.command in ("run", "vault"):
        config.require_officers()
    match arguments.command:
        case "vault":
            from hostd.vault.main import run
        case "measurer":
            from hostd.measurer.main import run
        case "thaw":
            from hostd.measurer.main import thaw as run
        case "gateway":
            from hostd.gateway.main import run
        case "metrics":
            from hostd.metrics import run
        case "run":
            from hostd.supervisor import supervise

            supervise(arguments.config, config)
            return
        case other:
            raise AssertionError(other)
    run(config)


if __name__ == "__main__":
    main()
