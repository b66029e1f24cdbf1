"""Who asks. Decided by the channel (docs/architecture.md, "Who asks"), never by a message."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """One of: a virtual machine (`vm`, with the process it was bound to), a host-local user, an
    officer on the operators' socket.

    Raises:
        ValueError: not exactly one of them.
    """

    vm: str = ""
    pid: int = 0
    start_time: int = 0
    uid: int = -1
    officer: bool = False

    def __post_init__(self) -> None:
        process = self.pid > 0 and self.start_time > 0 and self.uid == -1 and not self.officer
        user = self.pid == 0 and self.start_time == 0 and self.uid >= 0
        if not (process if self.vm else user):
            raise ValueError("a caller is a VM's process or a user")

    @property
    def principal(self) -> str:
        """The name that bindings, policies and the ledger use."""
        if self.vm:
            return f'VM::"{self.vm}"'
        return f'{"Officer" if self.officer else "Host"}::"uid:{self.uid}"'


def vm_principal(uuid: str) -> str:
    return f'VM::"{uuid}"'


def host_principal(uid: int) -> str:
    return f'Host::"uid:{uid}"'
