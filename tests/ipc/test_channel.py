"""Records between roles: the decoder whole, byte by byte and mutated; the channel on real sockets."""

from __future__ import annotations

import os
import random
import resource
import socket
import time
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.core.readings import Struct
from hostd.ipc import operations as ops
from hostd.ipc import serving
from hostd.ipc.channel import (
    MAX_DESCRIPTORS,
    MAX_QUEUED_BYTES,
    MAX_RECORD_BYTES,
    Channel,
    ChannelClosedError,
    ChannelError,
    Decoder,
    encode,
    peer_of,
)


class Ping(Struct, frozen=True, tag="ping"):
    number: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    text: Annotated[str, msgspec.Meta(max_length=20)] = ""


class Pong(Struct, frozen=True, tag="pong"):
    data: bytes


RECORDS: list[Ping | Pong] = [Ping(1), Pong(b"\0" * 70), Ping(1000, "grüße"), Pong(b"")]


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


# ── Decoder ───────────────────────────────────────────────────────────────────────────────────────


def test_a_record_is_its_length_and_its_bytes() -> None:
    assert encode([Ping(5, "x")]) == b"\0\0\0\x09" + b"\x93\xa4ping\x05\xa1x"


def test_split_at_every_byte() -> None:
    stream = encode(RECORDS)
    for cut in range(len(stream) + 1):
        decoder: Decoder[Ping | Pong] = Decoder(Ping | Pong)
        assert decoder.feed(stream[:cut]) + decoder.feed(stream[cut:]) == RECORDS
        assert decoder.pending_bytes == 0


def test_byte_by_byte_and_an_unfinished_tail() -> None:
    stream = encode(RECORDS)
    decoder: Decoder[Ping | Pong] = Decoder(Ping | Pong)
    got = [record for i in range(len(stream)) for record in decoder.feed(stream[i : i + 1])]
    assert got == RECORDS
    assert decoder.feed(stream[:7]) == []
    assert decoder.pending_bytes == 7


def test_an_oversize_record_is_refused_by_its_header_alone() -> None:
    assert Decoder[Ping](Ping, max_record=8).feed(b"\0\0\0\x08") == []
    with pytest.raises(ChannelError, match="over the limit of 8"):
        Decoder[Ping](Ping, max_record=8).feed(b"\0\0\0\x09")
    with pytest.raises(ChannelError, match="over the limit"):
        Decoder[Ping](Ping).feed((MAX_RECORD_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ChannelError, match="over the limit"):
        encode([Pong(bytes(MAX_RECORD_BYTES))])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x92\xa4ping\x05\x00",
        b"\x92\xa4ping",
        b"\x92\xa4peng\x05",
        b"\x93\xa4ping\x05\xa1x\xc0",
        b"\x94\xa4ping\x05\xa1x\xc0",
        b"\x93\xa4ping\xff\xa1x",
        b"\x93\xa4ping\xcd\x03\xe9\xa0",
        b"\x93\xa4ping\xa15\xa0",
        b"\x93\xa4ping\xc3\xa0",
        b"\x93\xa4ping\x05\xc4\x01x",
        b"\x93\xa4ping\x05\xa1\xff",
        b"\x93\xa4ping\x05\xb5" + b"x" * 21,
        b"\x92\xa4pong\xa1x",
        b"\x82\xa4type\xa4ping\xa6number\x05",
        b"\xc0",
        b"\x91" * 5000,
    ],
    ids=lambda b: b[:12].hex(),
)
def test_what_is_not_a_record_of_the_type(body: bytes) -> None:
    with pytest.raises(ChannelError, match="does not decode"):
        Decoder[Ping | Pong](Ping | Pong).feed(framed(body))


@pytest.mark.parametrize(
    "body",
    [
        b"\x92\xa4ping\x05",
        b"\x93\xa4ping\xcc\x05\xa0",
        b"\x93\xa4ping\xd0\x05\xa0",
        b"\x93\xa4ping\x05\xd9\x01x",
        b"\x93\xd9\x04ping\x05\xa1x",
        b"\xdc\x00\x03\xa4ping\x05\xa1x",
        b"\x92\xa4pong\xc5\x00\x01x",
    ],
    ids=lambda b: b.hex(),
)
def test_two_encodings_of_one_record_are_not_both_read(body: bytes) -> None:
    """Each decodes; its canonical form is another string of bytes."""
    assert msgspec.msgpack.decode(body, type=Ping | Pong)
    with pytest.raises(ChannelError, match="canonical"):
        Decoder[Ping | Pong](Ping | Pong).feed(framed(body))


def test_a_broken_decoder_stays_broken() -> None:
    for bad in (framed(b"\xc0"), b"\xff\xff\xff\xff", framed(b"\x92\xa4ping\x05")):
        decoder: Decoder[Ping] = Decoder(Ping)
        for data in (encode([Ping(1)]) + bad, encode([Ping(2)]), b""):
            with pytest.raises(ChannelError):
                decoder.feed(data)


