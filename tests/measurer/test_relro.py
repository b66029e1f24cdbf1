"""Relocated data of a live QEMU: attacks, each found by the next reading and named; innocent twins."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostd.core.appraise_relro import RelroJudge
from hostd.core.codes import Code
from hostd.core.findings import Kind, Severity, Status, Verdict, relro_of
from hostd.core.reading_relro import RelroReading
from hostd.core.readings import EXEC, READ, Missing
from hostd.ipc.measuring import Ask
from hostd.measurer.linking import Module, parse_module
from tests.support import qemu, tamper

if TYPE_CHECKING:
    from tests.support.watched import Watched

pytestmark = pytest.mark.qemu
LIBC = Path(os.path.realpath("/lib/x86_64-linux-gnu/libc.so.6"))
LAZY = Path(os.path.realpath("/lib/x86_64-linux-gnu/libz.so.1"))
ROUNDS = 200


def parsed(path: Path) -> Module:
    module = parse_module(memoryview(path.read_bytes()), 1, str(path), bytes(32))
    assert module is not None
    return module


def base_of(pid: int, name: str) -> int:
    return next(vma.start for vma in tamper.maps(pid) if name in vma.name and vma.offset == 0)


def slot(module: Module, name: str, *, loose: bool = False) -> int:
    items = module.relocated.loose if loose else module.relocated.named
    return next(
        item.address
        for item in items
        if item.type and module.symbols.wanted(item.symbol).name == name.encode()
    )


def word(pid: int, address: int) -> int:
    return int.from_bytes(tamper.read(pid, address, 8), "little")


def write_word(pid: int, address: int, value: int) -> None:
    tamper.write(pid, address, value.to_bytes(8, "little"))


def reading(watched: Watched, vm: qemu.Vm) -> RelroReading:
    for _ in range(ROUNDS):
        answer = watched.measurer.answer(Ask(0, Kind.RELRO, vm.uuid))
        if isinstance(answer, RelroReading):
            return answer
        assert isinstance(answer, Missing)
        assert not answer.absent, answer
        time.sleep(0.002)
    raise AssertionError(answer)


def verdict(watched: Watched, vm: qemu.Vm) -> Verdict:
    return RelroJudge().appraise(relro_of(vm.uuid), reading(watched, vm), watched.appraiser.reference)


def assert_good(watched: Watched, vm: qemu.Vm) -> None:
    found = verdict(watched, vm)
    assert found.status is Status.VERIFIED, found


def start(watched: Watched, vm: qemu.Vm) -> None:
    watched.approve()
    assert_good(watched, vm)


def command(control: str, *commands: str) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(control)
        stream = s.makefile("rwb")
        stream.readline()
        for name in ("qmp_capabilities", *commands):
            stream.write(json.dumps({"execute": name}).encode())
            stream.flush()
            while b'"return"' not in stream.readline():
                pass


def test_untouched_is_good(watched: Watched, vm: qemu.Vm) -> None:
    start(watched, vm)
    for _ in range(5):
        assert_good(watched, vm)
    claims = dict(verdict(watched, vm).claims)
    assert int(claims["files"]) > 40
    assert int(claims["words"]) > 300_000
    assert 0 < int(claims["pinned"]) < 2000
    assert claims["interposed"] == claims["uncovered"] == "0"


def test_got_hook_is_named(watched: Watched, vm: qemu.Vm, binary: Path) -> None:
    start(watched, vm)
    address = base_of(vm.pid, binary.name) + slot(parsed(binary), "writev")
    right = word(vm.pid, address)
    code = tamper.inject_anonymous_code(vm.pid)
    write_word(vm.pid, address, code)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.GOT_ALTERED
    assert finding.component == f"relro:{vm.uuid}"
    assert binary.name in finding.subject
    assert f"pid {vm.pid}" in finding.subject
    assert "writev@GLIBC_2.2.5" in finding.where
    assert "R_X86_64_JUMP_SLOT" in finding.where
    assert f"address {address:#x}" in finding.where
    assert finding.expected.startswith(f"{right:#x} (")
    assert "writev+0x0 in libc.so.6" in finding.expected
    assert finding.seen == f"{code:#x} (executable memory of no loaded file)"
    # The next reading still says so; the right value is good again.
    assert verdict(watched, vm).status is Status.DRIFTED
    write_word(vm.pid, address, right)
    assert_good(watched, vm)


def test_hook_before_first_sight(watched: Watched, vm: qemu.Vm, binary: Path) -> None:
    watched.approve()
    address = base_of(vm.pid, binary.name) + slot(parsed(binary), "writev")
    write_word(vm.pid, address, base_of(vm.pid, "libc.so") + 0x40000)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.GOT_ALTERED
    assert "writev@" in finding.where


def test_resolver_hook_before_first_sight(watched: Watched, vm: qemu.Vm, binary: Path) -> None:
    """A slot whose value a resolver chose must agree with the other slots of the same resolver."""
    watched.approve()
    address = base_of(vm.pid, binary.name) + slot(parsed(binary), "memcpy")
    write_word(vm.pid, address, word(vm.pid, address) + 16)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.GOT_ALTERED
    assert "memcpy@" in finding.where


def test_resolver_hook_out_of_its_file(watched: Watched, vm: qemu.Vm, binary: Path) -> None:
    start(watched, vm)
    address = base_of(vm.pid, binary.name) + slot(parsed(binary), "memcpy")
    write_word(vm.pid, address, base_of(vm.pid, "libglib") + 0x30000)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.GOT_ALTERED
    assert "memcpy@" in finding.where


def test_word_of_a_vtable(watched: Watched, vm: qemu.Vm) -> None:
    start(watched, vm)
    module = parsed(LIBC)
    # The C library's stdio vtables.
    address = base_of(vm.pid, "libc.so") + module.image.relro[0] + 0x110 + 8 * 5
    write_word(vm.pid, address, word(vm.pid, address) + 1)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.RELRO_ALTERED
    assert "libc.so.6" in finding.subject
    assert f"address {address:#x}" in finding.where
    assert finding.expected != finding.seen


def test_word_of_constants_with_pointers(watched: Watched, vm: qemu.Vm, binary: Path) -> None:
    start(watched, vm)
    module = parsed(binary)
    address = base_of(vm.pid, binary.name) + module.image.relro[0] + 0x20000
    write_word(vm.pid, address, word(vm.pid, address) ^ 0xFF00)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.RELRO_ALTERED
    assert binary.name in finding.subject


def test_same_value_is_innocent(watched: Watched, vm: qemu.Vm, binary: Path) -> None:
    start(watched, vm)
    address = base_of(vm.pid, binary.name) + slot(parsed(binary), "writev")
    write_word(vm.pid, address, word(vm.pid, address))
    assert_good(watched, vm)


def lazy_slot(pid: int) -> tuple[int, int, int, str]:
    """Address of a slot that is not bound yet, its stub, its symbol's address, and the symbol's name."""
    module, libc = parsed(LAZY), parsed(LIBC)
    base = base_of(pid, LAZY.name)
    for item, stub in zip(module.relocated.loose, module.relocated.loose_words, strict=True):
        if item.type != 7 or word(pid, base + item.address) != base + stub:
            continue
        wanted = module.symbols.wanted(item.symbol)
        from hostd.measurer.elf_symbols import STT_IFUNC, gnu_hash

        index = libc.symbols.find(wanted, gnu_hash(wanted.name), slot=True)
        if index is not None and libc.symbols.symbol(index).type != STT_IFUNC:
            address = base_of(pid, "libc.so") + libc.symbols.symbol(index).value
            return base + item.address, base + stub, address, wanted.name.decode()
    raise AssertionError("no slot is unbound")


def test_lazily_bound_slot(watched: Watched, vm: qemu.Vm) -> None:
    start(watched, vm)
    address, stub, right, name = lazy_slot(vm.pid)
    # Bound later: innocent, and back.
    write_word(vm.pid, address, right)
    assert_good(watched, vm)
    write_word(vm.pid, address, stub)
    assert_good(watched, vm)
    write_word(vm.pid, address, right + 4)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.GOT_ALTERED
    assert f"{name}@" in finding.where
    assert LAZY.name in finding.subject
    assert f"{right:#x}" in finding.expected
    assert f" or {stub:#x}" in finding.expected
    assert finding.seen.startswith(f"{right + 4:#x} ({name}+0x4 in libc")


def test_what_the_linker_keeps_is_pinned(watched: Watched, vm: qemu.Vm) -> None:
    start(watched, vm)
    linker = parsed(Path(os.path.realpath("/lib64/ld-linux-x86-64.so.2")))
    base = base_of(vm.pid, "ld-linux")
    symbols = [linker.symbols.symbol(index) for index in range(linker.symbols.count)]
    start_ = next(symbol.value for symbol in symbols if symbol.name == b"_dl_argv")
    address = base + start_
    before = word(vm.pid, address)
    write_word(vm.pid, address, before + 8)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.RELRO_PINNED_CHANGED
    assert "_dl_argv" in finding.where
    assert f"{before:#x}" in finding.expected
    write_word(vm.pid, address, before)
    assert_good(watched, vm)
    # To other code than its own it is no word to pin at all.
    write_word(vm.pid, address, base_of(vm.pid, "libc.so") + 0x40000)
    assert verdict(watched, vm).findings


def test_what_is_seen_while_the_linker_works_is_not_pinned(
    watched: Watched, vm: qemu.Vm, binary: Path
) -> None:
    """A machine that is read as it starts: words of the linker's own come to be while they are writable."""
    start(watched, vm)
    linker = parsed(Path(os.path.realpath("/lib64/ld-linux-x86-64.so.2")))
    low, high = linker.image.relro
    symbols = [linker.symbols.symbol(index) for index in range(linker.symbols.count)]
    value = next(symbol.value for symbol in symbols if symbol.name == b"_dl_argv")
    with qemu.running(binary, name="starts") as other:
        base = base_of(other.pid, "ld-linux")
        page, length = (base + low) // 4096 * 4096, (high - low) // 4096 * 4096
        tamper.syscall(other.pid, tamper.SYS_MPROTECT, page, length, mmap.PROT_READ | mmap.PROT_WRITE)
        final = word(other.pid, base + value)
        write_word(other.pid, base + value, 0)
        said = set()
        for _ in range(ROUNDS):
            answer = watched.measurer.answer(Ask(0, Kind.RELRO, other.uuid))
            assert isinstance(answer, Missing)
            said.add(answer.reason)
            if "the dynamic linker has not protected everything yet" in said:
                break
            time.sleep(0.002)
        else:
            raise AssertionError(said)
        write_word(other.pid, base + value, final)
        tamper.syscall(other.pid, tamper.SYS_MPROTECT, page, length, mmap.PROT_READ)
        assert_good(watched, other)


