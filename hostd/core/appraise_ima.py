"""Judges the kernel's measurement log (pure), and keeps its replay.

Every entry under a protected path must have a digest of the reference values, and be no violation; so
must, whatever is protected, the policy of IMA itself and everything measured from memory (`ima-buf`: a
command line for kexec, keys, other subsystems' critical data). The first entry, `boot_aggregate`, must be
the digest of the PCRs that the host booted with, where all of them are known.

The log is only as true as PCR 10 says: `matches` tells up to which byte the log replays to the value that
the TPM quoted. The quote is taken first and the log read after, so later entries stay pending.

An entry stays in the log until the next boot, and so does its finding here: until the reference values
know its digest, or an officer accepts the log up to it (`so_far`, given to the next `ImaLog`). Nobody
accepts a log that is malformed.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.attest.imalog import PCR_START, Entry, MalformedLogError, extend, parse_entries
from hostd.core.codes import Code
from hostd.core.findings import IMA, Finding, Severity, Status, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from hostd.core.readings import ImaReading
    from hostd.core.reference import Reference

MAX_PENDING: Final = 65536
"""Entries after the last one that a quote covered; over it the oldest are forgotten, and a quote from
before them does not match any more."""
MAX_FINDINGS: Final = 64
POLICY: Final = "/etc/ima/ima-policy"
"""Where systemd loads the policy from (src/core/ima-setup.c)."""
AGGREGATE: Final = "boot_aggregate"
MAX_AGGREGATES: Final = 16
"""One a boot, and one more for each kexec that hands the log on."""
MAX_UNRESOLVED: Final = 4096
"""Entries kept as findings; further ones are counted."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What an officer has accepted: entries in the first `position` bytes of this boot's log."""

    boot_id: str
    position: int


