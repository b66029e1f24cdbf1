"""Reference values of component `domain`: what machines may be made of (pure).

A path that ends in `/` stands for everything below it. An entry of `devices` is a class as the reading has
it (`disk:file`), which then may reach whatever it wants, or a class and a target:
`channel:unix /run/libvirt/qemu/`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from hostd.core.reading_types import Label, Name
from hostd.core.rule_part import Part

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostd.core.reading_domain import DomainReading

MAX_ENTRIES: Final = 4096
USUAL_DEVICES: Final = tuple(
    sorted(
        {
            *("disk:file", "disk:block", "disk:volume", "disk:network"),
            *("interface:network", "interface:bridge", "interface:user", "interface:direct"),
            "interface:ethernet",
            *("serial:pty", "serial:null", "serial:vc", "console:pty", "console:null", "console:vc"),
            *("parallel:pty", "parallel:null", "channel:pty", "channel:null", "channel:spicevmc"),
            *("channel:unix /run/libvirt/qemu/channel/", "channel:unix /var/lib/libvirt/qemu/channel/"),
            *("channel:qemu-vdagent", "controller", "hub", "vsock", "memballoon", "watchdog", "panic"),
            *("iommu", "video", "sound", "audio", "nvram", "input"),
            *("graphics:vnc", "graphics:spice", "graphics:egl-headless"),
            *("rng:builtin", "rng:random /dev/urandom", "rng:random /dev/random", "rng:random /dev/hwrng"),
            *("tpm:emulator", "memory:dimm", "memory:virtio-mem", "crypto:builtin"),
        }
    )
)
"""Devices that libvirt backs by itself, by the machine's own storage or by networks of the host."""
USUAL_MEMORY: Final = (
    *("access:private", "allocation", "discard", "hugepages", "locked", "nosharepages"),
    *("source:anonymous", "source:memfd"),
)
"""Backings that no other process of the host has a part in."""
BOOT_KERNEL: Final = frozenset({"kernel", "initrd", "dtb", "shim"})
BOOT_FIRMWARE: Final = frozenset({"loader", "template", "acpi", "rom"})
"""Kinds of boot files that are judged. `nvram` is the machine's own state, `cmdline` the guest's affair."""

Paths = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_ENTRIES)]
Texts = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=4096)], ...], msgspec.Meta(max_length=MAX_ENTRIES)
]


class DomainRule(Part, frozen=True):
    """What every machine of this host may be made of.

    Raises:
        ValueError: a list is not sorted, or has a value twice.
    """

    emulators: Paths = ()
    types: Annotated[tuple[Label, ...], msgspec.Meta(max_length=16)] = ("kvm",)
    machines: Annotated[tuple[Label, ...], msgspec.Meta(max_length=256)] | None = None
    """Machine types, `pc-q35-7.2`. None: any."""
    firmware: Paths = ()
    """Loaders, templates of their variables, ACPI tables and option ROMs, besides those that QEMU takes by
    itself (component `ima` has these)."""
    kernels: Paths = ()
    """Kernels, initial RAM disks, device trees and shims that QEMU loads itself."""
    arguments: Texts = ()
    environment: Texts = ()
    """Passed through to QEMU; each whole."""
    devices: Texts = USUAL_DEVICES
    memory: Annotated[tuple[Label, ...], msgspec.Meta(max_length=32)] = USUAL_MEMORY
    labels: Annotated[tuple[Label, ...], msgspec.Meta(max_length=8)] = ()
    """Security models that must confine every machine: `apparmor`, `dac`, `selinux`."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            values = getattr(self, name)
            if values is not None and any(a >= b for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name}: not sorted, or a value twice")


def propose_domain(readings: Iterable[DomainReading], emulators: Iterable[str] = ()) -> DomainRule:
    """The rule that accepts these machines, and those like them, for an officer to review. `emulators` are
    accepted besides."""
    machines = list(readings)
    boot = [part for reading in machines for part in reading.boot]
    usual = DomainRule()
    devices = {*usual.devices}
    for reading in machines:
        devices |= {
            _entry(part.kind, part.target)
            for part in reading.devices
            if not allows_device(usual, part.kind, part.target)
        }
    models = [{label.partition(" ")[0] for label in reading.labels} for reading in machines]
    return DomainRule(
        emulators=_sorted({*emulators, *(reading.emulator for reading in machines)}),
        types=_sorted({*(reading.virt for reading in machines)} or usual.types),
        firmware=_sorted(part.target for part in boot if part.kind in BOOT_FIRMWARE),
        kernels=_sorted(part.target for part in boot if part.kind in BOOT_KERNEL),
        arguments=_sorted(text for reading in machines for text in reading.arguments),
        environment=_sorted(text for reading in machines for text in reading.environment),
        devices=_sorted(devices),
        memory=_sorted({*usual.memory, *(text for reading in machines for text in reading.memory)}),
        labels=_sorted(set.intersection(*models)) if models else (),
    )


def allows_path(allowed: Iterable[str], path: str) -> bool:
    """Whether a path is one of these, or below one that ends in `/`."""
    if "/../" in f"{path}/" or "/./" in f"{path}/" or "//" in path:
        return path in tuple(allowed)
    return any(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in allowed)


def allows_device(rule: DomainRule, kind: str, target: str) -> bool:
    """Whether a device of this class may reach this target."""
    if kind in rule.devices:
        return True
    own = [entry.removeprefix(f"{kind} ") for entry in rule.devices if entry.startswith(f"{kind} ")]
    return allows_path(own, target)


def _entry(kind: str, target: str) -> str:
    """A socket or file of a console is named after its machine: its folder is what others have in common."""
    if kind.endswith((":unix", ":file")) and target.startswith("/"):
        target = target[: target.rindex("/") + 1]
    return f"{kind} {target}" if target else kind


def _sorted(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))