def test_a_word_that_was_as_in_the_file_is_not_pinned_later(watched: Watched, vm: qemu.Vm) -> None:
    start(watched, vm)
    linker = parsed(Path(os.path.realpath("/lib64/ld-linux-x86-64.so.2")))
    base = base_of(vm.pid, "ld-linux")
    relocated = linker.relocated
    content = relocated.expected(0)
    own = next(
        relocated.start + at
        for at in range(0, relocated.size, 8)
        if relocated.is_plain(relocated.start + at)
        and tamper.read(vm.pid, base + relocated.start + at, 8) == content[at : at + 8]
    )
    write_word(vm.pid, base + own, 0x1234)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.RELRO_PINNED_CHANGED


def test_made_writable(watched: Watched, vm: qemu.Vm) -> None:
    start(watched, vm)
    module = parsed(LIBC)
    low, high = module.image.relro
    page = (base_of(vm.pid, "libc.so") + low) // 4096 * 4096
    length = (high - low) // 4096 * 4096
    tamper.syscall(vm.pid, tamper.SYS_MPROTECT, page, length, mmap.PROT_READ | mmap.PROT_WRITE)
    (finding,) = verdict(watched, vm).findings
    assert finding.code == Code.RELRO_WRITABLE
    assert "libc.so" in finding.subject
    tamper.syscall(vm.pid, tamper.SYS_MPROTECT, page, length, mmap.PROT_READ)
    assert_good(watched, vm)


