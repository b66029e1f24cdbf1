"""PCRs, quotes, sealing against a real swtpm."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support_tpm import Embedded, make_embedded

from guestlib.attest.quote import attestation_key, verify_quote
from guestlib.attest.tpm2 import parse_attest, parse_public
from hostd.platform import tpm_esys
from hostd.platform.tpm import MAX_SECRET_BYTES, Tpm, open_tpm
from hostd.platform.tpm_errors import (
    TpmBlobError,
    TpmBusyError,
    TpmCommandError,
    TpmError,
    TpmIdentityError,
    TpmPolicyError,
    TpmUnavailableError,
)
from hostd.platform.tpm_esys import Esys
from hostd.platform.tpm_files import SealedBlob, sealed_blob
from hostd.platform.tpm_tcti import Link

BOOT = (0, 1, 2, 3, 4, 5, 7, 8, 9, 14)
SECRET = bytes(range(32))


def leftovers(host: Embedded) -> tuple[int, ...]:
    esys = Esys(host.connect, 20.0)
    # Straight to the TPM: a new context of ours would first clean up.
    found = []
    link = host.connect()
    for base in (0x80000000, 0x02000000, 0x03000000):
        command = (
            bytes.fromhex("8001000000160000017a00000001")
            + base.to_bytes(4, "big")
            + bytes.fromhex("00000040")
        )
        response = link.exchange(command, time.monotonic() + 10)
        count = int.from_bytes(response[15:19], "big")
        found += [int.from_bytes(response[19 + 4 * i : 23 + 4 * i], "big") for i in range(count)]
    esys.close()
    return tuple(found)


def test_seals_and_unseals(tpm: Tpm) -> None:
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    assert tpm.unseal(blob) == SECRET


@pytest.mark.parametrize("size", [1, 32, MAX_SECRET_BYTES])
def test_seals_every_size(tpm: Tpm, size: int) -> None:
    secret = os.urandom(size)
    assert tpm.unseal(tpm.seal(secret, tpm.read_pcrs(BOOT))) == secret


@pytest.mark.parametrize("size", [0, MAX_SECRET_BYTES + 1])
def test_refuses_other_sizes(tpm: Tpm, size: int) -> None:
    with pytest.raises(ValueError, match="1 to 128 bytes"):
        tpm.seal(bytes(size), tpm.read_pcrs(BOOT))


def test_refuses_to_seal_to_nothing(tpm: Tpm) -> None:
    with pytest.raises(ValueError, match="not a selection"):
        tpm.seal(SECRET, {})


def test_names_each_pcr_that_differs(tpm: Tpm, host: Embedded) -> None:
    values = tpm.read_pcrs(BOOT)
    wrong = {4: bytes([1]) * 32, 14: bytes([2]) * 32}
    blob = tpm.seal(SECRET, values | wrong)
    with pytest.raises(TpmPolicyError) as caught:
        tpm.unseal(blob)
    assert [(m.index, m.expected, m.seen) for m in caught.value.mismatches] == [
        (4, wrong[4], values[4]),
        (14, wrong[14], values[14]),
    ]
    assert f"PCR 4: expected {wrong[4].hex()}, seen {values[4].hex()}" in str(caught.value)
    assert leftovers(host) == ()


def test_an_extended_pcr_closes_the_seal(tpm: Tpm) -> None:
    values = tpm.read_pcrs((0, 5))
    blob = tpm.seal(SECRET, values)
    tpm.extend(5, hashlib.sha256(b"something ran").digest())
    seen = hashlib.sha256(values[5] + hashlib.sha256(b"something ran").digest()).digest()
    with pytest.raises(TpmPolicyError) as caught:
        tpm.unseal(blob)
    (mismatch,) = caught.value.mismatches
    assert (mismatch.index, mismatch.expected, mismatch.seen) == (5, values[5], seen)


def test_every_altered_byte_is_refused(tpm: Tpm, host: Embedded) -> None:
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    for field in ("public", "private"):
        original: bytes = getattr(blob, field)
        for position in range(0, len(original), 3):
            altered = bytearray(original)
            altered[position] ^= 0x40
            parts = {"public": blob.public, "private": blob.private, field: bytes(altered)}
            with pytest.raises(TpmBlobError):
                tpm.unseal(sealed_blob(parts["public"], parts["private"], blob.values()))
    assert leftovers(host) == ()


def test_parts_of_two_blobs_do_not_mix(tpm: Tpm) -> None:
    values = tpm.read_pcrs(BOOT)
    one, two = tpm.seal(SECRET, values), tpm.seal(b"other", values)
    with pytest.raises(TpmBlobError, match="altered, or of another TPM"):
        tpm.unseal(sealed_blob(one.public, two.private, values))


def test_recorded_values_cannot_lie(tpm: Tpm) -> None:
    """Else a refusal would name the wrong PCR, or expected values of an attacker's choice."""
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    with pytest.raises(TpmBlobError, match="not those of its policy"):
        tpm.unseal(sealed_blob(blob.public, blob.private, blob.values() | {0: bytes([9]) * 32}))
    fewer = {index: value for index, value in blob.values().items() if index != 0}
    with pytest.raises(TpmBlobError, match="not those of its policy"):
        tpm.unseal(sealed_blob(blob.public, blob.private, fewer))