class ImaLog:
    """The log as far as it was read, its replay, and the entries that are not as they should be."""

    def __init__(
        self,
        protected: Iterable[str],
        accepted: Accepted | None = None,
        boot_pcrs: Callable[[], Mapping[int, bytes]] = dict,
    ) -> None:
        """`boot_pcrs`: PCRs (index → 32 bytes) that this host booted with, as far as they are known."""
        self._protected = tuple(protected)
        self._accepted = accepted
        self._boot_pcrs = boot_pcrs
        self._start_over()

    def _start_over(self) -> None:
        self.position = 0
        """Bytes of the log that were judged: what to ask from next."""
        self.entries = 0
        """Entries in those bytes."""
        self.pcr10 = PCR_START
        """Replay of all of them."""
        self._boot_id = ""
        self._states: deque[tuple[int, bytes]] = deque([(0, PCR_START)], maxlen=MAX_PENDING)
        self._unresolved: dict[tuple[str, str, bool], Entry] = {}
        self._more = 0
        self._malformed = ""
        self._aggregates: dict[str, Entry] = {}
        self.violations = 0
        """Entries that are violations, protected or not."""

    def appraise(self, reading: ImaReading, reference: Reference) -> Verdict:
        """Judges the next part of the log; PENDING if it is not the next part, or there is more."""
        if self._boot_id and reading.boot_id != self._boot_id:
            self._start_over()
        # Two asks may be under way from the same position: what was judged already is passed over.
        skip = self.position - reading.offset
        if not 0 <= skip <= len(reading.data):
            findings = self._findings(reference)
            return Verdict(IMA, Status.DRIFTED if findings else Status.PENDING, findings)
        self._boot_id = reading.boot_id
        try:
            entries = parse_entries(reading.data, skip)
            end = entries[-1].end if entries else skip
            if end != len(reading.data):
                raise MalformedLogError(end, "the entry is cut short")
        except MalformedLogError as error:
            self._malformed = self._malformed or f"byte {reading.offset + error.offset} of the log: {error}"
            return Verdict(IMA, Status.DRIFTED, self._findings(reference))
        for entry in entries:
            self.violations += entry.violation
            if entry.path == AGGREGATE and len(self._aggregates) < MAX_AGGREGATES:
                self._aggregates.setdefault(entry.content, entry)
            if not self._is_accepted(reading.offset + entry.end):
                self._judge(entry, reference)
            self.pcr10 = extend(self.pcr10, entry)
            self.entries += 1
            self._states.append((reading.offset + entry.end, self.pcr10))
        self.position = reading.offset + len(reading.data)
        findings = self._findings(reference)
        if findings:
            return Verdict(IMA, Status.DRIFTED, findings, claims=self._claims())
        # A log without its first entry, boot_aggregate, is none.
        status = Status.VERIFIED if self.position and not reading.more else Status.PENDING
        return Verdict(IMA, status, claims=self._claims())

    @property
    def boot_id(self) -> str:
        """The boot whose log it is; empty before the first reading."""
        return self._boot_id

    def matches(self, pcr10: bytes) -> int | None:
        """The byte up to which the log replays to this value of PCR 10 (SHA-256 bank); None: nowhere,
        so the log that was read is not the one that the TPM saw, or not all of it was read yet."""
        return next((end for end, state in reversed(self._states) if state == pcr10), None)

    def settle(self, position: int) -> None:
        """Forgets states before `position`, which a quote covered: an older quote does not count again."""
        while len(self._states) > 1 and self._states[0][0] < position:
            self._states.popleft()

    @property
    def so_far(self) -> Accepted:
        """What an officer accepts who accepts all that was found until now: for the next `ImaLog`."""
        return Accepted(self._boot_id, self.position)

    def _is_accepted(self, end: int) -> bool:
        accepted = self._accepted
        return accepted is not None and accepted.boot_id == self._boot_id and end <= accepted.position

    def _judge(self, entry: Entry, reference: Reference) -> None:
        always = entry.path == POLICY or entry.template == "ima-buf"
        if entry.path and not always and not entry.path.startswith(self._protected):
            return
        if not entry.path and entry.template in ("ima-ng", "ima-sig", "ima"):
            return
        if _known(entry, reference):
            return
        if len(self._unresolved) < MAX_UNRESOLVED:
            self._unresolved[entry.path or entry.template, entry.content, entry.violation] = entry
        else:
            self._more += 1

    def _findings(self, reference: Reference) -> tuple[Finding, ...]:
        for key, entry in list(self._unresolved.items()):
            if _known(entry, reference):
                del self._unresolved[key]
        found = [_finding(entry, reference) for entry in list(self._unresolved.values())[:MAX_FINDINGS]]
        if self._malformed:
            found.append(_critical(Code.IMA_MALFORMED, "IMA log", "whole entries", self._malformed))
        found += self._wrong_aggregates()
        if self._more:
            found.append(
                _critical(Code.IMA_UNKNOWN, "IMA log", "known digests", f"{self._more} further entries")
            )
        return tuple(found)

    def _wrong_aggregates(self) -> list[Finding]:
        expected = _expected_aggregates(self._boot_pcrs())
        return [
            _critical(Code.IMA_AGGREGATE, AGGREGATE, f"sha256:{expected[0].hex()}", entry.content)
            for entry in self._aggregates.values()
            if expected and entry.algorithm == "sha256" and entry.digest not in expected
        ]

    def _claims(self) -> tuple[tuple[str, str], ...]:
        checked = [e for e in self._aggregates.values() if e.algorithm == "sha256"]
        known = bool(checked) and bool(_expected_aggregates(self._boot_pcrs()))
        return (
            ("entries", str(self.entries)),
            ("violations", str(self.violations)),
            ("PCR 10 replay", self.pcr10.hex()),
            (AGGREGATE, "compared with PCRs 0-9" if known else "not compared"),
        )


def _expected_aggregates(pcrs: Mapping[int, bytes]) -> tuple[bytes, ...]:
    """What `boot_aggregate` may be, SHA-256: over PCRs 0 to 9, or 0 to 7 before Linux 5.9
    (security/integrity/ima/ima_crypto.c, `ima_calc_boot_aggregate_tfm`). Empty: not all are known."""
    if not all(pcr in pcrs for pcr in range(10)):
        return ()
    return tuple(hashlib.sha256(b"".join(pcrs[pcr] for pcr in range(end))).digest() for end in (10, 8))


def _known(entry: Entry, reference: Reference) -> bool:
    if not entry.path or entry.violation:
        return False
    # Nearly all entries end here; `measured` makes lists.
    if entry.algorithm == "sha256" and entry.digest.hex() in reference.files.get(entry.path, ()):
        return True
    return entry.content in reference.measured(entry.path)


def _finding(entry: Entry, reference: Reference) -> Finding:
    if not entry.path:
        return _critical(
            Code.IMA_MALFORMED, f"template {entry.template}", "a template with a path", "a template without"
        )
    expected = " or ".join(reference.measured(entry.path)) or "no such file"
    if entry.violation:
        return _critical(Code.IMA_VIOLATION, entry.path, expected, "open for writing while it was measured")
    return _critical(Code.IMA_UNKNOWN, entry.path, expected, entry.content)


def _critical(code: Code, subject: str, expected: str, seen: str) -> Finding:
    return Finding(str(IMA), code.value, Severity.CRITICAL, subject, expected, seen)
