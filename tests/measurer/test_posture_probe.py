"""The posture probe: hooks, programs, registers and parameters, on files as the kernel prints them."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.core.reading_posture import MAX_HOOKS, EntryPoint
from hostd.measurer.posture import PostureProbe
from hostd.measurer.posture_files import KeptFile, Parameters, PostureError
from hostd.measurer.posture_hooks import CPUS_PER_READING, REGISTERS, Entries, probe_names, traced_names
from hostd.platform.bpf import Programs

PROBES = """\
ffffffffc0a1b2c0  k  svm_vcpu_run+0x0  kvm_amd [FTRACE]
ffffffff81c0d6a0  r  inet_csk_accept+0x0    [DISABLED][OPTIMIZED]
ffffffff81c0d6a0  k  do_sys_open+0x4
"""
TRACED = """\
svm_vcpu_run [kvm_amd] (1) R   I     M \ttramp: 0xffffffffc0b01000 (ftrace_regs_caller+0x0/0x65) ->arm
\tdirect-->bpf_trampoline_6442536467+0x0/0x1000
do_sys_openat2 (2)  \ttramp: 0xffffffffc0b01000
"""


def test_probe_names() -> None:
    assert probe_names(PROBES) == (
        "kprobe at do_sys_open+0x4",
        "kprobe at svm_vcpu_run+0x0 [kvm_amd]",
        "kretprobe at inet_csk_accept+0x0",
    )
    assert probe_names("") == ()
    assert probe_names("what is this\n") == ("what is this",)


def test_traced_names() -> None:
    assert traced_names(TRACED) == ("do_sys_openat2", "svm_vcpu_run [kvm_amd]")
    assert traced_names("") == ()


@pytest.mark.parametrize("names", [probe_names, traced_names])
def test_names_are_bounded(names: object) -> None:
    assert callable(names)
    text = "".join(f"ffff{n:04d}  k  f{n:04d}+0x0\n" for n in range(MAX_HOOKS + 9))
    found = names(text)
    assert len(found) == MAX_HOOKS + 1
    assert found[-1] == "9 more"


@given(st.text(max_size=200))
def test_no_line_is_lost(line: str) -> None:
    """Whatever the kernel prints has a name: nothing that hangs in the kernel is passed over."""
    for text in (line, f"ffff  k  f+0x0\n{line}"):
        assert bool(probe_names(text)) == bool(text.splitlines())
        assert all(len(name) <= 256 for name in (*probe_names(text), *traced_names(text)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, text in {
        "proc/cmdline": "root=/dev/vda rw\n",
        "proc/modules": "kvm 1 1 kvm_amd, Live 0x0\nevil 1 0 - Live 0x0 (OE)\nold 1 0 - Loading 0x0 (E+)\n",
        "proc/sys/kernel/tainted": "12288\n",
        "sys/kernel/kexec_loaded": "1\n",
        "sys/kernel/debug/kprobes/list": PROBES,
        "sys/kernel/tracing/enabled_functions": TRACED,
        "sys/kernel/tracing/current_tracer": "nop\n",
        "sys/module/kvm/parameters/tdp_mmu": "Y\n",
        "sys/module/kvm_intel/parameters/nested": "1\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_hooks_and_parameters(root: Path) -> None:
    probe = PostureProbe(root)
    reading = probe.read()
    assert reading.module_taints == (("evil", "OE"), ("old", "E"))
    assert reading.kexec_loaded == 1
    assert reading.kprobes == probe_names(PROBES)
    assert reading.traced == traced_names(TRACED)
    assert reading.tracer == "nop"
    assert reading.parameters == (("kvm.tdp_mmu", "Y"), ("kvm_intel.nested", "1"))
    assert reading.entries is None
    probe.close()


def test_what_changes_is_seen(root: Path) -> None:
    probe = PostureProbe(root)
    probe.read()
    for path, text in (
        ("sys/kernel/debug/kprobes/list", ""),
        ("sys/kernel/tracing/current_tracer", "function\n"),
        ("sys/module/kvm/parameters/tdp_mmu", "N\n"),
    ):
        (root / path).write_text(text)
    after = probe.read()
    assert (after.kprobes, after.tracer) == ((), "function")
    assert ("kvm.tdp_mmu", "N") in after.parameters


def test_module_that_is_loaded_later(root: Path) -> None:
    probe = PostureProbe(root)
    assert not any(name.startswith("kvm_amd") for name, _ in probe.read().parameters)
    (root / "sys/module/kvm_amd/parameters").mkdir(parents=True)
    (root / "sys/module/kvm_amd/parameters/npt").write_text("Y\n")
    (root / "sys/module/kvm_amd/parameters/secret").write_text("Y\n")
    (root / "sys/module/kvm_amd/parameters/secret").chmod(0o200)
    assert ("kvm_amd.npt", "Y") in probe.read().parameters
    assert not any("secret" in name for name, _ in probe.read().parameters)


def test_too_many_parameters(root: Path) -> None:
    with pytest.raises(PostureError):
        Parameters(root, ("kvm", "kvm_intel"), most=1).read()


def test_file_that_comes_and_grows(tmp_path: Path) -> None:
    file = KeptFile(tmp_path / "f", page=False)
    assert file.read() is None
    (tmp_path / "f").write_bytes(b"a" * 200_000)
    assert file.read() == b"a" * 200_000
    (tmp_path / "f").write_bytes(b"b" * (2 << 20))
    with pytest.raises(PostureError):
        file.read()
    file.close()


SYMBOLS = """\
ffffffff96000080 T entry_SYSCALL_64
ffffffff960000a9 T entry_SYSCALL_64_safe_stack
ffffffff96001870 T entry_SYSCALL_compat
ffffffff960017b0 T entry_SYSENTER_compat
ffffffff96001999 t something_else
"""
VALUES = {"LSTAR": 0xFFFFFFFF96000080, "CSTAR": 0xFFFFFFFF96001870, "SYSENTER_EIP": 0xFFFFFFFF96001999}


def registers(root: Path, cpu: int) -> None:
    path = root / f"dev/cpu/{cpu}/msr"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def pread(_fd: int, size: int, offset: int) -> bytes:
    """As the kernel's device: the offset is the register's number, so values do not overlap."""
    (value,) = (VALUES[name] for name, number in REGISTERS.items() if number == offset)
    return value.to_bytes(size, "little")


def test_entries(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/kallsyms").write_text(SYMBOLS)
    for cpu in range(6):
        registers(tmp_path, cpu)
    entries = Entries(tmp_path, pread)
    first = entries.read()
    assert first is not None
    assert first[:3] == (
        EntryPoint(0, "LSTAR", "entry_SYSCALL_64"),
        EntryPoint(0, "CSTAR", "entry_SYSCALL_compat"),
        EntryPoint(0, "SYSENTER_EIP", "0xffffffff96001999"),
    )
    second, third = entries.read() or (), entries.read() or ()
    assert [sorted({item.cpu for item in part}) for part in (first, second, third)] == [
        list(range(CPUS_PER_READING)), [4, 5], list(range(CPUS_PER_READING)),
    ]  # fmt: skip
    entries.close()


def test_cpu_that_is_switched_off(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/kallsyms").write_text(SYMBOLS)
    registers(tmp_path, 0)
    (tmp_path / "dev/cpu/1").mkdir()
    assert {item.cpu for item in Entries(tmp_path, pread).read() or ()} == {0}


@pytest.mark.parametrize("text", ["", "0000000000000000 T entry_SYSCALL_64\n"])
def test_hidden_symbols(tmp_path: Path, text: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/kallsyms").write_text(text)
    registers(tmp_path, 0)
    assert Entries(tmp_path, pread).read() is None


def test_hidden_registers(tmp_path: Path) -> None:
    def refused(_fd: int, _size: int, _offset: int) -> bytes:
        raise PermissionError(errno.EPERM, "refused")

    def broken(_fd: int, _size: int, _offset: int) -> bytes:
        raise OSError(errno.EIO, "no such register")

    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/kallsyms").write_text(SYMBOLS)
    registers(tmp_path, 0)
    assert Entries(tmp_path, refused).read() is None
    with pytest.raises(OSError, match="no such register"):
        Entries(tmp_path, broken).read()


def test_no_registers(tmp_path: Path) -> None:
    assert Entries(tmp_path, pread).read() is None


INSTRUCTIONS = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
"""r0 = 0; exit."""
SOCKET_FILTER = 1


def load_program(value: int = 0) -> int:
    """A descriptor of a program that returns `value` and is attached to nothing.

    Raises:
        OSError: this kernel or container does not let us.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(INSTRUCTIONS[:4] + struct.pack("<i", value) + INSTRUCTIONS[8:])
    licence = ctypes.create_string_buffer(b"GPL")
    addresses = ctypes.addressof(code), ctypes.addressof(licence)
    body = struct.pack("<IIQQIIQII16s", SOCKET_FILTER, 2, *addresses, 0, 0, 0, 0, 0, b"hostd_test")
    attributes = ctypes.create_string_buffer(body, 128)
    fd = libc.syscall(321, 5, attributes, 128)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "bpf(2)")
    return int(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="bpf(2) lists programs to root only")
