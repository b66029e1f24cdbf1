"""Reference values of component `posture`: what the reviewed host's kernel allowed (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from hostd.core.reading_types import Label
from hostd.core.rule_part import Part, Switch

if TYPE_CHECKING:
    from hostd.core.reading_posture import PostureReading

CGROUP_FILTERS: Final = (8, 9, 15, 18, 23, 25)
"""BPF program types that only filter what the processes of one cgroup may do: packets, sockets, devices,
addresses, sysctls, socket options (BPF_PROG_TYPE_CGROUP_*). systemd and libvirt make new ones whenever a unit
or a machine starts, with that unit's own numbers in them, so their tags cannot be known beforehand."""
Parameter = Annotated[str, msgspec.Meta(max_length=128)]


class BpfRule(Part, frozen=True, order=True):
    """A BPF program, however often it is loaded."""

    type: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
    tag: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
    name: Annotated[str, msgspec.Meta(max_length=32)] = ""
    """For people: it is not compared."""


class PostureRule(Part, frozen=True):
    """Posture of the reviewed host. The kernel, its command line, its entry points and the parameters of
    kvm must be equal; everything else must be at least as strict. None: the reviewed host did not say, so
    anything is."""

    kernel: str
    command_line: str
    taint: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    lockdown: Literal["", "none", "integrity", "confidentiality"]
    modules: tuple[str, ...]
    modules_disabled: Switch | None
    signature_enforced: bool | None
    kexec_load_disabled: Switch | None
    ptrace_scope: Switch | None
    kprobes: tuple[Label, ...] | None
    """Kernel probes that may be there, as `kprobe at symbol+0x0 [module]`."""
    kexec_loaded: Switch | None = None
    module_taints: dict[Label, Annotated[str, msgspec.Meta(max_length=16)]] = msgspec.field(
        default_factory=dict
    )
    """Module → letters of the taints that it may bring."""
    traced: tuple[Label, ...] | None = None
    """Functions that may call into ftrace, as `symbol [module]`."""
    tracer: Parameter | None = None
    programs: tuple[BpfRule, ...] | None = None
    """BPF programs that may be loaded."""
    program_types: tuple[Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)], ...] = CGROUP_FILTERS
    """Types of BPF programs that may be loaded whatever their tag."""
    entries: dict[Label, Label] | None = None
    """Register → kernel symbol that it holds the address of, on every CPU."""
    parameters: dict[Label, Parameter] = msgspec.field(default_factory=dict)
    """`module.parameter` → value."""

    def __post_init__(self) -> None:
        for row in (self.kprobes, self.traced, self.programs, self.program_types):
            if row is not None and list(row) != sorted(set(row)):  # type: ignore[type-var]
                raise ValueError("a list of the posture is not sorted, or has a value twice")


def propose_posture(reading: PostureReading) -> PostureRule:
    """A rule that accepts the posture as it is, for an officer to review.

    Raises:
        ValueError: the reading has a lockdown mode that is none, or CPUs whose entries differ.
    """
    if reading.lockdown not in ("", "none", "integrity", "confidentiality"):
        raise ValueError(f"unknown lockdown mode {reading.lockdown!r}")
    entries: dict[str, str] | None = None
    if reading.entries is not None:
        entries = {item.register: item.target for item in reading.entries}
        if {(item.register, item.target) for item in reading.entries} != set(entries.items()):
            raise ValueError("CPUs enter the kernel at different addresses")
    programs: tuple[BpfRule, ...] | None = None
    if reading.programs is not None:
        named = {(p.type, p.tag.hex()): p.name for p in reading.programs if p.type not in CGROUP_FILTERS}
        programs = tuple(BpfRule(kind, tag, name) for (kind, tag), name in sorted(named.items()))
    return PostureRule(
        kernel=reading.kernel,
        command_line=reading.command_line,
        taint=reading.taint,
        lockdown=reading.lockdown,  # type: ignore[arg-type]
        modules=tuple(sorted(set(reading.modules))),
        modules_disabled=reading.modules_disabled,
        signature_enforced=reading.signature_enforced,
        kexec_load_disabled=reading.kexec_load_disabled,
        ptrace_scope=reading.ptrace_scope,
        kprobes=reading.kprobes,
        kexec_loaded=reading.kexec_loaded,
        module_taints=dict(reading.module_taints),
        traced=reading.traced,
        tracer=reading.tracer,
        programs=programs,
        entries=entries,
        parameters=dict(reading.parameters),
    )
