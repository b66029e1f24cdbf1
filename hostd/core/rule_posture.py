"""Reference values of component `posture`: what the reviewed host's kernel allowed (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from hostd.core.rule_part import Part, Switch

if TYPE_CHECKING:
    from hostd.core.readings import PostureReading


class PostureRule(Part, frozen=True):
    """Posture of the reviewed host. The kernel and its command line must be equal; everything else must
    be at least as strict. None: the reviewed host did not say, so anything is."""

    kernel: str
    command_line: str
    taint: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    lockdown: Literal["", "none", "integrity", "confidentiality"]
    modules: tuple[str, ...]
    modules_disabled: Switch | None
    signature_enforced: bool | None
    kexec_load_disabled: Switch | None
    ptrace_scope: Switch | None
    kprobes: Annotated[int, msgspec.Meta(ge=-1, le=2**31)]
    """-1: they could not be listed."""


def propose_posture(reading: PostureReading) -> PostureRule:
    """A rule that accepts the posture as it is, for an officer to review.

    Raises:
        ValueError: the reading has a lockdown mode that is none.
    """
    if reading.lockdown not in ("", "none", "integrity", "confidentiality"):
        raise ValueError(f"unknown lockdown mode {reading.lockdown!r}")
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
    )