def test_a_blob_with_a_password_branch_is_refused(tpm: Tpm) -> None:
    """An object that anybody opens with an empty password is not what `seal` makes."""
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    public = bytearray(blob.public)
    public[9] |= 0x40  # userWithAuth
    with pytest.raises(TpmBlobError, match="not that of a sealed secret"):
        tpm.unseal(sealed_blob(bytes(public), blob.private, blob.values()))


def test_another_tpms_blob_and_keys(tpm: Tpm, host: Embedded, tmp_path: Path) -> None:
    other = make_embedded(tmp_path)
    try:
        theirs = other.open()
        blob = theirs.seal(SECRET, theirs.read_pcrs(BOOT))
        theirs.close()
        with pytest.raises(TpmBlobError, match="of another TPM"):
            tpm.unseal(blob)
        stranger = Embedded(other.state, other.process, host.record, other.log)
        with pytest.raises(TpmIdentityError, match="another TPM: the name of its storage key"):
            stranger.open()
    finally:
        other.process.kill()


def test_another_tpm_behind_the_same_socket(own_host: Embedded, tmp_path: Path) -> None:
    """Swapped while it was open: noticed when the context is rebuilt, before anything is sent to it."""
    tpm = own_host.open()
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    own_host.process.kill()
    (tmp_path / "other").mkdir()
    other = make_embedded(tmp_path / "other")
    other.process.kill()
    own_host.state = other.state
    with pytest.raises(TpmUnavailableError):
        tpm.unseal(blob)
    own_host.restart()
    with pytest.raises(TpmIdentityError):
        tpm.unseal(blob)
    with pytest.raises(TpmIdentityError):
        tpm.quote(bytes(32), BOOT)
    tpm.close()


@pytest.mark.parametrize("key", ["srk_public", "ak_public"])
def test_each_key_is_pinned(host: Embedded, key: str) -> None:
    record = host.record
    exchanged = {"srk_public": record.ak_public, "ak_public": record.srk_public}[key]
    other = Embedded(host.state, host.process, _with(record, **{key: exchanged}), host.log)
    with pytest.raises(TpmIdentityError):
        other.open()


def _with(record, **changes):  # type: ignore[no-untyped-def]
    import msgspec

    return msgspec.structs.replace(record, **changes)


def test_a_missing_key_is_another_tpm(host: Embedded) -> None:
    other = Embedded(host.state, host.process, _with(host.record, ak_handle=0x81010099), host.log)
    with pytest.raises(TpmIdentityError, match="no attestation key at 0x81010099"):
        other.open()


STORM = """
import sys, time
from pathlib import Path
from hostd.platform.tpm_tcti import SocketLink
link, end = SocketLink(Path(sys.argv[1])), time.monotonic() + 60
extend = bytes.fromhex("8002 00000041 00000182 0000000a 00000009 40000009 0000 00 0000 00000001 000b")
extend += bytes(32)
print("ready", flush=True)
while time.monotonic() < end:
    assert link.exchange(extend, end)[6:10] == bytes(4)
    time.sleep(float(sys.argv[2]))
"""


