"""The vault's link to the TPM with somebody on the wire: a quote that is not this host's is none."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support_tpm import Embedded

from guestlib.attest.quote import attestation_key, verify_quote
from guestlib.attest.tpm2 import parse_public
from hostd.config import Config, Host
from hostd.config import Tpm as TpmSettings
from hostd.ipc.loop import Loop
from hostd.platform.tpm import Tpm
from hostd.platform.tpm_errors import TpmError
from hostd.platform.tpm_files import encode_blob, encode_record, write_file
from hostd.platform.tpm_tcti import SocketLink
from hostd.vault.counters import Counters
from hostd.vault.tpmlink import Quoted, TpmLink

QUOTE = 0x158
ATTEST_AT = 16
"""In TPM2_Quote's response: header (10), parameter size (4), size of the TPM2B_ATTEST (2)."""


class Wire:
    """Stands between the vault and the TPM, and alters the responses to TPM2_Quote."""

    def __init__(self, path: Path, tpm: Path) -> None:
        self.alter: Callable[[bytes], bytes] = lambda response: response
        self.quotes: list[bytes] = []
        self._tpm = SocketLink(tpm)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                command = connection.recv(4096)
                if not command:
                    continue
                response = self._tpm.exchange(command, time.monotonic() + 20)
                if int.from_bytes(command[6:10], "big") == QUOTE:
                    self.quotes.append(response)
                    response = self.alter(response)
                connection.sendall(response)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


class Bench:
    def __init__(self, folder: Path, host: Embedded, tpm: Tpm) -> None:
        self.wire = Wire(folder / "wire", host.process.socket)
        self.loop = Loop()
        write_file(folder / "tpm.json", encode_record(host.record))
        write_file(folder / "root.json", encode_blob(tpm.seal(bytes(32), tpm.read_pcrs((0, 7)))))
        config = Config(
            host=Host(state_dir=str(folder), run_dir=str(folder)),
            tpm=TpmSettings(device=f"unix:{folder / 'wire'}"),
        )
        self.link = TpmLink(config, self.loop, Counters())

    def quote(self, qualifying: bytes) -> Quoted | TpmError:
        told: list[Quoted | TpmError] = []
        self.link.quote(qualifying, told.append)
        end = time.monotonic() + 30
        while not told:
            assert time.monotonic() < end
            self.loop.run_once(0.1)
        return told[0]

    def close(self) -> None:
        self.link.close()
        self.wire.close()
        self.loop.close()


@pytest.fixture
def bench(tmp_path: Path, host: Embedded, tpm: Tpm) -> Iterator[Bench]:
    made = Bench(tmp_path, host, tpm)
    yield made
    made.close()


def flip(index: int) -> Callable[[bytes], bytes]:
    def altered(response: bytes) -> bytes:
        data = bytearray(response)
        data[index] ^= 1
        return bytes(data)

    return altered


def test_an_honest_wire_changes_nothing(bench: Bench, host: Embedded) -> None:
    quoted = bench.quote(b"q" * 32)
    assert isinstance(quoted, Quoted)
    assert quoted.pcrs.keys() == {0, 7, 10}
    key = attestation_key(parse_public(host.record.ak_public))
    verify_quote(key, quoted.quote.attest, quoted.quote.signature, b"q" * 32, quoted.pcrs)


def test_no_altered_quote_is_taken(bench: Bench) -> None:
    assert isinstance(bench.quote(b"q" * 32), Quoted)
    response = bench.wire.quotes[-1]
    attest = int.from_bytes(response[ATTEST_AT - 2 : ATTEST_AT], "big")
    # Clock, resets and firmware version tell of nothing that the values could contradict.
    parameters = int.from_bytes(response[10:14], "big")
    for index in range(ATTEST_AT, 14 + parameters, 3):
        bench.wire.alter = flip(index)
        result = bench.quote(b"q" * 32)
        assert isinstance(result, TpmError), f"byte {index} of {len(response)}, attest is {attest} bytes"
    bench.wire.alter = lambda response: response
    assert isinstance(bench.quote(b"q" * 32), Quoted)


def test_an_earlier_quote_is_not_taken(bench: Bench) -> None:
    assert isinstance(bench.quote(b"one" * 10), Quoted)
    earlier = bench.wire.quotes[-1]
    bench.wire.alter = lambda _response: earlier
    assert isinstance(bench.quote(b"two" * 10), TpmError)
    # The very same question has the very same answer: freshness is the asker's, by what it asks for.
    assert isinstance(bench.quote(b"one" * 10), Quoted)


def test_whoever_is_told_of_a_failure_is_not_kept(bench: Bench) -> None:
    """A batch hangs on it, with what was decrypted for its requests."""

    class Batch(list[Quoted | TpmError]):
        pass

    def fails() -> weakref.ref[Batch]:
        batch = Batch()
        bench.link.quote(b"q" * 32, lambda result: batch.append(result))
        end = time.monotonic() + 30
        while not batch:
            assert time.monotonic() < end
            bench.loop.run_once(0.1)
        assert isinstance(batch[0], TpmError)
        return weakref.ref(batch)

    gc.disable()
    try:
        bench.wire.alter = flip(ATTEST_AT)
        gone = fails()
        bench.wire.alter = lambda response: response
        end = time.monotonic() + 30
        while gone() is not None:  # the worker's threads keep the latest
            assert time.monotonic() < end
            assert isinstance(bench.quote(b"q" * 32), Quoted)
    finally:
        gc.enable()


def test_a_quote_without_a_signature_is_not_taken(bench: Bench) -> None:
    def cut(response: bytes) -> bytes:
        return response[:2] + (10).to_bytes(4, "big") + (0x101).to_bytes(4, "big")

    bench.wire.alter = cut
    assert isinstance(bench.quote(b"q" * 32), TpmError)
