"""Reading of component `posture`: what the running kernel allows, and what hooks are in it."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_types import Count, Label, Name, Struct

MAX_MODULES = 2048
MAX_HOOKS = 512
"""Kernel probes, and functions under a tracer, that are named; a last name says how many more there are."""
MAX_PROGRAMS = 4096
MAX_PARAMETERS = 512
MAX_ENTRIES = 64

ModuleName = Annotated[str, msgspec.Meta(max_length=64)]
ShortValue = Annotated[str, msgspec.Meta(max_length=128)]
Hooks = Annotated[tuple[Label, ...], msgspec.Meta(max_length=MAX_HOOKS + 1)]


class BpfProgram(Struct, frozen=True):
    """A loaded BPF program (include/uapi/linux/bpf.h, struct bpf_prog_info)."""

    id: Count
    """Counts up with every load."""
    type: Count
    """enum bpf_prog_type."""
    tag: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
    """First 8 bytes of the digest of its instructions with map references taken out: SHA-1, or SHA-256
    since Linux 6.18 (kernel/bpf/core.c, `bpf_prog_calc_tag`)."""
    name: Annotated[str, msgspec.Meta(max_length=32)]


class EntryPoint(Struct, frozen=True):
    """Where a CPU enters the kernel."""

    cpu: Count
    register: Annotated[str, msgspec.Meta(max_length=16)]
    """`LSTAR`, `CSTAR` or `SYSENTER_EIP`."""
    target: Label
    """Kernel symbol at exactly that address, else the address in hex."""


class PostureReading(Struct, frozen=True, tag="posture"):
    """What the kernel allows. `None` and empty: this kernel does not say."""

    kernel: Annotated[str, msgspec.Meta(max_length=256)]
    """`uname -r` and `-v`."""
    command_line: Name
    taint: Count
    lockdown: Annotated[str, msgspec.Meta(max_length=32)]
    modules: Annotated[tuple[ModuleName, ...], msgspec.Meta(max_length=MAX_MODULES)]
    modules_disabled: int | None
    signature_enforced: bool | None
    kexec_load_disabled: int | None
    ptrace_scope: int | None
    kprobes: Hooks | None
    """Kernel probes as `kprobe at symbol+0x0 [module]`, sorted."""
    kexec_loaded: int | None = None
    module_taints: Annotated[
        tuple[tuple[ModuleName, Annotated[str, msgspec.Meta(max_length=16)]], ...],
        msgspec.Meta(max_length=MAX_MODULES),
    ] = ()
    """(module, letters) of each module that taints the kernel."""
    traced: Hooks | None = None
    """Functions that call into ftrace (function tracer, kprobes, live patches, BPF), as `symbol [module]`."""
    tracer: ShortValue | None = None
    """`nop` if there is none."""
    programs: Annotated[tuple[BpfProgram, ...], msgspec.Meta(max_length=MAX_PROGRAMS)] | None = None
    entries: Annotated[tuple[EntryPoint, ...], msgspec.Meta(max_length=MAX_ENTRIES)] | None = None
    """Of a few CPUs; others come with later readings."""
    parameters: Annotated[tuple[tuple[Label, ShortValue], ...], msgspec.Meta(max_length=MAX_PARAMETERS)] = ()
    """(`module.parameter`, value) of kvm, kvm_amd and kvm_intel."""