def test_many_words_are_bounded(watched: Watched, vm: qemu.Vm, binary: Path) -> None:
    start(watched, vm)
    low, _ = parsed(binary).image.relro
    tamper.write(vm.pid, base_of(vm.pid, binary.name) + low + 0x1000, b"\xa5" * 0x8000)
    answer = reading(watched, vm)
    assert answer.altered_total == 0x1000
    assert len(answer.altered) == 64
    found = verdict(watched, vm)
    assert found.status is Status.DRIFTED
    assert len(found.findings) <= 64


def test_machine_at_work_is_unchanged(watched: Watched, binary: Path, tmp_path: Path) -> None:
    control = str(tmp_path / "more")
    extra = ("-qmp", f"unix:{control},server=on,wait=off", "-m", "64")
    with qemu.running(binary, *extra, name="works") as vm:
        start(watched, vm)
        before = reading(watched, vm)
        command(control, "query-status", "cont", "stop", "system_reset", "query-block", "cont", "stop")
        assert_good(watched, vm)
        after = reading(watched, vm)
        assert [item.sha256 for item in after.files] == [item.sha256 for item in before.files]


@pytest.fixture
def interposer(tmp_path: Path) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "interposer.c"
    source.write_text("int getpagesize(void) { return 4096; }\nint sched_yield(void) { return 0; }\n")
    library = tmp_path / "libinterposer.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def test_preloaded_library_is_computed_with(watched: Watched, binary: Path, interposer: Path) -> None:
    """That it is there at all is for `process` to find: the slots that lead to it are as they should be."""
    with qemu.running(binary, env={"LD_PRELOAD": str(interposer)}) as vm:
        watched.approve()
        answer = reading(watched, vm)
        assert answer.altered_total == 0, answer.altered
        assert any(item.path == str(interposer) for item in answer.files)
        assert answer.interposed > 0
        assert_good(watched, vm)
        watched.approve("libinterposer")
        found = verdict(watched, vm)
        assert (found.status, dict(found.claims)["unapproved"]) == (Status.PENDING, "1")
        assert not found.findings


