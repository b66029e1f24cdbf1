"""Configuration: strict TOML into one frozen section per concern.

An unknown key, a wrong type or a value out of bounds is a `ConfigError` that names it. No
environment variable and no setting here switches a check off; what the host cannot provide is left
out of `measure.require` in writing, and evidence then says `absent`.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from guestlib.errors import MalformedError
from guestlib.sshkeys import PublicKey, parse_public_key
from hostd.core.findings import VM_KINDS, Kind, Severity
from hostd.core.reacting import MANUAL, RuleError, Step, check_poison_pcr, check_rule

DEFAULT_PATH = Path("/etc/hostd/hostd.toml")

Positive = Annotated[float, msgspec.Meta(gt=0, le=86400)]
"""Seconds; a day at most, so that every deadline is finite."""
Small = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Port = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Pcr = Annotated[int, msgspec.Meta(ge=0, le=23)]
User = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 2)] | str


class ConfigError(Exception):
    """The configuration cannot be used; the text names the file, the key and the reason."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections."""


class Host(Section, frozen=True):
    state_dir: str = "/var/lib/hostd"
    """Store, ledger, sealed root; only the vault writes here."""
    run_dir: str = "/run/hostd"
    """Sockets of the roles."""


class Users(Section, frozen=True):
    """Who each role runs as and is accepted as (name or uid): all four, or none and all are the user who
    runs `hostd run`. (An empty name is each process's own uid, which holds only if they are the same.)"""

    vault: User = ""
    gateway: User = ""
    metrics: User = ""
    measurer: User = ""
    admin: tuple[User, ...] = ("root",)
    """Who may speak on the operators' socket."""


class Tpm(Section, frozen=True):
    device: str = "swtpm"
    """`swtpm`: the embedded one that `hostd setup` makes under the state directory; else a device
    path such as `/dev/tpmrm0`, or `unix:PATH` of a swtpm's command socket."""
    pcrs: tuple[Pcr, ...] = (0, 1, 2, 3, 4, 5, 7, 8, 9, 14)
    """SHA-256 bank PCRs that the root key is sealed to. Never 10 (IMA moves it all the time)."""
    deadline_s: Positive = 10.0
    """For one TPM command; over it the TPM counts as lost and the gate closes."""


class Hypervisor(Section, frozen=True):
    binaries: tuple[str, ...] = ("/usr/bin/qemu-system-x86_64",)
    """A process running one of these is a hypervisor process and is measured."""
    provider: Literal["libvirt", "proc"] = "libvirt"
    """Who vouches for which VM a process is: libvirt, or (development) its own command line."""
    libvirt_uri: str = "qemu:///system"
    allow_jit: bool = False
    """Accept the anonymous executable region of QEMU's TCG; under KVM there is none."""


class Measure(Section, frozen=True):
    require: tuple[Literal["boot", "posture", "ima", "kernel", "files", "relro", "domain", "self"], ...] = (
        "boot",
        "posture",
        "ima",
        "kernel",
        "files",
        "relro",
        "domain",
        "self",
    )
    """Components that must be verified, not merely absent. `guests` and a VM's own `process` always are."""
    deadline_s: Positive = 2.0
    """For one reading; over it its component is not good."""
    sweep_s: Positive = 5.0
    """Every component and every VM is read at least this often, busy or idle."""
    random_s: Positive = 1.0
    """Mean time between readings at random moments, of a component chosen at random, that nobody waits for. A
    reading takes some 2 ms on average: 0.2 % of one core."""
    protected: tuple[str, ...] = ("/usr/", "/opt/hostd/")
    """Path prefixes whose IMA entries must have a digest of the manifest."""
    survey: tuple[str, ...] = (
        *("/usr/bin/", "/usr/sbin/", "/usr/lib/", "/usr/libexec/", "/opt/hostd/"),
        *("/usr/share/qemu/", "/usr/share/seabios/", "/usr/share/OVMF/", "/usr/share/zoneinfo/"),
    )
    """What `hostctl manifest from-host` hashes besides the files that hypervisors have mapped: of folders
    below `/usr/share/` every file (QEMU reads firmware and keymaps there), of others what holds code."""


