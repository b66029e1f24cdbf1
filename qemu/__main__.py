"""``python3 -m qemu``: build the lab, work in it, run something in it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from qemu.errors import LabError
from qemu.guest import Guest
from qemu.host import LabHost
from qemu.installed import ensure_installed
from qemu.machine import Settings
from qemu.service import Service
from qemu.shell import INSTALLED, interact, require_terminal


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        arguments = _parser().parse_args(words)
        status: int = arguments.act(arguments)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m qemu", description=__doc__)
    parser.add_argument(
        "--accel",
        choices=("tcg", "kvm"),
        default=Settings().accel,
        help="emulation, or the machine's own (nested) KVM; default: $HOSTD_LAB_ACCEL or tcg",
    )
    verbs = parser.add_subparsers(required=True, metavar="build | shell | run")
    build = verbs.add_parser(
        "build", help="build the image and a disk with hostd, so that later starts are quick"
    )
    build.set_defaults(act=_build)
    shell = verbs.add_parser("shell", help="a root shell in the host, with hostd and a guest running")
    shell.add_argument("--bare", action="store_true", help="the host alone: no hostd, no guest")
    shell.set_defaults(act=_shell)
    run = verbs.add_parser("run", help="run a command in the host, print what it says, power off")
    run.add_argument("--hostd", action="store_true", help="on a host with hostd installed (not set up)")
    run.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    run.add_argument("command", nargs="+", metavar="-- COMMAND", help="the command and its arguments")
    run.set_defaults(act=_run)
    return parser


def _build(arguments: argparse.Namespace) -> int:
    print(ensure_installed(settings=Settings(accel=arguments.accel)).parent)
    return 0


def _shell(arguments: argparse.Namespace) -> int:
    require_terminal()
    settings = Settings(accel=arguments.accel)
    if arguments.bare:
        with LabHost(settings) as host:
            host.boot()
            interact(host)
        return 0
    with LabHost(settings, disk=ensure_installed(settings=settings)) as host:
        host.boot()
        service = Service(host)
        service.set_up()
        service.start()
        with Guest(host, "alice", 7) as guest:
            guest.start()
            service.baseline()
            service.adopt(guest, "acme")
            interact(host, installed=INSTALLED, guests="; alice (tenant acme, CID 7) is running")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    settings = Settings(accel=arguments.accel)
    disk = ensure_installed(settings=settings) if arguments.hostd else None
    with LabHost(settings, disk=disk) as host:
        host.boot()
        result = host.run(arguments.command, arguments.timeout, check=False)
        host.shutdown()
    sys.stdout.buffer.write(result.stdout)
    sys.stderr.buffer.write(result.stderr)
    return result.rc if result.rc >= 0 else 128 - result.rc


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave by the ordinary way out, so that machines are switched off and folders removed."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
