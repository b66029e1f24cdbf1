"""Measurer and appraiser together, driven as the vault drives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.config import Config, Hypervisor
from hostd.core.appraisal import Appraiser, Rules
from hostd.core.findings import FILES, GUESTS, POSTURE, Finding, Kind, Status, Verdict, process_of
from hostd.core.manifest import from_host
from hostd.core.readings import FileIdentity, FilesReading, PostureReading, ProcessReading
from hostd.core.reference import Reference
from hostd.ipc.measuring import Ask, AskFile
from hostd.measurer.probes import Measurer

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 4


class Watched:
    """A measurer of one binary's processes, and an appraiser with a baseline."""

    def __init__(self, binary: Path, *, allow_jit: bool = True) -> None:
        self.binary = binary
        self.config = Config(
            hypervisor=Hypervisor(binaries=(str(binary),), provider="proc", allow_jit=allow_jit)
        )
        self.measurer = Measurer(self.config)
        self.allow_jit = allow_jit
        self.appraiser: Appraiser

    def approve(self, *without: str) -> Reference:
        """Makes what runs now the baseline, and forgets what was learned. `without`: parts of paths that
        are left out."""
        self.measurer.answer(Ask(0, Kind.GUESTS))
        identities: dict[int, FileIdentity] = {}
        for guest in self.measurer.guests.guests:
            reading = self.measurer.answer(Ask(0, Kind.PROCESS, guest.hypervisor.vm))
            assert isinstance(reading, ProcessReading), reading
            assert reading.altered_total == 0
            for mapping in reading.mappings:
                if mapping.file is not None and mapping.file not in identities:
                    identity = self.measurer.answer(AskFile(0, mapping.file))
                    assert isinstance(identity, FileIdentity), identity
                    identities[mapping.file] = identity
        posture = self.measurer.answer(Ask(0, Kind.POSTURE))
        assert isinstance(posture, PostureReading)
        reference = from_host(
            created=1_700_000_000,
            host="host.test",
            posture=posture,
            files=[item for item in identities.values() if not any(part in item.path for part in without)],
            survey={},
            log=[],
        )
        self.use(reference)
        return reference

    def use(self, reference: Reference) -> None:
        self.appraiser = Appraiser(reference, Rules(allow_jit=self.allow_jit, protected=("/usr/",)))

    def verdicts(self, vm: str) -> list[Verdict]:
        """Guests, posture, files and process, read again while something has to be identified first."""
        for _ in range(ROUNDS):
            found = [
                self.appraiser.appraise(component, self.measurer.answer(Ask(0, component.kind, component.vm)))
                for component in (GUESTS, POSTURE, FILES, process_of(vm))
            ]
            wanted = frozenset().union(*(verdict.identify for verdict in found))
            if not wanted and not any(verdict.status is Status.PENDING for verdict in found):
                break
            for number in wanted:
                answer = self.measurer.answer(AskFile(0, number))
                self.appraiser.learn(number, answer)  # type: ignore[arg-type]
        return found

    def findings(self, vm: str) -> list[Finding]:
        return [finding for verdict in self.verdicts(vm) for finding in verdict.findings]

    def assert_good(self, vm: str) -> None:
        for verdict in self.verdicts(vm):
            assert verdict.status is Status.VERIFIED, f"{verdict.component}: {verdict}"

    def files(self) -> FilesReading:
        reading = self.measurer.answer(Ask(0, Kind.FILES))
        assert isinstance(reading, FilesReading)
        return reading

    def close(self) -> None:
        self.measurer.close()
