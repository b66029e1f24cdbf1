"""A hypervisor process, as readings name it."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_types import Count, Name, Struct


class Hypervisor(Struct, frozen=True):
    """A hypervisor process and the VM it is. (pid, start_time) names a process for good."""

    pid: Count
    start_time: Count
    """Clock ticks after boot, field 22 of /proc/PID/stat."""
    uid: Count
    vm: Annotated[str, msgspec.Meta(max_length=36)]
    """UUID of the VM, lower case; empty if the process does not say one."""
    name: Annotated[str, msgspec.Meta(max_length=256)]
    cid: Count
    """vsock context id, 0 if it has none."""
    executable: Name
    """Path that /proc/PID/exe gives."""
    accel: Annotated[str, msgspec.Meta(max_length=8)]
    """`kvm` if the process holds a KVM virtual machine, else `tcg`."""
    source: Annotated[str, msgspec.Meta(max_length=8)]
    """Who vouches for pid ↔ UUID: `libvirt`, or `proc` (its own command line)."""