def test_unseals_and_quotes_while_ima_extends(tpm: Tpm, host: Embedded) -> None:
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    before = tpm.read_pcrs((10,))
    with subprocess.Popen(
        [sys.executable, "-c", STORM, str(host.process.socket), "0.002"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as storm:
        try:
            assert storm.stdout is not None
            assert storm.stdout.readline() == b"ready\n"
            for _ in range(20):
                assert tpm.unseal(blob) == SECRET
                quote, values = tpm.quote_with_pcrs(bytes(32), (*BOOT, 10))
                verify_quote(_ak(host), quote.attest, quote.signature, bytes(32), values)
        finally:
            storm.kill()
    assert tpm.read_pcrs((10,)) != before
    assert leftovers(host) == ()


def test_a_pcr_changed_every_time_is_busy(tpm: Tpm, host: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound: an extend between PolicyPCR and Unseal in each of the attempts."""
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    call, extends = Esys.call, []

    def extending(self: Esys, command: str, function):  # type: ignore[no-untyped-def]
        if command == "Unseal":
            extends.append(1)
            tpm.extend(10, bytes(32))
        return call(self, command, function)

    monkeypatch.setattr(Esys, "call", extending)
    with pytest.raises(TpmBusyError, match="64 attempts"):
        tpm.unseal(blob)
    assert len(extends) == 64
    assert leftovers(host) == ()


def test_a_hung_tpm_fails_in_time_and_recovers(own_host: Embedded) -> None:
    tpm = own_host.open(command_s=0.5)
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    os.kill(own_host.process.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(TpmUnavailableError, match="deadline"):
            tpm.unseal(blob)
        assert time.monotonic() - start < 15
    finally:
        os.kill(own_host.process.process.pid, signal.SIGCONT)
    assert tpm.unseal(blob) == SECRET
    assert leftovers(own_host) == ()
    tpm.close()


def test_a_killed_tpm_comes_back(own_host: Embedded) -> None:
    tpm = own_host.open()
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    resets = parse_attest(tpm.quote(b"", BOOT).attest).reset_count
    own_host.process.kill()
    for _ in range(2):
        with pytest.raises(TpmUnavailableError):
            tpm.quote(b"", BOOT)
    own_host.restart()
    assert tpm.unseal(blob) == SECRET
    # A child of the EK tells the true count.
    assert parse_attest(tpm.quote(b"", BOOT).attest).reset_count == resets + 1
    tpm.close()


def test_the_jobs_deadline_bounds_its_commands(own_host: Embedded) -> None:
    tpm = own_host.open(command_s=20.0)
    os.kill(own_host.process.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        tpm.limit(start + 0.3)
        with pytest.raises(TpmUnavailableError):
            tpm.read_pcrs(BOOT)
        assert time.monotonic() - start < 15
    finally:
        os.kill(own_host.process.process.pid, signal.SIGCONT)
    tpm.close()


def test_leaves_nothing_behind(tpm: Tpm, host: Embedded) -> None:
    values = tpm.read_pcrs(BOOT)
    for _ in range(10):
        blob = tpm.seal(SECRET, values)
        tpm.unseal(blob)
        tpm.quote_with_pcrs(bytes(32), BOOT)
        tpm.random(100)
        assert leftovers(host) == ()


def test_cleans_up_after_a_killed_client(host: Embedded) -> None:
    start = bytes.fromhex("8001 0000002b 00000176 40000007 40000007 0010") + bytes(16)
    start += bytes.fromhex("0000 00 0010 000b")
    link = host.connect()
    for _ in range(3):
        assert link.exchange(start, time.monotonic() + 10)[6:10] == bytes(4)
    assert len(leftovers(host)) == 3
    host.open().close()
    assert leftovers(host) == ()


def test_the_wire_does_not_show_the_secret(own_host: Embedded) -> None:
    """swtpm logs each command and response: without salted sessions the secret is in there."""
    secret = os.urandom(32)
    tpm = own_host.open()
    blob = tpm.seal(secret, tpm.read_pcrs(BOOT))
    assert tpm.unseal(blob) == secret
    marker = hashlib.sha256(b"marker").digest()
    tpm.quote(marker, BOOT)
    tpm.close()
    own_host.process.stop()
    wire = "".join(own_host.log.read_text().split()).lower()
    assert marker.hex() in wire
    assert secret.hex() not in wire


COPIES = """
import sys, gc
from functools import partial
from pathlib import Path
from hostd.platform.tpm import open_tpm
from hostd.platform.tpm_files import parse_blob, parse_record
from hostd.platform.tpm_tcti import SocketLink
def copies(needle):
    # The needle is kept inverted, so that looking for it does not make copies that are found.
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps.read().splitlines():
            area, mode = line.split()[:2]
            if "w" not in mode or "[v" in line:
                continue
            start, end = (int(x, 16) for x in area.split("-"))
            for position in range(start, end, 1 << 20):
                memory.seek(position)
                try:
                    chunk = bytearray(memory.read(min((1 << 20) + len(needle), end - position)))
                except OSError:
                    continue
                plain = bytearray(b ^ 0xff for b in needle)
                at = chunk.find(plain)
                while at >= 0:
                    found += 1
                    at = chunk.find(plain, at + 1)
                for i in range(len(plain)): plain[i] = 0
                chunk[:] = bytes(len(chunk))
    return found
record = parse_record(Path(sys.argv[1]).read_bytes())
blob = parse_blob(Path(sys.argv[2]).read_bytes())
needle = bytes.fromhex(sys.argv[4])
tpm = open_tpm(partial(SocketLink, Path(sys.argv[3])), record, command_s=20)
secret = tpm.unseal(blob)
gc.collect()
with_secret = copies(needle)
secret[:] = bytes(len(secret))
print(with_secret, copies(needle))
"""


@pytest.mark.parametrize("size", [32, 128])
def test_leaves_exactly_one_copy(tpm: Tpm, host: Embedded, tmp_path: Path, size: int) -> None:
    from hostd.platform.tpm_files import encode_blob, encode_record

    secret = os.urandom(size)
    record, blob = tmp_path / "tpm.json", tmp_path / "root.json"
    record.write_bytes(encode_record(host.record))
    blob.write_bytes(encode_blob(tpm.seal(secret, tpm.read_pcrs(BOOT))))
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            COPIES,
            record,
            blob,
            host.process.socket,
            bytes(b ^ 0xFF for b in secret).hex(),
        ],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    total, after = (int(word) for word in out.stdout.split())
    # What the search itself holds while it looks is in both counts.
    assert total - after == 1, out.stdout


def test_reads_more_than_eight_pcrs(tpm: Tpm) -> None:
    values = tpm.read_pcrs(range(24))
    assert sorted(values) == list(range(24))
    assert all(len(value) == 32 for value in values.values())


def test_extends(tpm: Tpm) -> None:
    before = tpm.read_pcrs((16,))[16]
    tpm.extend(16, b"d" * 32)
    assert tpm.read_pcrs((16,))[16] == hashlib.sha256(before + b"d" * 32).digest()


@pytest.mark.parametrize("digest", [b"", bytes(20), bytes(33)])
def test_extends_by_a_digest_only(tpm: Tpm, digest: bytes) -> None:
    with pytest.raises(ValueError, match="not a SHA-256 digest"):
        tpm.extend(16, digest)


def test_a_bank_without_the_pcrs(host: Embedded) -> None:
    """A TPM that has no such PCR leaves it out of its answer, and says that all went well."""
    nothing = bytes.fromhex("8001 00000016 00000000 00000001 00000000 00000000")
    tpm = Tpm(Esys(lambda: Injecting(host.connect(), [nothing], "0000017e"), 20.0), host.record)
    with pytest.raises(TpmCommandError, match="no such PCRs"):
        tpm.read_pcrs((0, 1))
    tpm.close()


@pytest.mark.parametrize("selection", [(), (24,), (-1,), (1, 1)])
def test_refuses_what_is_no_selection(tpm: Tpm, selection: tuple[int, ...]) -> None:
    for call in (tpm.read_pcrs, lambda s: tpm.quote(b"", s)):
        with pytest.raises(ValueError, match="PCR"):
            call(selection)


def test_random(tpm: Tpm) -> None:
    assert len(tpm.random(100)) == 100
    assert tpm.random(32) != tpm.random(32)
    with pytest.raises(ValueError, match="1 to 1024"):
        tpm.random(0)


def test_a_quote_covers_its_data_and_values(tpm: Tpm, host: Embedded) -> None:
    quote, values = tpm.quote_with_pcrs(b"q" * 64, BOOT)
    verified = verify_quote(_ak(host), quote.attest, quote.signature, b"q" * 64, values)
    assert verified.pcrs == values
    with pytest.raises(ValueError, match="over 64 bytes"):
        tpm.quote(bytes(65), BOOT)


def test_quote_with_pcrs_is_bounded(tpm: Tpm, monkeypatch: pytest.MonkeyPatch) -> None:
    quote = Tpm.quote

    def extending(self: Tpm, *arguments):  # type: ignore[no-untyped-def]
        self.extend(10, bytes(32))
        return quote(self, *arguments)

    monkeypatch.setattr(Tpm, "quote", extending)
    with pytest.raises(TpmBusyError, match="moved"):
        tpm.quote_with_pcrs(bytes(32), (10,))


def _ak(host: Embedded):  # type: ignore[no-untyped-def]
    return attestation_key(parse_public(host.record.ak_public))


def test_command_errors_are_typed(tpm: Tpm) -> None:
    with pytest.raises(TpmCommandError) as caught:
        tpm._esys.call("PCR_Reset", lambda e: e.pcr_reset(tpm_esys.ESYS_TR(7)))
    assert caught.value.rc == 0x907
    assert "PCR_Reset: 0x907" in str(caught.value)


class Injecting:
    """A link that answers some commands itself."""

    managed = True

    def __init__(self, inner, responses, code="0000017b"):  # type: ignore[no-untyped-def]
        """`code` is that of the command, in hex: GetRandom."""
        self.inner, self.responses, self.seen = inner, responses, 0
        self.code = bytes.fromhex(code)

    def exchange(self, command: bytes, deadline: float) -> bytes:
        self.seen += 1
        if self.responses and command[6:10] == self.code:
            return self.responses.pop(0)
        return self.inner.exchange(command, deadline)

    def close(self) -> None:
        self.inner.close()


def _code(rc: int) -> bytes:
    return bytes.fromhex("80010000000a") + rc.to_bytes(4, "big")


@pytest.mark.parametrize("rc", [0x908, 0x90A, 0x920, 0x922, 0x923])
def test_retries_what_passes_by_itself(host: Embedded, rc: int) -> None:
    link = Injecting(host.connect(), [_code(rc)] * 3)
    esys = Esys(lambda: link, 20.0)
    assert Tpm(esys, host.record).random(8)
    assert not link.responses
    esys.close()


def test_retries_are_bounded(host: Embedded) -> None:
    link = Injecting(host.connect(), [_code(0x920)] * 1000)
    tpm = Tpm(Esys(lambda: link, 20.0), host.record)
    tpm.limit(time.monotonic() + 0.5)
    with pytest.raises(TpmBusyError, match="0x920"):
        tpm.random(8)
    assert link.seen < 10
    tpm.close()


@pytest.mark.parametrize(
    "response",
    [b"", _code(0)[:9], bytes.fromhex("8001ffffffff00000000"), _code(0) + b"x"],
    ids=["empty", "short", "huge", "trailing"],
)
def test_a_garbled_response_rebuilds_the_context(host: Embedded, response: bytes) -> None:
    link = Injecting(host.connect(), [response])
    esys = Esys(lambda: link, 20.0)
    tpm = Tpm(esys, host.record)
    with pytest.raises(TpmUnavailableError):
        tpm.random(8)
    assert len(tpm.random(8)) == 8
    assert esys.generation == 2
    tpm.close()


def test_sealed_blob_type_is_frozen(tpm: Tpm) -> None:
    blob = tpm.seal(SECRET, tpm.read_pcrs(BOOT))
    assert isinstance(blob, SealedBlob)
    with pytest.raises(AttributeError):
        blob.public = b""  # type: ignore[misc]


# ── PCRs in an authenticated session ──────────────────────────────────────────────────────────────────

PCR_READ = bytes.fromhex("0000017e")


class OnTheWire:
    """A link that alters, or repeats, what the TPM answers to PCR_Read."""

    def __init__(self, inner: Link) -> None:
        self.inner = inner
        self.alter: Callable[[bytes], bytes] = lambda response: response
        self.heard: list[bytes] = []

    @property
    def managed(self) -> bool:
        return self.inner.managed

    def exchange(self, command: bytes, deadline: float) -> bytes:
        response = self.inner.exchange(command, deadline)
        if command[6:10] == PCR_READ:
            self.heard.append(response)
            response = self.alter(response)
        return response

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def wired(host: Embedded) -> Iterator[tuple[Tpm, OnTheWire]]:
    wires: list[OnTheWire] = []

    def connect() -> OnTheWire:
        wires.append(OnTheWire(host.connect()))
        return wires[-1]

    opened = open_tpm(connect, host.record, command_s=20.0)
    yield opened, wires[-1]
    opened.close()


def test_checked_pcrs_are_those_that_are_read(tpm: Tpm, host: Embedded) -> None:
    everything = (*BOOT, 10)
    assert tpm.check_pcrs(everything) == tpm.read_pcrs(everything)
    tpm.extend(10, hashlib.sha256(b"more").digest())
    assert tpm.check_pcrs(everything) == tpm.read_pcrs(everything)
    tpm.close()
    assert leftovers(host) == ()


def test_a_checked_pcr_cannot_be_forged_on_the_wire(wired: tuple[Tpm, OnTheWire]) -> None:
    tpm, wire = wired
    true = tpm.read_pcrs((0, 7))
    value = true[0]
    wire.alter = lambda response: response.replace(value, bytes(31) + b"\x01")
    assert tpm.read_pcrs((0, 7)) != true, "what is only read is believed"
    wire_count = len(wire.heard)
    with pytest.raises(TpmUnavailableError):
        tpm.check_pcrs((0, 7))
    assert len(wire.heard) > wire_count


def test_a_checked_pcr_cannot_be_repeated_on_the_wire(wired: tuple[Tpm, OnTheWire]) -> None:
    tpm, wire = wired
    tpm.check_pcrs((0, 7))
    old = wire.heard[-1]
    wire.alter = lambda _response: old
    with pytest.raises(TpmUnavailableError):
        tpm.check_pcrs((0, 7))


def test_pcrs_that_move_while_they_are_checked_are_read_again(wired: tuple[Tpm, OnTheWire]) -> None:
    """More than eight PCRs are two responses: they must be of one moment."""
    tpm, wire = wired
    moved = 0

    def move(response: bytes) -> bytes:
        nonlocal moved
        if len(wire.heard) % 2 and moved < 3:
            moved += 1
            command = bytes.fromhex("80020000004100000182") + (10).to_bytes(4, "big")
            command += bytes.fromhex("00000009400000090000000000") + bytes.fromhex("00000001000b") + bytes(32)
            answer = wire.inner.exchange(command, time.monotonic() + 10)
            assert answer[6:10] == bytes(4), answer.hex()
        return response

    wire.alter = move
    seen = tpm.check_pcrs((*BOOT, 10))
    assert moved == 3
    assert len(wire.heard) == 8
    assert seen == tpm.read_pcrs((*BOOT, 10))


def test_pcrs_that_never_stand_still(wired: tuple[Tpm, OnTheWire], monkeypatch: pytest.MonkeyPatch) -> None:
    tpm, _ = wired
    counts = iter(range(10**6))
    values = dict.fromkeys(BOOT, bytes(32))
    monkeypatch.setattr(tpm, "_read_pcrs", lambda *_: (values, {next(counts), next(counts)}))
    with pytest.raises(TpmBusyError, match="moved"):
        tpm.check_pcrs(BOOT)


def test_a_check_that_fails_leaves_no_session_behind(
    own_host: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    tpm = own_host.open()
    tpm.check_pcrs(BOOT)

    def refused(*_: object) -> object:
        raise TpmCommandError(0x922, "PCR_Read", "retry")

    with monkeypatch.context() as patched:
        patched.setattr(tpm, "_read_pcrs", refused)
        for _ in range(5):
            with pytest.raises(TpmCommandError):
                tpm.check_pcrs(BOOT)
            assert leftovers(own_host) == ()
    assert tpm.check_pcrs(BOOT) == tpm.read_pcrs(BOOT)
    tpm.close()


def test_a_check_that_breaks_the_link_opens_no_other_to_end_its_session(host: Embedded) -> None:
    """What it had in the TPM went with the link, or goes when the next is opened."""
    wires: list[OnTheWire] = []

    def connect() -> OnTheWire:
        wires.append(OnTheWire(host.connect()))
        return wires[-1]

    tpm = open_tpm(connect, host.record, command_s=20.0)
    tpm.check_pcrs(BOOT)
    opened = len(wires)
    wires[-1].alter = lambda response: response[:-1] + bytes([response[-1] ^ 1])
    with pytest.raises(TpmUnavailableError):
        tpm.check_pcrs(BOOT)
    assert len(wires) == opened
    assert tpm.check_pcrs(BOOT) == tpm.read_pcrs(BOOT)
    assert len(wires) == opened + 1
    tpm.close()
    assert leftovers(host) == ()


def test_checking_goes_on_after_the_tpm_was_reset(own_host: Embedded) -> None:
    tpm = own_host.open()
    tpm.check_pcrs(BOOT)
    own_host.restart()
    with contextlib.suppress(TpmError):
        tpm.check_pcrs(BOOT)
    assert tpm.check_pcrs(BOOT) == tpm.read_pcrs(BOOT)
    tpm.close()
    assert leftovers(own_host) == ()
