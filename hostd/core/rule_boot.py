"""Reference values of component `boot`: accepted PCR values, and the reviewed host's boot events (pure)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from hostd.core.rule_part import Hex256, Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from guestlib.attest.eventlog import BootEvent

MAX_EVENTS: Final = 1024
"""A host with Secure Boot and GRUB has some 150."""
Pcr = Annotated[int, msgspec.Meta(ge=0, le=23)]


class PcrRule(Part, frozen=True):
    """Accepted values of one PCR, SHA-256 bank: the one that runs, and an approved next one."""

    pcr: Pcr
    accepted: Annotated[tuple[Hex256, ...], msgspec.Meta(min_length=1, max_length=64)]


class EventRule(Part, frozen=True):
    """An event of the reviewed host's boot, in the log's order. It names what differs; the judgement
    rests on the PCR values."""

    pcr: Pcr
    type: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
    digest: Hex256
    text: Annotated[str, msgspec.Meta(max_length=256)]
    covered: bool
    """The digest is the hash of what the event says. Firmware does so for some types of events and not for
    others: where it did, it does."""


class BootRule(Part, frozen=True):
    """Boot of the reviewed host.

    Raises:
        ValueError: a PCR is named twice, or PCRs or values are not sorted.
    """

    pcrs: Annotated[tuple[PcrRule, ...], msgspec.Meta(min_length=1, max_length=24)]
    events: Annotated[tuple[EventRule, ...], msgspec.Meta(max_length=MAX_EVENTS)] = ()

    def __post_init__(self) -> None:
        numbers = [rule.pcr for rule in self.pcrs]
        if numbers != sorted(set(numbers)):
            raise ValueError("PCRs are not sorted, or one is there twice")
        for rule in self.pcrs:
            if list(rule.accepted) != sorted(set(rule.accepted)):
                raise ValueError(f"values of PCR {rule.pcr} are not sorted, or one is there twice")

    def accepted(self, pcr: int) -> tuple[str, ...]:
        """Accepted values of a PCR in hex; empty if the rule does not judge it."""
        return next((rule.accepted for rule in self.pcrs if rule.pcr == pcr), ())


def propose_boot(
    pcrs: Mapping[int, bytes], events: Iterable[BootEvent] = (), *, next_to: BootRule | None = None
) -> BootRule:
    """A rule that accepts these PCR values (index → 32 bytes), for an officer to review.

    `next_to`: values that another rule accepts stay accepted (the boot before an update).
    """
    accepted = {pcr: {value.hex()} for pcr, value in pcrs.items()}
    for rule in next_to.pcrs if next_to is not None else ():
        accepted.setdefault(rule.pcr, set()).update(rule.accepted)
    return BootRule(
        pcrs=tuple(PcrRule(pcr, tuple(sorted(values))) for pcr, values in sorted(accepted.items())),
        events=tuple(
            EventRule(event.pcr, event.type, event.digest.hex(), event.text, event.covered)
            for event in itertools.islice(events, MAX_EVENTS)
            if event.pcr in pcrs and event.extends
        ),
    )