def test_nesting_without_end_is_a_channel_error() -> None:
    with pytest.raises(ChannelError, match="does not decode"):
        Decoder[object](Any).feed(framed(b"\x91" * 100_000 + b"\xc0"))


def test_an_error_repeats_nothing_of_the_bytes() -> None:
    body = msgspec.msgpack.encode(["ping", "SECRET"])
    with pytest.raises(ChannelError) as caught:
        Decoder[Ping](Ping).feed(framed(body))
    assert "SECRET" not in str(caught.value)
    assert caught.value.__suppress_context__


CALLS = [
    serving.Call(1, ops.Encrypt(key="alias/a", plaintext=b"p" * 40, aad={"a": "b", "c": "d"}), 500),
    serving.Call(2, ops.CreateKey(token="t" * 8, algorithm="Ed25519", alias="alias/b")),
    serving.Call(3, ops.Verify(key="key-0", message=b"m", signature=b"s", version=2)),
    serving.OpenChannel(),
]


def test_seeded_mutation_raises_channel_errors_only() -> None:
    """And what still decodes encodes to the very bytes that were read."""
    rng = random.Random(20)
    stream = encode(CALLS)
    survived = 0
    for _ in range(20_000):
        mutated = bytearray(stream)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(mutated))
            match rng.randrange(4):
                case 0:
                    mutated[place] = rng.randrange(256)
                case 1:
                    mutated[place] ^= 1 << rng.randrange(8)
                case 2:
                    del mutated[place : place + rng.randint(1, 3)]
                case _:
                    mutated[place:place] = rng.randbytes(rng.randint(1, 3))
        decoder: Decoder[serving.FromWorker] = Decoder(serving.FromWorker, max_record=4096)
        try:
            records = decoder.feed(bytes(mutated))
        except ChannelError:
            continue
        survived += 1
        assert encode(records) == bytes(mutated)[: len(mutated) - decoder.pending_bytes]
    assert survived > 100


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_any_cut_of_any_stream(blobs: list[bytes], data: st.DataObject) -> None:
    stream = encode([Pong(b) for b in blobs])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    decoder: Decoder[Pong] = Decoder(Pong)
    got = [
        r for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) for r in decoder.feed(stream[a:b])
    ]
    assert [r.data for r in got] == blobs


# ── Channel ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pair() -> Iterator[tuple[Channel[Pong], Channel[Pong]]]:
    left, right = (Channel[Pong](s, Pong) for s in socket.socketpair())
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel[Pong]]]:
    """A peer that writes what it likes."""
    theirs, ours = socket.socketpair()
    channel = Channel[Pong](ours, Pong)
    yield theirs, channel
    theirs.close()
    channel.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_many_records_in_one_send_and_one_receive(pair: tuple[Channel[Pong], Channel[Pong]]) -> None:
    left, right = pair
    assert right.receive() == []
    left.send(*(Pong(bytes([i])) for i in range(100)))
    assert not left.wants_write
    assert right.receive() == [Pong(bytes([i])) for i in range(100)]


