"""Records, sealed files, offline policy."""

from __future__ import annotations

import json
import random
import stat
from pathlib import Path

import pytest
from support_tpm import Embedded

from hostd.platform.tpm import Tpm
from hostd.platform.tpm_errors import TpmBlobError
from hostd.platform.tpm_files import (
    MAX_FILE_BYTES,
    encode_blob,
    encode_record,
    parse_blob,
    parse_record,
    read_file,
    sealed_blob,
    write_file,
)
from hostd.platform.tpm_policy import check_selection, marshal_selection, pcr_digest, policy_pcr

BLOB = sealed_blob(b"\0\x02pp", b"\0\x02qq", {7: bytes(32), 10: bytes([1]) * 32})


def test_round_trips(host: Embedded) -> None:
    assert parse_record(encode_record(host.record)) == host.record
    assert parse_blob(encode_blob(BLOB)) == BLOB


def test_truncated_or_longer_files(host: Embedded) -> None:
    for data, parse in ((encode_blob(BLOB), parse_blob), (encode_record(host.record), parse_record)):
        for size in range(len(data)):
            with pytest.raises(TpmBlobError):
                parse(data[:size])
        for tail in (b" ", b"\n", b"{}", b"\0"):
            with pytest.raises(TpmBlobError):
                parse(data + tail)


def test_mutated_files_only_raise_their_error(host: Embedded) -> None:
    chance = random.Random(7)
    for data, parse in ((encode_blob(BLOB), parse_blob), (encode_record(host.record), parse_record)):
        for _ in range(2000):
            mutant = bytearray(data)
            for _ in range(chance.randint(1, 3)):
                mutant[chance.randrange(len(mutant))] = chance.randrange(256)
            try:
                parse(bytes(mutant))
            except TpmBlobError:
                continue


@pytest.mark.parametrize(
    "pcrs",
    [
        {},
        {"24": "00" * 32},
        {"-1": "00" * 32},
        {"07": "00" * 32},
        {"7": "00" * 31},
        {"7": "0" * 63},
        {"7": "AA" * 32},
        {"x": "00" * 32},
        {"7": "00" * 32, "07": "00" * 32},
    ],
)
def test_pcrs_that_are_none(pcrs: dict[str, str]) -> None:
    fields = json.loads(encode_blob(BLOB))
    fields["pcrs"] = pcrs
    with pytest.raises(TpmBlobError):
        parse_blob(json.dumps(fields, indent=2).encode() + b"\n")


@pytest.mark.parametrize("change", [{"format": "hostd-sealed/2"}, {"more": 1}, {"public": 5}])
def test_other_fields(change: dict[str, object]) -> None:
    fields = json.loads(encode_blob(BLOB)) | change
    with pytest.raises(TpmBlobError):
        parse_blob(json.dumps(fields, indent=2).encode() + b"\n")


def test_a_file_is_whole_private_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "tpm.json"
    write_file(path, b"old")
    write_file(path, b"new")
    assert read_file(path) == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="absent"):
        write_file(tmp_path / "absent" / "x", b"")
    path.write_bytes(bytes(MAX_FILE_BYTES + 1))
    for broken in (path, tmp_path / "none"):
        with pytest.raises(TpmBlobError):
            read_file(broken)
    with pytest.raises(TpmBlobError, match="over"):
        parse_blob(bytes(MAX_FILE_BYTES + 1))


def test_offline_policy_is_the_tpms(tpm: Tpm) -> None:
    from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE

    values = tpm.read_pcrs((0, 7, 9, 23))
    esys = tpm._esys
    session = esys.call(
        "StartAuthSession",
        lambda e: e.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.TRIAL, None, TPM2_ALG.SHA256),
    )
    with esys.flushing(session):
        esys.call("PolicyPCR", lambda e: e.policy_pcr(session, b"", "sha256:0,7,9,23"))
        digest = esys.call("PolicyGetDigest", lambda e: bytes(e.policy_get_digest(session)))
    assert digest == policy_pcr(values)


def test_selection() -> None:
    assert check_selection({9, 0, 7}) == (0, 7, 9)
    assert marshal_selection((0, 7, 9, 23)) == bytes.fromhex("00000001 000b 03 810280")
    with pytest.raises(ValueError, match="32 bytes"):
        pcr_digest({0: bytes(31)})
