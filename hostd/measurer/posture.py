"""What the running kernel allows and what hooks are in it, from /proc, /sys, bpf(2) and the CPUs.

What this kernel does not have is None (or empty); what it has and does not let us read is an error, so
that the two are never the same. Kernel probes, tracing, BPF and registers are the exception: what hides
them from us (lockdown, a missing capability) is None too, and the judge knows what could be read before.
Sources: Documentation/admin-guide/sysctl/kernel.rst, tainted-kernels.rst, kernel_lockdown(7).

Needs CAP_SYS_ADMIN for bpf(2), CAP_SYS_RAWIO and CAP_SYSLOG for the CPUs' registers, CAP_DAC_READ_SEARCH
for tracefs where it is not root's own; the rest is open to all.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from hostd.core.reading_posture import (
    MAX_MODULES,
    MAX_PARAMETERS,
    MAX_PROGRAMS,
    BpfProgram,
    PostureReading,
)
from hostd.measurer.posture_files import KeptFile, Parameters
from hostd.measurer.posture_files import PostureError as PostureError
from hostd.measurer.posture_hooks import Entries, probe_names, traced_names
from hostd.platform.bpf import Programs, TooManyProgramsError

MODULES: Final = ("kvm", "kvm_amd", "kvm_intel")
"""Modules whose parameters are read."""
_LOCKDOWN: Final = re.compile(r"\[([a-z]+)\]")
_TAINTS: Final = re.compile(r"\(([A-Z+-]+)\)$")


class PostureProbe:
    """Reads the posture below `root` (`/`, but for tests)."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._modules = KeptFile(root / "proc/modules", page=False)
        self._command_line = KeptFile(root / "proc/cmdline", page=False)
        self._taint = KeptFile(root / "proc/sys/kernel/tainted")
        self._lockdown_file = KeptFile(root / "sys/kernel/security/lockdown")
        self._enforce = KeptFile(root / "sys/module/module/parameters/sig_enforce")
        self._modules_disabled = KeptFile(root / "proc/sys/kernel/modules_disabled")
        self._kexec_load_disabled = KeptFile(root / "proc/sys/kernel/kexec_load_disabled")
        self._kexec_loaded = KeptFile(root / "sys/kernel/kexec_loaded")
        self._ptrace_scope = KeptFile(root / "proc/sys/kernel/yama/ptrace_scope")
        self._probes = KeptFile(root / "sys/kernel/debug/kprobes/list", page=False, optional=True)
        tracing = root / "sys/kernel/tracing"
        self._traced = KeptFile(tracing / "enabled_functions", page=False, optional=True)
        self._tracer = KeptFile(tracing / "current_tracer", optional=True)
        self._parameters = Parameters(root, MODULES, most=MAX_PARAMETERS)
        self._entries = Entries(root)
        self._programs = Programs()

    def read(self) -> PostureReading:
        """One reading.

        Raises:
            OSError: a file is there and cannot be read.
            PostureError: a file does not hold what it should.
        """
        uname = os.uname()
        modules = _modules(self._modules.text() or "")
        command_line = self._command_line.text()
        enforce = self._enforce.text()
        taint = self._taint.number()
        if taint is None or command_line is None:
            raise PostureError("the kernel does not tell its taint and command line")
        probes, traced, tracer = self._probes.text(), self._traced.text(), self._tracer.text()
        return PostureReading(
            kernel=f"{uname.release} {uname.version}"[:256],
            command_line=command_line.strip()[:4096],
            taint=taint,
            lockdown=self._lockdown(),
            modules=tuple(sorted(modules)),
            modules_disabled=self._modules_disabled.number(),
            signature_enforced=None if enforce is None else enforce.strip() == "Y",
            kexec_load_disabled=self._kexec_load_disabled.number(),
            ptrace_scope=self._ptrace_scope.number(),
            kprobes=None if probes is None else probe_names(probes),
            kexec_loaded=self._kexec_loaded.number(),
            module_taints=tuple(sorted((name, taint) for name, taint in modules.items() if taint)),
            traced=None if traced is None else traced_names(traced),
            tracer=None if tracer is None else tracer.strip()[:128],
            programs=self._loaded(),
            entries=self._entries.read(),
            parameters=self._parameters.read(),
        )

    def _lockdown(self) -> str:
        text = self._lockdown_file.text()
        if text is None:
            return ""
        match = _LOCKDOWN.search(text)
        if match is None:
            raise PostureError("/sys/kernel/security/lockdown: no mode in brackets")
        return match[1][:32]

    def _loaded(self) -> tuple[BpfProgram, ...] | None:
        try:
            programs = self._programs.read()
        except TooManyProgramsError as error:
            raise PostureError(str(error)) from error
        if programs is None:
            return None
        return tuple(BpfProgram(p.number, p.type, p.tag, p.name) for p in programs[:MAX_PROGRAMS])

    def close(self) -> None:
        for file in vars(self).values():
            if isinstance(file, KeptFile | Parameters | Entries):
                file.close()


def _modules(text: str) -> dict[str, str]:
    """Module → letters of the taints it brings (kernel/module/procfs.c, `m_show`)."""
    modules: dict[str, str] = {}
    lines = text.splitlines()
    if len(lines) > MAX_MODULES:
        raise PostureError(f"over {MAX_MODULES} modules")
    for line in lines:
        # `kvm 1204224 1 kvm_amd, Live 0xffffffffc0700000 (OE)`; a `+` or `-` says that it comes or goes.
        match = _TAINTS.search(line)
        letters = "" if match is None else match[1].strip("+-")
        modules[line.split(" ", 1)[0][:64]] = letters[:16]
    return modules
