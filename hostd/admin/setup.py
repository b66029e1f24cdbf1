"""`hostd setup`: makes what a host needs once, and nothing twice.

State directory, embedded TPM (if configured), TPM objects, the root key sealed to the PCRs as they are
now, the store. Each step says what it did; running it again changes nothing. A half-made state that
would lose keys (a store without its sealed root key) is refused, never repaired by making new.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from guestlib.attest.imalog import PCR as IMA_PCR
from hostd.admin.officers import make_key, name_officers
from hostd.config import Config, load_config
from hostd.core.reacting import RuleError, check_poison_pcr
from hostd.platform import swtpm
from hostd.platform.secretmem import SecretBuffer
from hostd.platform.tpm import open_tpm
from hostd.platform.tpm_files import (
    encode_blob,
    encode_record,
    parse_blob,
    parse_record,
    read_file,
    write_file,
)
from hostd.platform.tpm_provision import provision
from hostd.platform.tpm_tcti import Link, open_link
from hostd.vault.heads import first_head
from hostd.vault.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ROOT_BYTES: Final = 32

_DEVELOPMENT: Final = """\
# hostd on one machine for development: embedded TPM, QEMU processes found in /proc.
# What such a machine lacks (IMA, a hardware TPM) is left out of `measure.require` in writing, and
# evidence says `absent`.

[host]
state_dir = "{state_dir}"
run_dir = "{run_dir}"

[tpm]
device = "swtpm"

[hypervisor]
provider = "proc"
allow_jit = true

[measure]
require = ["posture", "files"]
# Files that a VM has mapped are in a manifest anyway; this is what it may load later.
survey = ["/usr/bin/qemu-system-x86_64", "/usr/lib/x86_64-linux-gnu/qemu/"]

[gateway]
vsock_port = 0

[metrics]
port = 0
"""


class SetupError(Exception):
    """The host cannot be set up as it is; the text says what stands in the way."""


def run(
    config_path: Path,
    *,
    write_config: bool,
    state_dir: str | None,
    run_dir: str | None,
    officers: Sequence[Path] = (),
    quorum: int = 1,
) -> None:
    """Sets the host up. `officers` are `.pub` files, for a configuration that names nobody yet.

    Raises:
        SetupError, ConfigError, TpmError, StoreError, OSError.
    """
    if write_config:
        _write_config(config_path, state_dir, run_dir)
    _name_officers(config_path, officers, quorum, make=write_config)
    config = load_config(config_path)
    uid = config.uid_of("vault")
    _make_folder(config.state, 0o700, uid)
    _make_folder(config.run, 0o755, None)
    store = config.state / "store.sqlite"
    root = config.state / "root.json"
    if store.exists() and not root.exists():
        raise SetupError(
            f"{root} is missing while {store} exists: a new root key would leave every stored key "
            "unreadable; bring the file back"
        )
    with _tpm_link(config) as connect:
        _provision(config, connect)
        _check_poison(config, connect)
        _seal_root(config, connect)
    if store.exists():
        _say("store", f"{store} is there")
    else:
        Store(store, create=True).close()
        _say("store", f"made {store}")
    for path in sorted(config.state.rglob("*")):
        os.chown(path, uid, -1)
    _say("done", f"start the roles with `hostd --config {config_path} run`, or the systemd units")


def _say(step: str, text: str) -> None:
    print(f"{step:>10}  {text}")


def _write_config(path: Path, state_dir: str | None, run_dir: str | None) -> None:
    if path.exists():
        _say("config", f"{path} is there")
        return
    if state_dir is None or run_dir is None:
        raise SetupError("--write-config needs --state-dir and --run-dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_DEVELOPMENT.format(state_dir=state_dir, run_dir=run_dir))
    _say("config", f"wrote {path}")


def _name_officers(config_path: Path, officers: Sequence[Path], quorum: int, *, make: bool) -> None:
    config = load_config(config_path)
    if make and not officers and not config.officers.keys:
        config.state.parent.mkdir(parents=True, exist_ok=True)
        key = config.state.with_name("officer")
        officers = [make_key(key)]
        _say("officer", f"made a key for development, without a passphrase: {key}")
    if officers:
        done = name_officers(config_path, officers, quorum)
        _say("officers", done or f"{config_path} names them")
    config = load_config(config_path)
    config.require_officers()


def _make_folder(path: Path, mode: int, uid: int | None) -> None:
    """Makes a folder that is not there; one that is keeps the mode it was given."""
    if path.is_dir():
        return
    path.mkdir(parents=True)
    path.chmod(mode)
    if uid is not None:
        os.chown(path, uid, -1)
    _say("folder", f"made {path}")


@contextmanager
def _tpm_link(config: Config) -> Iterator[Callable[[], Link]]:
    if config.tpm.device != "swtpm":
        device = config.tpm.device
        yield lambda: open_link(device)
        return
    state, socket = config.state / "swtpm", config.run / "setup-swtpm.sock"
    if swtpm.is_manufactured(state):
        _say("tpm", f"embedded TPM in {state} is there")
    else:
        swtpm.manufacture(state, now=datetime.now(UTC))
        _say("tpm", f"made an embedded TPM in {state}")
    running = swtpm.start(state, socket)
    try:
        yield lambda: open_link("swtpm", socket)
    finally:
        running.stop()


def _provision(config: Config, connect: Callable[[], Link]) -> None:
    path = config.state / "tpm.json"
    if path.exists():
        open_tpm(connect, parse_record(read_file(path)), command_s=config.tpm.deadline_s).close()
        _say("tpm", f"{path} names this TPM")
        return
    record = provision(connect, command_s=config.tpm.deadline_s)
    write_file(path, encode_record(record))
    certificate = "with" if record.ek_certificate else "WITHOUT"
    _say("tpm", f"made attestation and storage keys, {certificate} an EK certificate: {path}")


def _check_poison(config: Config, connect: Callable[[], Link]) -> None:
    pcr, root = config.drift.poison_pcr, config.state / "root.json"
    if pcr is None:
        return
    tpm = open_tpm(
        connect, parse_record(read_file(config.state / "tpm.json")), command_s=config.tpm.deadline_s
    )
    try:
        tpm.check_poison(pcr)
        if root.exists():
            check_poison_pcr(pcr, parse_blob(read_file(root)).values())
    except RuleError as error:
        raise SetupError(f"{error} ({root})") from error
    finally:
        tpm.close()
    _say("poison", f"PCR {pcr} can be extended and not reset")


def _seal_root(config: Config, connect: Callable[[], Link]) -> None:
    path = config.state / "root.json"
    if path.exists():
        _say("root key", f"{path} is there")
        return
    record = parse_record(read_file(config.state / "tpm.json"))
    tpm = open_tpm(connect, record, command_s=config.tpm.deadline_s)
    try:
        values = tpm.read_pcrs(config.tpm.pcrs)
        # Neither source alone decides the key.
        mixed = bytearray(a ^ b for a, b in zip(tpm.random(ROOT_BYTES), os.urandom(ROOT_BYTES), strict=True))
        root = SecretBuffer.taking(mixed)
        try:
            with root.view() as view:
                blob = tpm.seal(bytearray(view), values)
        finally:
            root.wipe()
        first_head(tpm, config.state / "head.json", tuple(sorted({*values, IMA_PCR})))
    finally:
        tpm.close()
    write_file(path, encode_blob(blob))
    _say("root key", f"made and sealed to PCRs {', '.join(map(str, sorted(values)))}: {path}")