def test_starting_process_is_never_judged_too_early(watched: Watched, binary: Path) -> None:
    with qemu.running(binary) as approved:
        start(watched, approved)
    early = 0
    for _ in range(3):
        name = str(uuid.uuid4())
        process = subprocess.Popen(
            [str(binary), "-accel", "tcg", "-machine", "none", "-S", "-display", "none", "-nodefaults",
             "-uuid", name],
            env={**os.environ, "QEMU_MODULE_DIR": qemu.MODULES},
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        vm = qemu.Vm(process, name, "early")
        try:
            until = time.monotonic() + 20
            while time.monotonic() < until:
                answer = watched.measurer.answer(Ask(0, Kind.RELRO, vm.uuid))
                if isinstance(answer, RelroReading):
                    assert answer.altered_total == 0, answer.altered
                    if len(answer.files) > 50:
                        break
                else:
                    early += 1
            assert_good(watched, vm)
        finally:
            vm.kill()
    assert early


def test_process_ends_while_it_is_read(watched: Watched, binary: Path) -> None:
    vm = qemu.start(binary)
    try:
        start(watched, vm)
        vm.process.kill()
        for _ in range(20):
            answer = watched.measurer.answer(Ask(0, Kind.RELRO, vm.uuid))
            assert isinstance(answer, RelroReading | Missing)
            if isinstance(answer, RelroReading):
                assert answer.altered_total == 0
        vm.process.wait()
        answer = watched.measurer.answer(Ask(0, Kind.RELRO, vm.uuid))
        assert isinstance(answer, Missing)
        assert not answer.absent
    finally:
        vm.kill()


def test_other_vm_is_pending(watched: Watched, vm: qemu.Vm) -> None:
    start(watched, vm)
    other = relro_of("00000000-0000-0000-0000-000000000001")
    answer = reading(watched, vm)
    assert RelroJudge().appraise(other, answer, watched.appraiser.reference).status is Status.PENDING
    assert isinstance(watched.measurer.answer(Ask(0, Kind.RELRO, other.vm)), Missing)


def test_code_mapped_otherwise_than_linked(watched: Watched, vm: qemu.Vm) -> None:
    """A library mapped by hand has no recomputation: not silently left out."""
    start(watched, vm)
    tamper.map_file(vm.pid, LAZY, READ | EXEC)
    found = verdict(watched, vm)
    assert found.status is Status.PENDING
    (finding,) = found.findings
    assert (finding.code, finding.severity) == (Code.RELRO_UNCOVERED, Severity.WARNING)
    assert LAZY.name in finding.seen


def test_file_changed_under_the_measurer(watched: Watched, vm: qemu.Vm) -> None:
    """What was recomputed is only worth what its bytes' digest is."""
    start(watched, vm)
    answer = reading(watched, vm)
    import msgspec

    files = (msgspec.structs.replace(answer.files[0], sha256=bytes(32)), *answer.files[1:])
    found = RelroJudge().appraise(
        relro_of(vm.uuid), msgspec.structs.replace(answer, files=files), watched.appraiser.reference
    )
    assert [finding.code for finding in found.findings] == [Code.RELRO_SOURCE]


def test_parsed_files_are_given_back(watched: Watched, vm: qemu.Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    from hostd.measurer import relro_modules

    start(watched, vm)
    monkeypatch.setattr(relro_modules, "KEEP_S", -1.0)
    watched.measurer.answer(Ask(0, Kind.GUESTS))
    assert not watched.measurer._relro._modules._modules
    assert_good(watched, vm)
    address = base_of(vm.pid, "libc.so") + parsed(LIBC).image.relro[0] + 0x110 + 8 * 5
    write_word(vm.pid, address, 1)
    assert verdict(watched, vm).status is Status.DRIFTED


def test_reading_has_one_form_on_the_wire(watched: Watched, vm: qemu.Vm) -> None:
    import msgspec

    start(watched, vm)
    answer = reading(watched, vm)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=RelroReading) == answer


def test_library_opened_later(watched: Watched, vm: qemu.Vm, interposer: Path) -> None:
    if shutil.which("gdb") is None:
        pytest.skip("needs gdb")
    start(watched, vm)
    call = f'print ((void*(*)(const char*,int))dlopen)("{interposer}",2)'
    subprocess.run(
        ["gdb", "-p", str(vm.pid), "-batch", "-nx", "-ex", call],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert any(interposer.name in vma.name for vma in tamper.maps(vm.pid))
    found = verdict(watched, vm)
    assert found.status is Status.PENDING, found
    assert not found.findings
    assert dict(found.claims)["unapproved"] == "1"
