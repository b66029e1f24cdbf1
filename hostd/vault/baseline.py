"""Capturing a host: everything the measurer can see now, gathered into proposed reference values.

Nothing comes into force here: officers review the document, sign it and install it. The steps run one
after the other on the measurer's connection; the whole has a bound in time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from guestlib.attest.imalog import MalformedLogError, parse_entries
from guestlib.errors import HostdError, UnavailableError
from hostd.core.appraise_boot import BootJudge
from hostd.core.findings import (
    BOOT,
    FILES,
    GUESTS,
    IMA,
    KERNEL,
    POSTURE,
    Component,
    domain_of,
    process_of,
)
from hostd.core.manifest import from_host
from hostd.core.reading_boot import BootReading
from hostd.core.reading_domain import DomainReading
from hostd.core.reading_kernel import KernelReading
from hostd.core.readings import (
    FileIdentity,
    FilesReading,
    GuestsReading,
    Hypervisor,
    ImaReading,
    Missing,
    PostureReading,
    Reading,
)
from hostd.core.reference import FORMAT, Reference, encode_reference
from hostd.core.rule_boot import BootRule, propose_boot
from hostd.core.rule_domain import propose_domain
from hostd.core.rule_kernel import propose_kernel
from hostd.platform.hostname import this_host
from hostd.vault.measuring import MAX_LOG_BYTES, MAX_PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hostd.config import Config
    from hostd.ipc.loop import Loop
    from hostd.vault.measuring import Measuring

CAPTURE_S: Final = 900.0
"""A survey of a whole system, emulated."""
KERNEL_AGAIN_S: Final = 1.0
"""Between two questions while the kernel is still being compared with its package's files."""