def test_program_that_is_loaded_and_gone() -> None:
    programs = Programs()
    before = programs.read()
    if before is None:
        pytest.skip("this kernel does not let us use bpf(2)")
    try:
        fds = [load_program(0), load_program(1)]
    except OSError as error:
        pytest.skip(f"no program can be loaded: {error}")
    numbers = {p.number for p in before}
    loaded = [p for p in programs.read() or () if p.number not in numbers and p.name == "hostd_test"]
    assert [p.type for p in loaded] == [SOCKET_FILTER] * 2
    assert loaded[0].tag != loaded[1].tag
    # The tag is the start of the instructions' digest (kernel/bpf/core.c, bpf_prog_calc_tag); SHA-256
    # since Linux 6.18, SHA-1 before.
    assert loaded[0].tag in {hash_(INSTRUCTIONS).digest()[:8] for hash_ in (hashlib.sha1, hashlib.sha256)}
    assert [p for p in programs.read() or () if p.name == "hostd_test"] == loaded
    for fd in fds:
        os.close(fd)
    deadline = time.monotonic() + 10  # freed after a grace period
    while any(p in loaded for p in programs.read() or ()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cost(root: Path) -> None:
    probe = PostureProbe()
    probe.read()
    began = time.perf_counter()
    for _ in range(50):
        probe.read()
    cost = (time.perf_counter() - began) / 50
    print(f"posture: {cost * 1e3:.3f} ms")
    assert cost < 0.01