class Gate(Section, frozen=True):
    deadline_s: Positive = 10.0
    """A request that is not released by then is answered `deadline`."""
    waiting_per_caller: Small = 1024
    """Requests of one caller that may wait; over it: `overloaded`, at once."""
    batch: Small = 1024
    """Most work under one pass and one quote, in plain requests (some 16 µs each, `hostd/vault/cost.py`): a
    signature of RSA-3072 counts as 38, a batch operation by its items."""
    tpm: Literal["quote", "read"] = "quote"
    """What the TPM says of each batch: a quote of its own, or (where a signature takes long) its PCRs, read
    in an authenticated session, and one quote for all of them every `quote_every_s` (docs/gate.md)."""
    quote_every_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] | None = None
    """Seconds; only with `tpm = "read"`, where it is 10 if left out. Then receipts are complete."""
    freeze: Literal["never", "on-suspicion", "always"] = "never"
    """Whether a hypervisor process stands still while its `process` and `relro` are read: `always`, or when a
    difference that was seen is read again. Some milliseconds each time (docs/operations.md)."""

    @property
    def follows_s(self) -> float:
        """How long after a batch, in seconds, the quote that covers it follows."""
        return 10.0 if self.quote_every_s is None else self.quote_every_s


class Reaction(Section, frozen=True):
    """What follows drift of these kinds, besides refusing (docs/operations.md, "Reactions")."""

    kinds: Annotated[tuple[Kind, ...], msgspec.Meta(min_length=1, max_length=16)]
    steps: Annotated[tuple[Step, ...], msgspec.Meta(max_length=8)]
    severity: Severity = Severity.CRITICAL
    """`warning`: a finding that is no drift by itself becomes one."""


class Drift(Section, frozen=True):
    scope: Literal["vm", "host"] = "vm"
    """`host`: drift of one VM's process closes the gate for all."""
    recovery: Literal["officer"] | dict[Kind, Literal["officer", "auto"]] = "officer"
    """After drift the gate opens again only when an officer clears it, with a reason. By kind, `auto`: a
    clean reading clears it, recorded."""
    reactions: Annotated[tuple[Reaction, ...], msgspec.Meta(max_length=32)] = ()
    poison_pcr: Pcr | None = None
    """Extended by the step `poison`; one of `tpm.pcrs`."""

    @property
    def table(self) -> dict[tuple[Kind, Severity], frozenset[Step]]:
        """The steps by kind and severity."""
        return {(k, rule.severity): frozenset(rule.steps) for rule in self.reactions for k in rule.kinds}

    @property
    def auto(self) -> frozenset[Kind]:
        """Kinds whose drift a clean reading clears."""
        if isinstance(self.recovery, str):
            return frozenset()
        return frozenset(kind for kind, how in self.recovery.items() if how == "auto")

    def has(self, step: Step) -> bool:
        """Whether any rule has the step."""
        return any(step in rule.steps for rule in self.reactions)


class Officers(Section, frozen=True):
    """Who signs manifests. Recorded at the first unsealing; see docs/operations.md, "Manifests"."""

    keys: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()
    """Public keys in OpenSSH's one-line form, each with a name: `ssh-ed25519 AAAA… alice`. None: no vault
    starts."""
    quorum: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    """How many of them must sign."""

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        """The keys; their form was checked when the configuration was parsed."""
        return tuple(map(parse_public_key, self.keys))


class Gateway(Section, frozen=True):
    vsock_port: Port = 7700
    """0: no vsock listener."""
    unix_socket: bool = True
    """Serve host-local callers on `guest.sock` in the run directory."""
    connections_per_caller: Small = 64
    in_flight_per_connection: Small = 256
    handshake_s: Positive = 5.0
    idle_s: Positive = 600.0
    frame_s: Positive = 10.0
    """For one frame to become complete once its first byte has come."""
    workers: Small = 512
    """Callers served at once."""


class Metrics(Section, frozen=True):
    address: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 9464
    """0: an ephemeral port, written to `metrics.port` in the run directory."""


class Config(Section, frozen=True):
    host: Host = Host()
    users: Users = Users()
    tpm: Tpm = Tpm()
    hypervisor: Hypervisor = Hypervisor()
    measure: Measure = Measure()
    gate: Gate = Gate()
    drift: Drift = Drift()
    officers: Officers = Officers()
    gateway: Gateway = Gateway()
    metrics: Metrics = Metrics()

    @property
    def state(self) -> Path:
        return Path(self.host.state_dir)

    @property
    def run(self) -> Path:
        return Path(self.host.run_dir)

    def uid_of(self, role: Literal["vault", "gateway", "metrics", "measurer"]) -> int:
        """The uid a role runs as.

        Raises:
            ConfigError: the user does not exist.
        """
        return uid_of(getattr(self.users, role))

    def require_officers(self) -> None:
        """Raises:
        ConfigError: nobody could sign reference values.
        """
        if not self.officers.keys:
            raise ConfigError(
                "the configuration names no officers, so nobody could sign reference values\n"
                "hint: `hostd setup --officer FILE.pub` names one by his SSH public key"
            )

    def admin_uids(self) -> frozenset[int]:
        return frozenset(uid_of(user) for user in self.users.admin)


