"""Reading of component `domain`: what libvirt runs for one VM, and what the process says of itself.

Facts of the live XML (libvirt's formatdomain), by the words of that format. What a machine has and this
module has no field for is a `Part`: nothing that reaches the host is left out.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_types import Count, Label, Name, Sha256, Struct

MAX_PARTS = 2048
"""Of one kind in one machine. A machine with all PCI slots taken has some 300 devices."""
MAX_ARGUMENT = 4096
Text = Annotated[str, msgspec.Meta(max_length=MAX_ARGUMENT)]


class DomainPart(Struct, frozen=True, order=True):
    """A device or a file of a machine."""

    kind: Annotated[str, msgspec.Meta(max_length=64)]
    """Class: `disk:file`, `hostdev:pci`, `channel:unix`; of boot files `loader`, `kernel`, `rom`."""
    target: Name = ""
    """What of the host it reaches, or the file; empty where that is nothing or not judged."""


class DomainReading(Struct, frozen=True, tag="domain"):
    """What runs for one VM."""

    vm: Annotated[str, msgspec.Meta(max_length=36)]
    """UUID of the XML, lower case."""
    name: Label
    pid: Count
    start_time: Count
    """Clock ticks after boot; (pid, start_time) is the process that the VM was vouched for at that moment."""
    source: Annotated[str, msgspec.Meta(max_length=8)]
    """`libvirt`: the live XML. `proc`: the process's own command line, for development."""
    virt: Label
    """`kvm`, `qemu` (emulated)."""
    emulator: Name
    machine: Label
    boot: Annotated[tuple[DomainPart, ...], msgspec.Meta(max_length=MAX_PARTS)]
    """Files that the machine starts from: `loader`, `nvram`, `template` (of the nvram), `kernel`, `initrd`,
    `dtb`, `shim`, `acpi`, `rom`; and `cmdline`, the kernel's command line."""
    arguments: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_PARTS)]
    """Of QEMU, passed through (`qemu:arg`), and whatever else stands under a foreign namespace."""
    environment: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_PARTS)]
    """`NAME=value`, passed through (`qemu:env`)."""
    cid: Count
    """vsock context id, 0 if there is none."""
    labels: Annotated[tuple[Label, ...], msgspec.Meta(max_length=16)]
    """Confinement that is on, `model label`: `apparmor libvirt-4a6f…`."""
    memory: Annotated[tuple[Label, ...], msgspec.Meta(max_length=32)]
    """How guest memory is backed: `hugepages`, `source:memfd`, `access:shared`."""
    devices: Annotated[tuple[DomainPart, ...], msgspec.Meta(max_length=MAX_PARTS)]
    """Sorted, each once."""
    definition: Sha256
    """Over the canonical XML (C14N 2.0), or the command line. It changes when a disk is plugged in."""
    said_vms: Annotated[tuple[Label, ...], msgspec.Meta(max_length=16)]
    """UUIDs that the process's command line says."""
    said_cids: Annotated[tuple[Count, ...], msgspec.Meta(max_length=16)]
    """CIDs that it says; none where the device was plugged in later."""
    said: Sha256
    """Over the command line."""
    answered: bool
    """Whether libvirt said so in this reading. False: it is silent, and this is what it said last of this
    very process; nobody but libvirt plugs devices."""
