"""The boot event log: the lab's own against its TPM, each rule of the format, and all that is no log."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestlib.attest import eventlog
from guestlib.attest.bootcommand import compare_command_line
from guestlib.attest.eventlog import (
    BootEvent,
    MalformedEventLogError,
    first_difference,
    parse_log,
    replay_log,
)
from guestlib.attest.eventtext import MAX_TEXT, describe, type_name
from tests.support.eventlog import LAB_COMMAND_LINE, LAB_LOG, SEALED, event, header, locality


def judged(data: bytes) -> list[tuple[int, int, bytes]]:
    return [(e.pcr, e.type, e.digest) for e in parse_log(data).events if e.extends]


def test_lab_log_replays_to_its_tpm() -> None:
    log = parse_log(LAB_LOG)
    values = replay_log(log)
    assert {pcr: values[pcr] for pcr in SEALED} == SEALED
    assert len(log.events) == 25
    assert str(log.events[4]) == 'event 4 EV_EFI_VARIABLE_DRIVER_CONFIG "SecureBoot"'
    assert log.events[4].covered
    assert not log.events[10].covered
    assert [e.text for e in log.events if e.pcr == 4][:1] == ["kernel"]


def test_lab_command_line() -> None:
    log = parse_log(LAB_LOG)
    agreement = compare_command_line(log, LAB_COMMAND_LINE)
    assert agreement.agrees
    assert [e.pcr for e in agreement.measured] == [9]
    other = compare_command_line(log, LAB_COMMAND_LINE + " init=/bin/sh")
    assert not other.agrees
    assert [e.text for e in other.measured] == ["LOADED_IMAGE::LoadOptions"]


COMMAND = "BOOT_IMAGE=/vmlinuz root=/dev/vda ro"


@pytest.mark.parametrize(
    ("measured", "agrees"),
    [
        (event(8, 13, b"kernel_cmdline: /vmlinuz root=/dev/vda ro", hashed=COMMAND[11:].encode()), True),
        (event(8, 13, b"kernel_cmdline: /vmlinuz root=/dev/vdb ro", hashed=b"/vmlinuz root=/dev/vdb ro"),
         False),
        (event(8, 13, b"kernel_cmdline: /vmlinuz root=/dev/vda ro", hashed=b"/vmlinuz root=/dev/vdb"), False),
        (event(12, 13, (COMMAND + "\0").encode("utf-16-le")), True),
        (event(11, 13, b".cmdline\0", hashed=COMMAND.encode() + b"\0"), True),
        (event(11, 13, b".cmdline\0", hashed=b"other\0"), False),
    ],
)  # fmt: skip
def test_command_lines_of_loaders(measured: bytes, agrees: bool) -> None:
    agreement = compare_command_line(parse_log(header() + event(8, 13, b"grub_cmd: set") + measured), COMMAND)
    assert (bool(agreement.measured), agreement.agrees) == (True, agrees)


def test_command_line_that_nobody_measured() -> None:
    agreement = compare_command_line(parse_log(header() + event(8, 13, b"grub_cmd: set")), COMMAND)
    assert agreement.measured == ()
    assert not agreement.agrees


@pytest.mark.parametrize("start", [0, 3, 4])
def test_startup_locality(start: int) -> None:
    log = parse_log(header() + locality(start) + event(0, 8, b"v"))
    first = bytes(31) + bytes([start])
    assert replay_log(log)[0] == hashlib.sha256(first + hashlib.sha256(b"v").digest()).digest()
    assert log.locality == start


def test_no_action_extends_nothing() -> None:
    log = parse_log(header() + event(7, 3, b"note"))
    assert replay_log(log)[7] == bytes(32)


SPEC = header()[32:]


def framed(spec: bytes) -> bytes:
    return struct.pack("<II20sI", 0, 3, bytes(20), len(spec)) + spec


@pytest.mark.parametrize(
    "data",
    [
        b"",
        header()[:40],
        struct.pack("<II20sI", 1, 3, bytes(20), len(SPEC)) + SPEC,
        struct.pack("<II20sI", 0, 4, bytes(20), len(SPEC)) + SPEC,
        struct.pack("<II20sI", 0, 3, b"\1" * 20, len(SPEC)) + SPEC,
        framed(SPEC.replace(b"Event03", b"Event02")),
        framed(SPEC[:21] + b"\1" + SPEC[22:]),
        framed(SPEC + b"\0"),
        framed(SPEC[:-1] + b"\5"),
        header(()),
        header(((4, 20),)),
        header(((11, 20),)),
        header(((11, 32), (11, 32))),
        header(((11, 32), (99, 65))),
        header(((11, 32), (99, 0))),
        header((*((n, 20) for n in range(100, 108)), (11, 32))),
        header() + b"\0",
        header() + event(24, 4, b""),
        header() + event(0xFFFFFFFF, 4, b""),
        header() + event(4, 13, b"x")[:-1],
        header() + event(4, 13, b"x") + b"\0\0\0\0",
        header(((11, 32),)) + event(4, 13, b"x"),
        header(((12, 48), (11, 32))) + event(4, 13, b"x"),
        header() + event(4, 13, b"x")[:-5] + struct.pack("<I", 1 << 31),
        header() + event(4, 13, b"x").replace(hashlib.sha1(b"x").digest(), bytes(20)),
        header() + event(0, 8, b"v") + locality(3),
        header() + locality(3) + locality(3),
        header() + locality(1),
        header() + locality(3, pcr=1),
        header() + event(0, 3, b"StartupLocality\0\3\3"),
        header() + event(4, 13, bytes(eventlog.MAX_EVENT_BYTES)) * 5,
        header() + struct.pack("<III", 4, 13, 1) + b"\x0b\0" + bytes(32) + struct.pack("<I", 0),
        header() + event(4, 13, b"x") * (eventlog.MAX_EVENTS + 1),
    ],
    ids=range(33),
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(MalformedEventLogError):
        parse_log(data)


def test_event_of_no_pcr() -> None:
    """PFP 10.4.5.2: an EV_NO_ACTION event that is not of any PCR."""
    assert len(parse_log(header() + event(0xFFFFFFFF, 3, b"note", hashed=b"")).events) == 2


def test_every_truncation_is_malformed_or_shorter() -> None:
    whole = judged(LAB_LOG)
    ends = 0
    for length in range(len(LAB_LOG)):
        try:
            cut = judged(LAB_LOG[:length])
        except MalformedEventLogError:
            continue
        ends += 1
        assert len(cut) < len(whole)
        assert cut == whole[: len(cut)]
    assert ends == 24


def test_every_byte_flipped() -> None:
    """What still replays differs in nothing that is judged: in digests of other banks, or in data that
    firmware does not hash."""
    log = parse_log(LAB_LOG)
    values = replay_log(log)
    refused, others, same = 0, 0, []
    for at in range(len(LAB_LOG)):
        flipped = bytearray(LAB_LOG)
        flipped[at] ^= 1 << (at % 8)
        try:
            parsed = parse_log(bytes(flipped))
        except MalformedEventLogError:
            refused += 1
            continue
        if replay_log(parsed) != values:
            others += 1
            continue
        same.append(at)
        for before, after in zip(log.events, parsed.events, strict=True):
            assert (after.pcr, after.digest) == (before.pcr, before.digest) or not before.extends
    print(f"{len(LAB_LOG)} bytes: {refused} malformed, {others} replay to other PCRs, {len(same)} unproven")
    assert refused + others > len(same)


@given(st.binary(max_size=300))
def test_only_the_malformed_error_escapes(data: bytes) -> None:
    for candidate in (data, header() + data):
        try:
            parse_log(candidate)
        except MalformedEventLogError:
            continue


def test_mutations() -> None:
    chance = random.Random(7)
    for _ in range(3000):
        data = bytearray(LAB_LOG)
        for _ in range(chance.randint(1, 4)):
            at, size = chance.randrange(len(data)), chance.randint(0, 8)
            data[at : at + chance.randint(0, 8)] = chance.randbytes(size)
        try:
            log = parse_log(bytes(data))
        except MalformedEventLogError:
            continue
        replay_log(log)
        assert all(len(str(item)) < MAX_TEXT + 100 for item in log.events)
        compare_command_line(log, LAB_COMMAND_LINE)


@given(st.sampled_from([0x80000001, 0x80000002, 0x80000003, 0x8000000A, 6, 13, 77]), st.binary(max_size=120))
def test_words_are_printable_and_bounded(number: int, data: bytes) -> None:
    text = describe(number, data)
    assert len(text) <= MAX_TEXT
    assert text.isprintable()


def test_words() -> None:
    path = struct.pack("<BBH", 4, 4, 4 + 20) + "\\EFI\\a.efi".encode("utf-16-le") + b"\x7f\xff\x04\x00"
    image = struct.pack("<QQQQ", 1, 2, 3, len(path)) + path
    assert describe(0x80000003, image) == "\\EFI\\a.efi"
    assert describe(0x8000000A, b"\x04PEIF" + bytes(16)) == "PEIF"
    assert describe(13, b"grub_cmd: set\0") == "grub_cmd: set"
    assert describe(13, b"\x1b[2J") == "1b5b324a"
    assert type_name(0x99) == "type 0x99"


def test_first_difference() -> None:
    def made(number: int, digest: bytes) -> BootEvent:
        return BootEvent(number, 4, 13, digest, b"", covered=False)

    a, b, c = made(1, b"a" * 32), made(2, b"b" * 32), made(3, b"c" * 32)
    row = [(13, b"a" * 32), (13, b"b" * 32)]
    assert first_difference(row, [a, b]) is None
    assert first_difference(row, [a, c]) == (1, c)
    assert first_difference(row, [a]) == (1, None)
    assert first_difference(row, [a, b, c]) == (2, c)