def uid_of(user: User) -> int:
    """Resolves a user name or uid; empty is the calling process's own.

    Raises:
        ConfigError: no such user.
    """
    if user == "":
        return os.geteuid()
    if isinstance(user, int):
        return user
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"no such user: {user!r}") from None


ROLES = ("vault", "gateway", "metrics", "measurer")
MAX_CONFIG_BYTES = 1 << 20


def parse_config(text: bytes, *, origin: str) -> Config:
    """Parses TOML.

    Raises:
        ConfigError: it is not TOML, or a key is unknown, of the wrong type or out of bounds.
    """
    try:
        config = msgspec.toml.decode(text, type=Config)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: {error}") from None
    if 10 in config.tpm.pcrs:
        raise ConfigError(f"{origin}: `$.tpm.pcrs` holds 10, which IMA extends all the time")
    if not config.tpm.pcrs:
        raise ConfigError(f"{origin}: `$.tpm.pcrs` is empty: the root key would be sealed to nothing")
    unnamed = [role for role in ROLES if getattr(config.users, role) == ""]
    if unnamed and len(unnamed) < len(ROLES):
        raise ConfigError(f"{origin}: `$.users` leaves out {', '.join(unnamed)}: name all users or none")
    if not config.users.admin:
        raise ConfigError(f"{origin}: `$.users.admin` is empty: nobody could clear a drift")
    if config.gate.quote_every_s is not None and config.gate.tpm == "quote":
        raise ConfigError(f'{origin}: `$.gate.quote_every_s` is for `tpm = "read"`: else each batch has one')
    _check_officers(config.officers, origin)
    try:
        _check_drift(config)
    except RuleError as error:
        raise ConfigError(f"{origin}: `$.drift`: {error}") from None
    return config


def _check_drift(config: Config) -> None:
    drift = config.drift
    seen: set[tuple[Kind, Severity]] = set()
    for rule in drift.reactions:
        for kind in rule.kinds:
            if (kind, rule.severity) in seen:
                raise RuleError(f"two reactions to {rule.severity} {kind}")
            seen.add((kind, rule.severity))
            check_rule(kind, rule.severity, rule.steps)
    if drift.has(Step.SUSPEND_VM) and config.hypervisor.provider != "libvirt":
        raise RuleError("`suspend-vm` needs `hypervisor.provider` to be `libvirt`, who suspends")
    if drift.poison_pcr is not None:
        check_poison_pcr(drift.poison_pcr, config.tpm.pcrs)
    elif drift.has(Step.POISON):
        raise RuleError("`poison` needs `poison_pcr`")
    for kind in sorted(drift.auto):
        if kind in MANUAL:
            raise RuleError(f"`recovery` of {kind} cannot be `auto`: {MANUAL[kind]}")
        if Step.POISON in drift.table.get((kind, Severity.CRITICAL), ()):
            raise RuleError(f"`recovery` of {kind} cannot be `auto`: its reaction poisons the TPM")
        if kind in VM_KINDS and drift.scope == "host":
            raise RuleError(f"`recovery` of {kind} cannot be `auto` while `scope` is `host`")


def _check_officers(officers: Officers, origin: str) -> None:
    keys: list[PublicKey] = []
    for line in officers.keys:
        try:
            keys.append(parse_public_key(line))
        except MalformedError as error:
            raise ConfigError(f"{origin}: `$.officers.keys`: {error.message}") from None
    for a, b in itertools.combinations(keys, 2):
        if a.blob == b.blob:
            raise ConfigError(f"{origin}: `$.officers.keys`: {a.name} and {b.name} are the same key")
        if a.name == b.name:
            raise ConfigError(f"{origin}: `$.officers.keys`: two keys of the name {a.name}")
    if keys and officers.quorum > len(keys):
        raise ConfigError(f"{origin}: `$.officers.quorum` is {officers.quorum}, there are {len(keys)} keys")


def load_config(path: Path) -> Config:
    """Reads and parses the configuration file.

    Raises:
        ConfigError: it cannot be read, is too large, or does not parse.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: over {MAX_CONFIG_BYTES} bytes")
    return parse_config(text, origin=str(path))
