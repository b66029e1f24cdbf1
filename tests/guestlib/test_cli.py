"""The command line, as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostd.core.keys import Algorithm
from tests.gateway.conftest import GatewayProcess
from tests.gateway.support_vault import ChannelCa, SimulatedVault

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(gateway: GatewayProcess, vault: SimulatedVault) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    trust = gateway.run / "trust.json"
    trust.write_text(json.dumps({"format": "hostd-trust/1", "require": ["ima"], "channel_ca": vault.ca.pem}))

    def make(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        head = [
            "--address",
            f"unix:{gateway.path}",
            "--trust",
            str(trust),
            "--channel-ca-only",
            "--timeout",
            "5",
        ]
        return subprocess.run(
            [sys.executable, "-m", "guestlib.cli", *head, *arguments],
            input=data,
            capture_output=True,
            cwd=ROOT,
            timeout=20,
            check=False,
        )

    return make


def test_help_names_what_may_be_chosen(run: Callable[..., subprocess.CompletedProcess[bytes]]) -> None:
    said = run("create-key", "--help").stdout.decode()
    assert [algorithm for algorithm in Algorithm if algorithm not in said] == []
    codes = run("--help").stdout.decode().partition("Exit codes:")[2]
    assert [code for code in "23456" if f"{code} " not in codes] == []


def test_a_round_trip_is_binary_safe(
    run: Callable[..., subprocess.CompletedProcess[bytes]], run_dir: Path
) -> None:
    data = bytes(range(256))
    sealed = run("encrypt", "alias/a", "--aad", "env=prod", data=data)
    assert (sealed.returncode, sealed.stdout) == (0, b"CT" + data[::-1])
    (run_dir / "sealed").write_bytes(sealed.stdout)
    assert run("decrypt", str(run_dir / "sealed"), "--aad", "env=prod").stdout == data
    shown = json.loads(run("--json", "encrypt", "k", data=b"").stdout)
    assert shown["ciphertext"] == "Q1Q="
    assert shown["receipt"]["passed"] == 3


def test_options_stand_anywhere(
    run: Callable[..., subprocess.CompletedProcess[bytes]], run_dir: Path
) -> None:
    (run_dir / "file").write_bytes(b"hi")
    for arguments in (
        ["k", "--aad", "a=b", "file"],
        ["--aad", "a=b", "k", "file"],
        ["k", "file", "--aad", "a=b"],
    ):
        done = run("encrypt", *(str(run_dir / "file") if one == "file" else one for one in arguments))
        assert (done.returncode, done.stdout) == (0, b"CTih")
    assert run("encrypt", "k", "--aad", "a=b", "file", "more").returncode == 2
    assert run("encrypt", "--aad", "a=b").stderr.startswith(
        b"error: the following arguments are required: KEY"
    )


def test_signatures(run: Callable[..., subprocess.CompletedProcess[bytes]], run_dir: Path) -> None:
    signature = run_dir / "signature"
    signature.write_bytes(run("sign", "k", data=b"message").stdout)
    good = run("verify", "k", "--signature", str(signature), data=b"message")
    assert (good.returncode, good.stdout) == (0, b"valid\n")
    bad = run("verify", "k", "--signature", str(signature), data=b"other")
    assert (bad.returncode, bad.stdout) == (6, b"")
    assert bad.stderr.startswith(b"error: invalid_signature: ")
    assert b"\nhint: " in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nonsense"], 2),
        (["encrypt", "k", "/nonexistent"], 2),
        (["encrypt", "k", "--aad", "x"], 2),
        (["shred", "k"], 2),
        (["data-key", "k"], 2),
        (["describe-key", "missing"], 3),
        (["random", "0"], 3),
        (["--address", "unix:/nonexistent", "health"], 5),
        (["--address", "tcp:1", "health"], 2),
        (["--trust", "/nonexistent", "health"], 2),
        (["--timeout", "1", "describe-key", "hold"], 5),
    ],
)
def test_exit_codes(
    run: Callable[..., subprocess.CompletedProcess[bytes]], arguments: list[str], code: int
) -> None:
    result = run(*arguments)
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith(b"error: ")
    assert b"Traceback" not in result.stderr
    assert result.stdout == b""


def test_the_rest(run: Callable[..., subprocess.CompletedProcess[bytes]], run_dir: Path) -> None:
    assert run("create-key", "--alias", "alias/x").stdout == b"key-1\n"
    assert run("list-keys").stdout.count(b"\n") == 250
    assert run("health").stdout == b"gate: open\nima: verified\n"
    assert len(run("random", "16").stdout) == 16
    assert run("public-key", "k").stdout == b"-----BEGIN PUBLIC KEY-----\nREVS\n-----END PUBLIC KEY-----\n"
    assert run("public-key", "k", "--der").stdout == b"DER"
    assert run("data-key", "k", "--ciphertext", str(run_dir / "dk")).stdout == b"k" * 32
    assert (run_dir / "dk").read_bytes() == b"CT"
    assert b"key-1" in run("shred", "k", "--yes").stdout
    assert b"key-1" in run("rotate", "k").stdout
    (run_dir / "mac").write_bytes(run("mac", "k", data=b"m").stdout)
    assert run("verify-mac", "k", "--mac", str(run_dir / "mac"), data=b"m").returncode == 0
    out, log = run_dir / "evidence", run_dir / "log"
    assert (
        run("evidence", "get", "--nonce", "00" * 16, "--out", str(out), "--log", str(log)).stdout
        == b"00" * 16 + b"\n"
    )
    assert log.read_bytes() == b"12345"


def test_files(run: Callable[..., subprocess.CompletedProcess[bytes]], run_dir: Path) -> None:
    data = bytes(range(256)) * 3000
    (run_dir / "plain").write_bytes(data)
    plain, sealed, back = (str(run_dir / name) for name in ("plain", "sealed", "back"))
    done = run("--json", "file", "encrypt", "k", plain, "-o", sealed, "--aad", "a=b", "--segment-bits", "16")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plaintext_bytes"] == len(data)
    assert (run_dir / "sealed").read_bytes().startswith(b"HDF1\x10")
    piped = run("file", "encrypt", "k", "--aad", "a=b", data=data)
    assert piped.returncode == 0
    assert piped.stderr == b""  # no terminal, no progress
    assert b"k" * 32 not in piped.stdout
    # The simulator opens every ciphertext to something: that it is no data key is found here.
    refused = run("file", "decrypt", sealed, "-o", back, "--aad", "a=b")
    assert (refused.returncode, refused.stdout) == (6, b"")
    assert b"invalid_file" in refused.stderr
    assert b"hint: use nothing" in refused.stderr
    for wrong in ([str(run_dir / "none")], [plain, "-o", str(run_dir)]):
        assert run("file", "encrypt", "k", *wrong).returncode == 2
    assert run("file", "encrypt", "missing", plain).returncode == 3
    names = {path.name for path in run_dir.iterdir()}
    assert "back" not in names
    assert not [name for name in names if name.endswith(".part")]


def test_another_channel_ca_is_told_as_one(
    run: Callable[..., subprocess.CompletedProcess[bytes]], vault: SimulatedVault
) -> None:
    assert run("random", "4").returncode == 0
    vault.ca = ChannelCa()
    done = run("random", "4")
    assert done.returncode == 6
    assert b"14 channel certificate: " in done.stderr
    assert b"the host's channel CA has changed" in done.stderr
    assert b"needs a new trust bundle" in done.stderr
