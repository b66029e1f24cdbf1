"""Secret memory, looked at from outside."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import pickle
import subprocess
import sys

import pytest

from hostd.platform import secretmem
from hostd.platform.secretmem import (
    BLOCK_BYTES,
    MAX_SECRET_BYTES,
    SecretBuffer,
    SecretMemoryError,
    SecretSlots,
    Slot,
)


def taken(secret: bytes) -> SecretBuffer:
    return SecretBuffer.taking(bytearray(secret))


@pytest.fixture(params=["hidden", "locked"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With memfd_secret, where the kernel has it, and without."""
    if request.param == "locked":
        monkeypatch.setattr(secretmem, "_map_secret", lambda _size: None)
    else:
        probe = SecretBuffer(1)
        if not probe.hidden:
            pytest.skip("this kernel has no memfd_secret")
        probe.wipe()
    return str(request.param)


def test_keeps_moves_and_wipes(kind: str) -> None:
    source = bytearray(b"root key")
    secret = SecretBuffer.taking(source)
    assert secret.hidden is (kind == "hidden")
    assert source == bytes(8)
    assert len(secret) == 8
    with secret.view() as view:
        assert view == b"root key"
        view[0:4] = b"ROOT"
    with secret.view() as view:
        assert bytes(view) == b"ROOT key"
    assert not secret.wiped
    secret.wipe()
    secret.wipe()
    assert secret.wiped
    with pytest.raises(ValueError, match="wiped"), secret.view():
        pass


