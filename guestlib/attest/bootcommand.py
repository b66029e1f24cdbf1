"""Whether the kernel's command line is the one that was measured at boot (pure).

Who measures it, and what is hashed:

| loader | PCR | event | digest over |
|---|---|---|---|
| Linux EFI stub (drivers/firmware/efi/libstub/efi-stub-helper.c) | 9 | EV_EVENT_TAG, id 0x8F3B22ED | UTF-16 |
| GRUB (grub-core/commands/tpm.c) | 8 | EV_IPL, `kernel_cmdline: …` | bytes, without `BOOT_IMAGE=` |
| systemd-stub (src/boot/measure.c), parameters given to it | 12 | EV_IPL | UTF-16 with NUL |
| systemd-stub, section of the image | 11 | EV_IPL, `.cmdline` | bytes with NUL |

Only digests count: an event agrees if its digest is the hash of the command line in one of these forms.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.attest.eventlog import EV_EVENT_TAG, EV_IPL

if TYPE_CHECKING:
    from guestlib.attest.eventlog import BootEvent, EventLog

MAX_COMMAND_LINE: Final = 4096
"""COMMAND_LINE_SIZE is 2048 on x86."""
_LOAD_OPTIONS: Final = (0x8F3B22ED).to_bytes(4, "little")
_GRUB: Final = b"kernel_cmdline: "
_SECTION: Final = ".cmdline"
_GRUB_ADDS: Final = "BOOT_IMAGE="


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the log says of a command line. `measured` empty: it was not measured."""

    measured: tuple[BootEvent, ...]
    agrees: bool


def compare_command_line(log: EventLog, command_line: str) -> Agreement:
    """Compares /proc/cmdline (without the line's end) with what the loaders measured."""
    forms = _digests(command_line[:MAX_COMMAND_LINE])
    agreeing = tuple(e for e in log.events if e.type in (EV_EVENT_TAG, EV_IPL) and e.digest in forms)
    if agreeing:
        return Agreement(agreeing, agrees=True)
    return Agreement(tuple(e for e in log.events if _is_command_line(e)), agrees=False)


def _is_command_line(event: BootEvent) -> bool:
    if event.type == EV_EVENT_TAG:
        return event.data.startswith(_LOAD_OPTIONS)
    return event.type == EV_IPL and (event.data.startswith(_GRUB) or event.text == _SECTION)


def _digests(command_line: str) -> frozenset[bytes]:
    forms: set[bytes] = set()
    for text in {command_line, command_line.removeprefix(_GRUB_ADDS)}:
        for encoding in ("utf-8", "utf-16-le"):
            for end in ("", "\0", " ", " \0", "\n", "\n\0"):
                try:
                    forms.add(hashlib.sha256((text + end).encode(encoding)).digest())
                except UnicodeEncodeError:
                    continue
    return frozenset(forms)
