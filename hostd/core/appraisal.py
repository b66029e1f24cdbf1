"""Appraisal: readings in, verdicts out (pure).

One `Appraiser` belongs to one measurer's life (`Hello.epoch`): file numbers and tags of another mean
nothing. It judges each reading against the reference values, and keeps only what later readings must
agree with. The same code judges in the vault and in a remote verifier.

| reading                        | verdict |
|--------------------------------|---------|
| as it should be                | verified |
| not as it should be            | drifted, with a finding for each thing |
| `Missing`, absent              | absent: this host cannot provide it. Never good |
| `Missing`, not absent          | pending: it went away. Never good |
| of another kind than asked for | pending |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostd.core.appraise_boot import BootJudge
from hostd.core.appraise_domain import DomainJudge
from hostd.core.appraise_files import FileBook
from hostd.core.appraise_ima import Accepted, ImaLog
from hostd.core.appraise_kernel import KernelJudge
from hostd.core.appraise_posture import appraise_posture
from hostd.core.appraise_process import Processes
from hostd.core.appraise_relro import RelroJudge
from hostd.core.appraise_self import SelfJudge
from hostd.core.codes import Code
from hostd.core.findings import GUESTS, Component, Finding, Kind, Severity, Status, Verdict
from hostd.core.reading_boot import BootReading
from hostd.core.reading_domain import DomainReading
from hostd.core.reading_kernel import KernelReading
from hostd.core.reading_relro import RelroReading
from hostd.core.reading_self import SelfReading
from hostd.core.readings import (
    FileIdentity,
    FilesReading,
    GuestsReading,
    ImaReading,
    Missing,
    PostureReading,
    ProcessReading,
    Reading,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostd.core.reference import Reference

MAX_FINDINGS: Final = 64


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration adds to the reference values."""

    allow_jit: bool
    protected: tuple[str, ...]
    """Path prefixes whose IMA entries must be known. Empty protects every path."""
    accepted: Accepted | None = None
    """What an officer has accepted of the IMA log."""
    pcrs: Mapping[int, bytes] = field(default_factory=dict)
    """PCR values (SHA-256 bank, index → 32 bytes) that every quote is compared with. Empty: none is known,
    and nothing that rests on them is verified."""


class Appraiser:
    """Judges readings."""

    def __init__(self, reference: Reference, rules: Rules) -> None:
        self.reference = reference
        """May be replaced; everything is judged against the one that is here at the time."""
        self.files = FileBook()
        self.ima = ImaLog(rules.protected or ("",), rules.accepted, self._boot_pcrs)
        self._processes = Processes(allow_jit=rules.allow_jit)
        self._pcrs = rules.pcrs
        self.boot = BootJudge(rules.pcrs)
        self.kernel = KernelJudge()
        self._relro = RelroJudge()
        self._domains = DomainJudge()
        self._self = SelfJudge()
        self._running: int | None = None

    def appraise(self, component: Component, reading: Reading) -> Verdict:
        """The verdict on a reading that was asked for as `component`."""
        if isinstance(reading, Missing):
            status = Status.ABSENT if reading.absent else Status.PENDING
            return Verdict(component, status, claims=(("reason", reading.reason),))
        match component.kind, reading:
            case Kind.GUESTS, GuestsReading():
                return self._guests(reading)
            case Kind.POSTURE, PostureReading():
                if self.reference.posture is None:
                    return Verdict(component, Status.ABSENT, claims=(("reference", "none"),))
                return appraise_posture(reading, self.reference.posture)
            case Kind.IMA, ImaReading():
                return self.ima.appraise(reading, self.reference)
            case Kind.FILES, FilesReading():
                return self.files.appraise(reading, self.reference, processes=self._running)
            case Kind.PROCESS, ProcessReading():
                return self._processes.appraise(component, reading, self.files, self.reference)
            case Kind.BOOT, BootReading():
                return self.boot.appraise(component, reading, self.reference)
            case Kind.KERNEL, KernelReading():
                return self.kernel.appraise(component, reading, self.reference)
            case Kind.RELRO, RelroReading():
                return self._relro.appraise(component, reading, self.reference)
            case Kind.DOMAIN, DomainReading():
                return self._domains.appraise(component, reading, self.reference)
            case Kind.SELF, SelfReading():
                return self._self.appraise(component, reading, self.reference, self.files)
        return Verdict(component, Status.PENDING)

    def learn(self, number: int, reading: FileIdentity | Missing) -> None:
        """Takes in the answer to `AskFile(number)`. The next reading is judged with it."""
        self.files.learn(number, reading)

    def _boot_pcrs(self) -> dict[int, bytes]:
        """PCRs that this host booted with: those that quotes are compared with, and of the others what the
        boot event log says, if it agrees with these."""
        return {**self.boot.replayed, **self._pcrs}

    def _guests(self, reading: GuestsReading) -> Verdict:
        self._running = len(reading.hypervisors)
        alive = {(item.pid, item.start_time) for item in reading.hypervisors}
        self._processes.keep_only(alive)
        self._domains.keep_only(item.vm for item in reading.hypervisors)
        findings = tuple(
            Finding(
                str(GUESTS),
                Code.HOLDER_UNKNOWN.value,
                Severity.CRITICAL,
                holder,
                "no holder of /dev/vhost-vsock but known hypervisors",
                "holds /dev/vhost-vsock",
            )
            for holder in reading.unknown[:MAX_FINDINGS]
        )
        claims = (
            ("hypervisors", str(len(reading.hypervisors))),
            ("of them VMs", str(sum(bool(item.vm) for item in reading.hypervisors))),
            ("strangers with vsock", str(len(reading.unknown))),
        )
        status = Status.DRIFTED if findings else Status.VERIFIED
        return Verdict(GUESTS, status, findings, claims=claims)