def test_wiping_overwrites(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, seen = taken(b"x" * 5000), []
    munmap = secretmem._libc.munmap

    def look(address: int, size: int) -> int:
        seen.append(ctypes.string_at(address, size))
        return int(munmap(address, size))

    monkeypatch.setattr(secretmem._libc, "munmap", look)
    secret.wipe()
    assert seen == [bytes(8192)]


def test_does_not_show_or_copy_itself(kind: str) -> None:
    secret = taken(b"root key")
    assert "root key" not in repr(secret) + str(secret)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(secret)
    with pytest.raises((AttributeError, TypeError)):
        vars(secret)
    secret.wipe()


def test_a_view_ends_with_its_block(kind: str) -> None:
    secret = taken(b"root key")
    with secret.view() as view, pytest.raises(ValueError, match="view"):
        secret.wipe()
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    kept = []
    with pytest.raises(BufferError, match="kept"), secret.view() as view:
        kept.append(view[2:])
    kept.clear()
    secret.wipe()


@pytest.mark.parametrize("size", [0, -1, MAX_SECRET_BYTES + 1])
def test_is_bounded(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 65536"):
        SecretBuffer(size)


def test_taking_wipes_its_source_even_if_it_fails() -> None:
    source = bytearray(b"x" * (MAX_SECRET_BYTES + 1))
    with pytest.raises(ValueError, match="1 to 65536"):
        SecretBuffer.taking(source)
    assert not any(source)


def test_no_lockable_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secretmem, "_map_secret", lambda _size: None)
    monkeypatch.setattr(secretmem._libc, "mlock", lambda *_: 1)
    with pytest.raises(SecretMemoryError, match="RLIMIT_MEMLOCK"):
        SecretBuffer(1)


# ── Slots ─────────────────────────────────────────────────────────────────────────────────────────


def put(slots: SecretSlots, secret: bytes) -> Slot:
    return slots.take(bytearray(secret))


def test_slots_keep_what_they_take_apart_and_wipe_it(kind: str) -> None:
    slots = SecretSlots(5)
    source = bytearray(b"first")
    one, two = slots.take(source), put(slots, b"other")
    assert source == bytes(5)
    (block,) = slots._blocks
    assert block.hidden is (kind == "hidden")
    assert (one.view, two.view) == (b"first", b"other")
    assert block.view.tobytes().count(b"first") == 1
    assert "first" not in repr(one) + str(slots)
    view, at = one.view, one._at
    one.wipe()
    one.wipe()
    assert one.wiped
    assert b"first" not in block.view.tobytes()
    assert two.view == b"other"
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    assert put(slots, b"third")._at == at


def test_slots_take_another_block_when_one_is_full_and_give_all_back(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmapped: list[bytes] = []
    munmap = secretmem._libc.munmap

    def look(address: int, size: int) -> int:
        unmapped.append(ctypes.string_at(address, size))
        return int(munmap(address, size))

    monkeypatch.setattr(secretmem._libc, "munmap", look)
    slots = SecretSlots(1024)
    kept = [put(slots, bytes([n]) * 1024) for n in range(BLOCK_BYTES // 1024 + 1)]
    assert len(slots._blocks) == 2
    slots.release()
    assert not unmapped
    assert kept[3].view == bytes([3]) * 1024
    last = kept.pop().view  # the view alone keeps its mapping
    for slot in kept:
        slot.wipe()
    del slot
    kept.clear()
    assert unmapped == [bytes(BLOCK_BYTES)]
    assert last == bytes([BLOCK_BYTES // 1024]) * 1024
    del last
    assert unmapped == [bytes(BLOCK_BYTES)] * 2


def test_slots_that_end_in_a_cycle_with_their_keys_in_them() -> None:
    """The collector may end the mapping before what points into it."""
    for _ in range(20):
        slots = SecretSlots(32)
        held: list[object] = [slots, *(put(slots, bytes(32)) for _ in range(5))]
        held.append(held)
        del slots, held
    gc.collect()


def test_a_slot_that_is_being_read_is_wiped_all_the_same(kind: str) -> None:
    slots = SecretSlots(4)
    slot = put(slots, b"four")
    reader = pickle.PickleBuffer(slot.view)
    with pytest.raises(BufferError):
        slot.wipe()
    assert bytes(reader) == bytes(4)
    assert put(slots, b"next")._at != slot._at


@pytest.mark.parametrize("size", [0, -1, BLOCK_BYTES + 1])
def test_slots_are_bounded(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 16384"):
        SecretSlots(size)


def test_a_secret_of_another_size_is_not_taken_and_wiped() -> None:
    source = bytearray(b"three")
    with pytest.raises(ValueError, match="4 bytes"):
        SecretSlots(4).take(source)
    assert not any(source)
    with pytest.raises(TypeError):
        pickle.dumps(put(SecretSlots(4), b"four"))


def test_random_bytes_are_whole_and_differ() -> None:
    for size in (1, 32, 256):
        assert len(secretmem.random(size)) == size
    drawn = [secretmem.random(32) for _ in range(50)]
    assert len({bytes(one) for one in drawn}) == 50
    assert all(any(one[n] for one in drawn) for n in range(32))


def test_no_random_bytes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secretmem._libc, "getrandom", lambda *_: -1)
    with pytest.raises(OSError, match="getrandom"):
        secretmem.random(32)


@pytest.mark.parametrize("size", [*secretmem.FREED_SIZES, 2000])
@pytest.mark.parametrize("how", ["plainly", "scrubbed"])
def test_what_is_freed_meanwhile_is_overwritten(size: int, how: str) -> None:
    libc, full = secretmem._libc, secretmem.FREED_BLOCKS - 1
    with secretmem.scrubbed() if how == "scrubbed" else contextlib.nullcontext():
        blocks = [libc.malloc(size) for _ in range(full)]
        for block in blocks:
            ctypes.memset(block, 0x77, size)
        for block in blocks:
            libc.free(block)
    left = [b"w" * 8 in ctypes.string_at(block, size) for block in blocks]
    assert any(left) is (how == "plainly")


HOLDER = """
import os, sys
from hostd.platform import secretmem
from hostd.platform.secretmem import SecretBuffer
if sys.argv[1] == "locked":
    secretmem._map_secret = lambda size: None
source = bytearray(32)
with open("/dev/urandom", "rb", 0) as urandom:
    urandom.readinto(source)
# The parent learns the secret inverted, so that telling it leaves no copy here.
os.write(1, bytearray(b ^ 0xff for b in source))
secret = SecretBuffer.taking(source)
sys.stdin.readline()
child = os.fork()
if child == 0:
    os.write(1, str(os.getpid()).encode().ljust(16))
    sys.stdin.readline()
    os._exit(0)
os.waitpid(child, 0)
secret.wipe()
os.write(1, b"w")
sys.stdin.readline()
"""


def found_in(pid: int, needle: bytes) -> int:
    count = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps.read().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            try:
                memory.seek(start)
                count += memory.read(end - start).count(needle)
            except (OSError, OverflowError, ValueError):
                continue
    return count


@pytest.mark.skipif(os.geteuid() != 0, reason="looks into another process as root does")
@pytest.mark.parametrize("mode", ["hidden", "locked"])
def test_seen_from_outside(mode: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as holder:
        try:
            assert holder.stdin is not None
            assert holder.stdout is not None
            secret = bytes(byte ^ 0xFF for byte in holder.stdout.read(32))
            holder.stdin.write(b"\n")
            child = int(holder.stdout.read(16))
            probe = SecretBuffer(1)
            hidden = mode == "hidden" and probe.hidden
            probe.wipe()
            # The control: the plain kind is seen, so the search works.
            assert found_in(holder.pid, secret) == (0 if hidden else 1)
            assert found_in(child, secret) == 0
            holder.stdin.write(b"\n")
            assert holder.stdout.read(1) == b"w"
            assert found_in(holder.pid, secret) == 0
            holder.stdin.write(b"\n")
        finally:
            holder.kill()
