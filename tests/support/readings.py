"""Readings made by hand, for appraisal."""

from __future__ import annotations

from hostd.core.readings import (
    EXEC,
    READ,
    FileIdentity,
    FilesReading,
    Hypervisor,
    Mapping,
    PostureReading,
    ProcessReading,
    Segment,
)

VM = "11111111-2222-3333-4444-555555555555"
EXECUTABLE = "/usr/bin/q"


def posture(**changes: object) -> PostureReading:
    values: dict[str, object] = {
        "kernel": "6.1 #1",
        "command_line": "root=/dev/vda",
        "taint": 4096,
        "lockdown": "integrity",
        "modules": ("ahci", "kvm"),
        "modules_disabled": 0,
        "signature_enforced": True,
        "kexec_load_disabled": 1,
        "ptrace_scope": 1,
        "kprobes": (),
    }
    return PostureReading(**{**values, **changes})  # type: ignore[arg-type]


def segment(file: int, tag: bytes = b"t" * 16, *, offset: int = 0, length: int = 4096) -> Segment:
    return Segment(file, offset, length, tag)


def identity(file: int, path: str, sha256: bytes, *segments: Segment) -> FileIdentity:
    return FileIdentity(file, path, 1, file, 4096, sha256, segments or (segment(file),))


def files(*segments: Segment, **more: object) -> FilesReading:
    return FilesReading(segments, **more)  # type: ignore[arg-type]


def hypervisor(**changes: object) -> Hypervisor:
    values: dict[str, object] = {
        "pid": 812,
        "start_time": 4711,
        "uid": 64055,
        "vm": VM,
        "name": "web1",
        "cid": 7,
        "executable": EXECUTABLE,
        "accel": "kvm",
        "source": "libvirt",
    }
    return Hypervisor(**{**values, **changes})  # type: ignore[arg-type]


def mapping(file: int | None = 1, name: str = EXECUTABLE, **changes: int) -> Mapping:
    values = {"start": 0x10000, "end": 0x11000, "protection": READ | EXEC, "offset": 0, **changes}
    return Mapping(values["start"], values["end"], values["protection"], file, values["offset"], name)


VDSO = mapping(None, "[vdso]", start=0x7FFC0000, end=0x7FFC2000)


def process(*mappings: Mapping, **changes: object) -> ProcessReading:
    values: dict[str, object] = {
        "hypervisor": hypervisor(),
        "mappings": mappings or (mapping(), VDSO),
        "altered": (),
        "altered_total": 0,
    }
    return ProcessReading(**{**values, **changes})  # type: ignore[arg-type]