class Capture:
    """One capture; `told` is called once, with the document or the error."""

    def __init__(
        self,
        config: Config,
        measuring: Measuring,
        loop: Loop,
        told: Callable[[bytes | HostdError], None],
        *,
        base: Reference | None,
        pcrs: Mapping[int, bytes],
    ) -> None:
        """`base` is the document in force, which the new one follows; `pcrs` what the root key is sealed
        to."""
        self._base = base
        self._boot_judge = BootJudge(pcrs)
        self._boot: BootRule | None = None
        self._config = config
        self._measuring = measuring
        self._told = told
        self._done = False
        self._hypervisors: list[Hypervisor] = []
        self._posture: PostureReading | None = None
        self._domains: list[DomainReading] = []
        self._kernel: list[KernelReading] = []
        self._files: list[FileIdentity] = []
        self._to_identify: list[int] = []
        self._log = bytearray()
        self._surveyed: dict[str, bytes] = {}
        self._loop = loop
        self._waiting_for = ""
        self._timer = loop.call_after(
            CAPTURE_S, lambda: self._fail(f"the capture took too long{self._waiting_for}")
        )

    def start(self) -> None:
        self._read(GUESTS, self._on_guests)

    def _read(
        self, component: Component, told: Callable[[Reading], None], *, position: int = 0, part: int = 0
    ) -> None:
        """Asks for the next reading, unless the capture is over. (Without a measurer every answer would come
        at once: a step inside a step, as deep as there are machines.)"""
        if not self._over():
            self._measuring.read(component, position, told, part=part)

    def _over(self) -> bool:
        if not self._measuring.ready:
            self._fail("the measurer was lost")
        return self._done

    def _fail(self, reason: str) -> None:
        if not self._done:
            self._done = True
            self._timer.cancel()
            self._told(UnavailableError(f"no manifest: {reason}"))

    def _on_guests(self, reading: Reading) -> None:
        if not isinstance(reading, GuestsReading):
            self._fail("the hypervisor processes cannot be found")
            return
        if reading.unknown:
            self._fail(f"unknown processes hold vsock devices: {'; '.join(reading.unknown)}")
            return
        self._hypervisors = [h for h in reading.hypervisors if h.vm]
        self._processes(list(self._hypervisors))

    def _processes(self, left: list[Hypervisor]) -> None:
        """Reads each hypervisor process, so that the measurer knows every file one has mapped."""
        if not left:
            self._read(FILES, self._on_files)
            return
        vm = left.pop().vm

        def on_domain(reading: Reading) -> None:
            if isinstance(reading, DomainReading):
                self._domains.append(reading)
            self._processes(left)

        self._read(process_of(vm), lambda _reading: self._read(domain_of(vm), on_domain))

    def _on_files(self, reading: Reading) -> None:
        if isinstance(reading, FilesReading):
            self._to_identify = sorted({s.file for s in reading.segments})
        self._identify()

    def _identify(self) -> None:
        if not self._to_identify:
            self._read(POSTURE, self._on_posture)
        elif not self._over():
            self._measuring.identify(self._to_identify.pop(), self._on_identity)

    def _on_identity(self, reading: Reading) -> None:
        if isinstance(reading, FileIdentity):
            self._files.append(reading)
        self._identify()

    def _on_posture(self, reading: Reading) -> None:
        if not isinstance(reading, PostureReading):
            self._fail("the kernel's posture cannot be read")
            return
        self._posture = reading
        self._read(BOOT, self._on_boot)

    def _on_boot(self, reading: Reading) -> None:
        """A boot log that does not replay to what the TPM quotes gives no reference values."""
        if isinstance(reading, BootReading):
            self._boot_judge.appraise(BOOT, reading, Reference(FORMAT, 1, 0, "capture"))
            log, values = self._boot_judge.log, self._boot_judge.values
            if log is not None and values:
                self._boot = propose_boot(values, log.events)
        self._read_kernel()

    def _read_kernel(self) -> None:
        self._read(KERNEL, self._on_kernel)

    def _on_kernel(self, reading: Reading) -> None:
        if isinstance(reading, KernelReading):
            if reading.part != len(self._kernel):
                self._fail("the kernel changed while it was read")
                return
            self._kernel.append(reading)
            if reading.part + 1 < min(reading.parts, MAX_PARTS):
                self._read(KERNEL, self._on_kernel, part=reading.part + 1)
                return
        elif not isinstance(reading, Missing):
            self._fail("the kernel cannot be read")
            return
        elif not reading.absent:
            # It is being compared with its package's files, which takes seconds after a start.
            self._kernel.clear()
            self._waiting_for = f": {reading.reason}"
            self._loop.call_after(KERNEL_AGAIN_S, self._read_kernel)
            return
        self._read(IMA, self._on_ima)

    def _on_ima(self, reading: Reading) -> None:
        if isinstance(reading, ImaReading):
            self._log += reading.data
            if len(self._log) > MAX_LOG_BYTES:
                self._fail(f"the IMA log is over {MAX_LOG_BYTES} bytes")
                return
            if reading.more:
                self._read(IMA, self._on_ima, position=len(self._log))
                return
        elif not (isinstance(reading, Missing) and reading.absent):
            self._fail("the IMA log cannot be read")
            return
        if not self._over():
            self._measuring.survey(self._config.measure.survey, self._on_survey)

    def _on_survey(self, files: dict[str, bytes] | None) -> None:
        if files is None or self._posture is None:
            self._fail("the measurer was lost")
            return
        if self._done:
            return
        self._done = True
        self._timer.cancel()
        try:
            reference = from_host(
                created=int(time.time()),
                host=this_host(),
                posture=self._posture,
                files=self._files,
                survey=files,
                log=parse_entries(bytes(self._log)),
                base=self._base,
                boot=self._boot,
                kernel=propose_kernel(self._kernel) if self._kernel else None,
                # Machines that run and of which libvirt says nothing give no rule.
                domain=(
                    propose_domain(self._domains, self._config.hypervisor.binaries)
                    if self._domains or not self._hypervisors
                    else None
                ),
            )
        except (ValueError, MalformedLogError) as error:
            self._told(UnavailableError(f"no manifest: {error}"))
            return
        self._told(encode_reference(reference))
