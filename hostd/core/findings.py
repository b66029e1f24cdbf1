"""What appraisal says: verdicts, findings, and the components they are about.

Terms are those of RATS (RFC 9334): a reading is appraised against reference values and gives
claims and findings. A finding always names the thing: which file and offset, which process,
which entry; what was expected and what was seen.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec


class Kind(enum.StrEnum):
    """A kind of component that is read and judged as one (docs/architecture.md, "Measurement")."""

    BOOT = "boot"
    """The boot event log, and the PCRs that the root key is sealed to, as every batch's quote has them."""
    GUESTS = "guests"
    """Which hypervisor processes run, and which VM each of them is."""
    POSTURE = "posture"
    """What the running kernel allows: taint, modules, lockdown, command line."""
    IMA = "ima"
    """The kernel's measurement log, and its agreement with PCR 10."""
    FILES = "files"
    """Content of every file segment that a hypervisor process has mapped as code or constants."""
    PROCESS = "process"
    """One hypervisor process: identity, mappings, and that its pages are those of `files`."""
    KERNEL = "kernel"
    """Text and read-only data of the running kernel and its modules."""
    RELRO = "relro"
    """One hypervisor process: data that the dynamic linker relocated and then protected (GOT)."""
    DOMAIN = "domain"
    """What libvirt runs for one VM: emulator, firmware, passthrough, devices."""
    SELF = "self"
    """hostd's own processes, files and configuration."""


class Status(enum.StrEnum):
    VERIFIED = "verified"
    DRIFTED = "drifted"
    ABSENT = "absent"
    """The host cannot provide this component (no IMA, say). Never to be read as good."""
    PENDING = "pending"
    """Nothing is wrong, and more has to be read before it is good (a file seen for the first time)."""


class Severity(enum.StrEnum):
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True, order=True)
class Component:
    """A component of the host (`vm` empty) or of one virtual machine (`vm` its UUID)."""

    kind: Kind
    vm: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.vm}" if self.vm else str(self.kind)


BOOT = Component(Kind.BOOT)
GUESTS = Component(Kind.GUESTS)
POSTURE = Component(Kind.POSTURE)
IMA = Component(Kind.IMA)
FILES = Component(Kind.FILES)
KERNEL = Component(Kind.KERNEL)
SELF = Component(Kind.SELF)

VM_KINDS = frozenset({Kind.PROCESS, Kind.RELRO, Kind.DOMAIN})
"""Kinds of which every virtual machine has its own component; all others are the host's."""


def process_of(vm: str) -> Component:
    """The component that is VM `vm`'s own hypervisor process."""
    return Component(Kind.PROCESS, vm)


def relro_of(vm: str) -> Component:
    """The component that is the relocated data of VM `vm`'s hypervisor process."""
    return Component(Kind.RELRO, vm)


def domain_of(vm: str) -> Component:
    """The component that is libvirt's definition of VM `vm` as it runs."""
    return Component(Kind.DOMAIN, vm)


class Finding(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One thing that is not as it should be. `code` is append-only and bounded: it labels metrics."""

    component: str
    code: str
    severity: Severity
    subject: str
    """The thing's name: a path, `pid 812 (vm web1)`, a PCR, a kernel symbol."""
    expected: str
    seen: str
    where: str = ""
    """Offset or address inside the subject, where there is one."""

    def __str__(self) -> str:
        where = f" at {self.where}" if self.where else ""
        return (
            f"{self.component}: {self.code}: {self.subject}{where}: "
            f"expected {self.expected}, seen {self.seen}"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one reading.

    Raises:
        ValueError: a drifted verdict without a finding, or a verified one with a critical finding.
    """

    component: Component
    status: Status
    findings: tuple[Finding, ...] = ()
    identify: frozenset[int] = frozenset()
    """Files whose identity should be read (`AskFile`), whatever the status. Under PENDING it is what the
    component waits for; under VERIFIED it is what some process's component waits for."""
    claims: tuple[tuple[str, str], ...] = ()
    """What the reading shows, good or bad, as (name, value): `("files", "52")`, `("lockdown", "integrity")`.
    For people; a decision never rests on them. Names are few and fixed, values short."""

    def __post_init__(self) -> None:
        critical = any(f.severity is Severity.CRITICAL for f in self.findings)
        if (self.status is Status.DRIFTED) != critical:
            raise ValueError(f"{self.component}: {self.status} does not fit its findings")

    @property
    def good(self) -> bool:
        return self.status is Status.VERIFIED
