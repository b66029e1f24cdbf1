"""Judges component `domain` (pure): what libvirt runs for one VM.

| what                                    | good is                                                    |
|-----------------------------------------|------------------------------------------------------------|
| emulator, virtualisation, machine type  | one of the rule's                                          |
| loader, ACPI tables, ROMs; kernel       | approved paths (their content is `ima`'s and `files`' affair) |
| arguments, environment passed through   | approved, each whole                                       |
| devices, memory backing                 | of an approved class, or class and target                  |
| security models                         | those of the rule are on                                   |
| what the process says of itself         | the XML's UUID; no CID but the XML's                        |
| the running machine                     | as it was when its process was first seen                  |

Disks and networks that are plugged in while the machine runs are judged by the rule like those it started
with, and are no change; a CID that a machine gets while it starts is none either. A path is judged, not a
file.
Under `source` `proc` the process says all of this itself: it explains a development host, and proves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.core.codes import Code
from hostd.core.findings import Finding, Severity, Status, Verdict
from hostd.core.rule_domain import BOOT_FIRMWARE, BOOT_KERNEL, allows_device, allows_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostd.core.findings import Component
    from hostd.core.reading_domain import DomainReading
    from hostd.core.reference import Reference
    from hostd.core.rule_domain import DomainRule

MAX_FINDINGS: Final = 64
MAX_MACHINES: Final = 8192
MAX_TEXT: Final = 512
PLUGGED: Final = frozenset({"rom"})
"""Boot files that come with a device, and so may come while the machine runs."""

Key = tuple[int, int]
"""(pid, start time)."""


class DomainJudge:
    """Judges readings of `domain` and keeps what later ones must agree with."""

    def __init__(self) -> None:
        self._seen: dict[str, DomainReading] = {}

    def appraise(self, component: Component, reading: DomainReading, reference: Reference) -> Verdict:
        """The verdict on one reading."""
        claims = _claims(reading)
        rule = reference.domain
        if rule is None:
            return Verdict(component, Status.ABSENT, claims=(("reference", "none"), *claims))
        if reading.vm != component.vm:
            return Verdict(component, Status.PENDING, claims=claims)
        judge = _Judge(component, reading)
        judge.rule(rule)
        judge.said()
        seen = self._seen.get(component.vm)
        if seen is not None and (seen.pid, seen.start_time) == (reading.pid, reading.start_time):
            judge.same(seen)
        elif seen is None and len(self._seen) >= MAX_MACHINES:
            return Verdict(component, Status.PENDING, claims=claims)
        else:
            self._seen[component.vm] = reading
            seen = reading
        if not seen.cid:
            # Plugged in, or filled in while the machine starts: from now on this is its CID.
            self._seen[component.vm] = reading
        findings = judge.findings
        return Verdict(component, Status.DRIFTED if findings else Status.VERIFIED, findings, claims=claims)

    def keep_only(self, vms: Iterable[str]) -> None:
        """Forgets machines that are not among these."""
        alive = frozenset(vms)
        for vm in [vm for vm in self._seen if vm not in alive]:
            del self._seen[vm]


class _Judge:
    """Collects the findings of one reading."""

    def __init__(self, component: Component, reading: DomainReading) -> None:
        self._component = component
        self._now = reading
        self._vm = f"vm {reading.name or reading.vm}"
        self._found: list[Finding] = []

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(self._found[:MAX_FINDINGS])

    def rule(self, rule: DomainRule) -> None:
        now = self._now
        self._one("emulator", now.emulator, rule.emulators, allows_path(rule.emulators, now.emulator))
        self._one("virtualisation", now.virt, rule.types, now.virt in rule.types)
        if rule.machines is not None:
            self._one("machine type", now.machine, rule.machines, now.machine in rule.machines)
        for part in now.boot:
            if part.kind not in BOOT_FIRMWARE | BOOT_KERNEL | {"nvram", "cmdline"}:
                self._add(Code.DOMAIN_BOOT, part.kind, "no such kind of boot file", part.target)
            for kinds, paths in ((BOOT_FIRMWARE, rule.firmware), (BOOT_KERNEL, rule.kernels)):
                if part.kind in kinds and not allows_path(paths, part.target):
                    self._add(Code.DOMAIN_BOOT, part.kind, _or(paths), part.target)
        for what, texts, allowed in (
            ("argument of QEMU", now.arguments, rule.arguments),
            ("environment of QEMU", now.environment, rule.environment),
        ):
            for text in sorted(set(texts) - set(allowed)):
                self._add(Code.DOMAIN_PASSTHROUGH, what, _or(allowed), text)
        for part in now.devices:
            if not allows_device(rule, part.kind, part.target):
                self._add(Code.DOMAIN_DEVICE, f"device {part.kind}", _targets(rule, part.kind), part.target)
        for text in sorted(set(now.memory) - set(rule.memory)):
            self._add(Code.DOMAIN_DEVICE, "memory backing", _or(rule.memory), text)
        models = {label.partition(" ")[0] for label in now.labels}
        for model in sorted(set(rule.labels) - models):
            self._add(Code.DOMAIN_CONFINEMENT, "seclabel", model, _or(sorted(models)))

    def _one(self, what: str, value: str, allowed: tuple[str, ...], good: bool) -> None:
        if not good:
            self._add(Code.DOMAIN_EMULATOR, what, _or(allowed), value)

    def said(self) -> None:
        now = self._now
        process = f"command line of pid {now.pid}"
        if now.said_vms != (now.vm,):
            self._add(Code.DOMAIN_CLAIM, process, f"-uuid {now.vm}", f"-uuid {_or(now.said_vms)}")
        for cid in now.said_cids:
            if cid != now.cid:
                self._add(Code.DOMAIN_CLAIM, process, f"guest-cid {now.cid or 'none'}", f"guest-cid {cid}")

    def same(self, seen: DomainReading) -> None:
        """What stays while the process lives."""
        now = self._now
        for what, was, is_now in (
            ("emulator", seen.emulator, now.emulator),
            ("virtualisation", seen.virt, now.virt),
            ("machine type", seen.machine, now.machine),
            ("boot files", _boot(seen), _boot(now)),
            ("arguments of QEMU", " ".join(seen.arguments), " ".join(now.arguments)),
            ("environment of QEMU", " ".join(seen.environment), " ".join(now.environment)),
            ("memory backing", " ".join(seen.memory), " ".join(now.memory)),
            ("command line", f"SHA-256 {seen.said.hex()}", f"SHA-256 {now.said.hex()}"),
        ):
            if was != is_now:
                self._add(Code.DOMAIN_CHANGED, what, was, is_now)
        if seen.cid not in (0, now.cid):
            self._add(Code.DOMAIN_CHANGED, "CID", str(seen.cid), str(now.cid or "none"))

    def _add(self, code: Code, what: str, expected: str, seen: str) -> None:
        if len(self._found) < MAX_FINDINGS:
            self._found.append(
                Finding(
                    str(self._component),
                    code.value,
                    Severity.CRITICAL,
                    f"{self._vm}: {what}"[:MAX_TEXT],
                    (expected or "none")[:MAX_TEXT],
                    (seen or "none")[:MAX_TEXT],
                )
            )


def _boot(reading: DomainReading) -> str:
    return ", ".join(f"{part.kind} {part.target}" for part in reading.boot if part.kind not in PLUGGED)


def _or(values: Iterable[str]) -> str:
    return " or ".join(values)


def _targets(rule: DomainRule, kind: str) -> str:
    """What of this class is approved, for a finding."""
    targets = [entry.partition(" ")[2] for entry in rule.devices if entry.startswith(f"{kind} ")]
    return _or(targets) or "no such device"


def _claims(reading: DomainReading) -> tuple[tuple[str, str], ...]:
    silent = "the process's own command line" if reading.source == "proc" else "libvirt"
    return (
        ("said by", silent if reading.answered else "libvirt, which is silent now"),
        ("pid", str(reading.pid)),
        ("emulator", reading.emulator),
        ("machine", f"{reading.virt} {reading.machine}".strip()),
        ("boot", _boot(reading)[:MAX_TEXT] or "QEMU's own firmware"),
        ("cid", str(reading.cid or "none")),
        ("confined", ", ".join(sorted({label.partition(" ")[0] for label in reading.labels})) or "no"),
        ("devices", str(len(reading.devices))),
        ("passed through", str(len(reading.arguments) + len(reading.environment))),
        ("definition", reading.definition.hex()),
    )