def test_a_full_socket_queues_in_order_and_flush_goes_on(pair: tuple[Channel[Pong], Channel[Pong]]) -> None:
    left, right = pair
    sent = [Pong(bytes([i]) * 300_000) for i in range(12)]
    for record in sent:
        left.send(record)
    assert left.wants_write
    got: list[Pong] = []
    while len(got) < len(sent):
        got += right.receive()
        left.flush()
    assert got == sent
    assert not left.wants_write
    # What was written no longer counts against the bound.
    for _ in range(MAX_QUEUED_BYTES // MAX_RECORD_BYTES + 2):
        left.send(Pong(bytes(MAX_RECORD_BYTES - 100)))
        while left.wants_write:
            right.receive()
            left.flush()
        right.receive()


def test_a_peer_that_does_not_read_is_cut_off(pair: tuple[Channel[Pong], Channel[Pong]]) -> None:
    left, _ = pair
    sent = 0
    record = Pong(bytes(1 << 20))

    def flood() -> None:
        nonlocal sent
        for _ in range(64):
            left.send(record)
            sent += 1

    with pytest.raises(ChannelError, match="does not read"):
        flood()
    assert sent << 20 <= MAX_QUEUED_BYTES + (4 << 20)


def test_the_peer_is_gone(raw: tuple[socket.socket, Channel[Pong]]) -> None:
    theirs, channel = raw
    theirs.sendall(encode([Pong(b"last")]))
    theirs.close()
    assert channel.receive() == [Pong(b"last")]
    with pytest.raises(ChannelClosedError):
        channel.receive()
    with pytest.raises(ChannelClosedError):
        channel.send(Pong(b""))
    theirs, ours = socket.socketpair()
    other = Channel[Pong](ours, Pong)
    theirs.close()
    with pytest.raises(ChannelClosedError):
        other.send_with_descriptors(Pong(b""), [0])
    other.close()


def test_a_channel_takes_its_own_limit() -> None:
    ours, other = socket.socketpair()
    small = Channel[Pong](other, Pong, max_record=16)
    ours.sendall(encode([Pong(bytes(20))]))
    with pytest.raises(ChannelError, match="limit of 16"):
        small.receive()
    ours.close()
    small.close()


def test_descriptors_travel_and_are_closed_on_exec(pair: tuple[Channel[Pong], Channel[Pong]]) -> None:
    left, right = pair
    read_end, write_end = os.pipe()
    left.send_with_descriptors(Pong(b"take"), [write_end])
    os.close(write_end)
    assert right.receive() == [Pong(b"take")]
    taken = right.take_descriptor()
    assert taken is not None
    assert right.take_descriptor() is None
    assert not os.get_inheritable(taken)
    os.write(taken, b"x")
    assert os.read(read_end, 1) == b"x"
    os.close(taken)
    os.close(read_end)


def test_descriptors_come_out_in_order(pair: tuple[Channel[Pong], Channel[Pong]]) -> None:
    left, right = pair
    pipes = [os.pipe() for _ in range(3)]
    left.send_with_descriptors(Pong(b""), [pipes[0][0], pipes[1][0]])
    left.send_with_descriptors(Pong(b""), [pipes[2][0]])
    while right.receive():
        pass
    for read_end, _ in pipes:
        taken = right.take_descriptor()
        assert taken is not None
        assert os.path.sameopenfile(taken, read_end)
        os.close(taken)
    for ends in pipes:
        for fd in ends:
            os.close(fd)


def test_no_descriptor_leaks() -> None:
    before = descriptors()
    for _ in range(3):
        theirs, ours = socket.socketpair()
        channel = Channel[Pong](ours, Pong)
        socket.send_fds(theirs, [encode([Pong(b"")])], [0] * MAX_DESCRIPTORS)
        channel.receive()
        assert descriptors() == before + 2 + MAX_DESCRIPTORS
        channel.close()
        theirs.close()
    assert descriptors() == before


@pytest.mark.parametrize("bursts", [(MAX_DESCRIPTORS + 1,), (MAX_DESCRIPTORS, 1), (250,)], ids=str)
def test_more_descriptors_than_anyone_takes(bursts: tuple[int, ...]) -> None:
    before = descriptors()
    theirs, ours = socket.socketpair()
    channel = Channel[Pong](ours, Pong)

    def flood() -> None:
        for count in bursts:
            socket.send_fds(theirs, [encode([Pong(b"")])], [0] * count)
            channel.receive()

    with pytest.raises(ChannelError, match="more descriptors"):
        flood()
    channel.close()
    theirs.close()
    assert descriptors() == before


def test_descriptors_do_not_overtake_a_peer_that_does_not_read(
    pair: tuple[Channel[Pong], Channel[Pong]],
) -> None:
    left, _ = pair
    while not left.wants_write:
        left.send(Pong(bytes(100_000)))
    with pytest.raises(ChannelError, match="does not read"):
        left.send_with_descriptors(Pong(b""), [0])


def test_descriptors_with_a_record_larger_than_the_socket() -> None:
    left, right = (Channel[Pong](s, Pong) for s in socket.socketpair())
    left.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    record = Pong(bytes(300_000))
    left.send_with_descriptors(record, [0])
    assert left.wants_write
    got: list[Pong] = []
    while not got:
        got = right.receive()
        left.flush()
    assert got == [record]
    assert not left.wants_write
    left.close()
    right.close()


def test_the_peer_is_who_the_kernel_says() -> None:
    left, right = socket.socketpair()
    peer = peer_of(left)
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())
    left.close()
    right.close()


def test_a_slow_drip_is_not_quadratic() -> None:
    """64 KiB arriving in single bytes, behind one header, costs no copies of what is there."""
    stream = encode([Pong(bytes(1 << 16))])
    decoder: Decoder[Pong] = Decoder(Pong)
    began = time.process_time()
    for i in range(len(stream)):
        decoder.feed(stream[i : i + 1])
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20


def test_a_channel_may_have_wider_bounds() -> None:
    """Of a manifest, say; the other channels keep theirs."""
    size = 2 * MAX_RECORD_BYTES
    wide = {"max_record": size + 64, "max_sent": size + 64, "max_queued": MAX_QUEUED_BYTES}
    left, right = (Channel[Pong](s, Pong, **wide) for s in socket.socketpair())
    record = Pong(bytes(size))
    left.send(record)
    got: list[Pong] = []
    while not got:
        left.flush()
        got = right.receive()
    assert got == [record]
    with pytest.raises(ChannelError, match="over the limit"):
        left.send(Pong(bytes(size + 64)))

    def flood() -> None:
        for _ in range(4):
            left.send(record)

    with pytest.raises(ChannelError, match="does not read"):
        flood()
    left.close()
    right.close()
    left, right = (Channel[Pong](s, Pong) for s in socket.socketpair())
    with pytest.raises(ChannelError, match="over the limit"):
        left.send(record)
    left.close()
    right.close()
