"""Codes of findings. Short, bounded and append-only: they label metrics, and a ledger keeps them for ever."""

from __future__ import annotations

import enum


class Code(enum.StrEnum):
    HOLDER_UNKNOWN = "holder-unknown"
    """A process that is no known hypervisor holds /dev/vhost-vsock and could be a guest on it."""
    IDENTITY_CHANGED = "identity-changed"
    """One and the same process is another VM, has another CID or user than when it was first seen."""

    CODE_ALTERED = "code-altered"
    """A page of code or constants in a process is not the page of the file it maps."""
    MAPPING_ANONYMOUS_EXEC = "mapping-anonymous-exec"
    """Executable memory that belongs to no file."""
    MAPPING_WRITABLE_EXEC = "mapping-writable-exec"
    """Memory that is writable and executable at once."""
    MAPPING_WRITABLE_CODE = "mapping-writable-code"
    """Code or constants of a file, made writable."""

    FILE_UNKNOWN = "file-unknown"
    """A process maps a file as code that has no reference value."""
    FILE_UNAPPROVED = "file-unapproved"
    """A process maps a file whose digest is none of the reference values of its path."""
    FILE_UNREADABLE = "file-unreadable"
    """A process maps something as code that cannot be measured (a device, a file over the bound)."""
    FILE_ALTERED = "file-altered"
    """The content of a mapped file is not what it was when it was identified."""

    IMA_UNKNOWN = "ima-unknown"
    """The kernel measured a protected file with a digest that is no reference value."""
    IMA_VIOLATION = "ima-violation"
    """A protected file was open for writing while it was measured: what ran is not known."""
    IMA_LOG_MISMATCH = "ima-log-mismatch"
    """The log that was read after a quote does not replay to the PCR 10 in it."""
    DRIFT_ROW_MISSING = "drift-row-missing"
    """The ledger has a drift that nobody cleared, and the store does not know it any more."""
    PCR_CHANGED = "pcr-changed"
    """A PCR that the root key is sealed to has another value in a quote."""
    IMA_MALFORMED = "ima-malformed"
    """The measurement log is not one, or has a template that cannot be judged."""

    POSTURE_KERNEL = "posture-kernel"
    POSTURE_COMMAND_LINE = "posture-command-line"
    POSTURE_TAINT = "posture-taint"
    """A taint that the baseline did not have."""
    POSTURE_LOCKDOWN = "posture-lockdown"
    POSTURE_MODULE = "posture-module"
    """A kernel module that the baseline did not have."""
    POSTURE_MODULES_DISABLED = "posture-modules-disabled"
    POSTURE_SIGNATURE = "posture-signature"
    """Modules without a signature are accepted, which the baseline did not."""
    POSTURE_KEXEC = "posture-kexec"
    POSTURE_PTRACE = "posture-ptrace"
    POSTURE_KPROBES = "posture-kprobes"
    """More kernel probes than in the baseline, or they cannot be listed any more."""
