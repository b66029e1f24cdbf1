"""Promise: batches and files are served like everything else: measured, recorded once, refused whole."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestlib import files
from guestlib.errors import ConflictError, InvalidCiphertextError, MalformedError, WrongStateError
from guestlib.filestream import FileError
from guestlib.wire.messages import DecryptedItem
from tests.e2e.harness import Host, adopted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shared(binary: Path) -> Iterator[Host]:
    with adopted(binary) as host:
        yield host


def test_batches(shared: Host) -> None:
    client = shared.client()
    shared.serves(client)
    key, other = client.create_key().key.id, client.create_key().key.id
    limits = client.limits()
    count, size = int(limits["batch_items"]), int(limits["batch_bytes"] // limits["batch_items"])
    plaintexts = [os.urandom(size) for _ in range(count)]
    before = len(shared.ledger())
    sealed = client.encrypt_many(key, [(p, {"n": str(n)}) for n, p in enumerate(plaintexts)])
    result = client.decrypt_many(key, [(c, {"n": str(n)}) for n, c in enumerate(sealed.ciphertexts)])
    assert result.items == tuple(DecryptedItem(p, 1) for p in plaintexts)
    entries = [e for e in shared.ledger()[before:] if e.get("op", "").endswith("Many")]
    assert [(e["op"], e["key"], e["version"], e["detail"]) for e in entries] == [
        ("EncryptMany", key, 1, f"{count} items"),
        ("DecryptMany", key, 1, f"{count} items"),
    ]
    assert sealed.receipt is not None
    assert entries[0]["seq"] == sealed.receipt.ledger
    # One item's error is its own.
    foreign = client.encrypt(other, b"x").ciphertext
    first = sealed.ciphertexts[0]
    items = client.decrypt_many(key, [(first, {"n": "0"}), (first, None), (foreign, None)]).items
    assert [type(item) for item in items] == [DecryptedItem, InvalidCiphertextError, ConflictError]
    for wrong in ([(b"", None)] * (count + 1), []):
        with pytest.raises(MalformedError):
            client.encrypt_many(key, wrong)
    with pytest.raises(WrongStateError):
        client.mac_many(key, [b"m"])
    signing = client.create_key("Ed25519").key.id
    signatures = client.sign_many(signing, [b"a", b"b"]).signatures
    verdict = client.verify_many(signing, [(b"a", signatures[0]), (b"b", signatures[0])])
    assert verdict.valid == (True, False)
    macs = client.create_key("HMAC-SHA-256").key.id
    made = client.mac_many(macs, [b"a"]).macs
    assert client.verify_mac_many(macs, [(b"a", made[0]), (b"b", made[0])]).valid == (True, False)


def test_files(shared: Host) -> None:
    client = shared.client()
    shared.serves(client)
    key = client.create_key(alias="alias/files").key.id
    plaintext = os.urandom(3 << 20) + b"end"
    plain, sealed, back = (shared.directory / name for name in ("plain", "sealed", "back"))
    plain.write_bytes(plaintext)
    aad = {"host": "web1"}
    done = files.encrypt_file(client, "alias/files", plain, sealed, aad)
    assert (done.key, done.version, done.plaintext_bytes) == (key, 1, len(plaintext))
    client.rotate(key)
    files.decrypt_file(client, sealed, back, aad)
    assert back.read_bytes() == plaintext
    for wrong in ({}, {"host": "web2"}):
        with pytest.raises(FileError):
            files.decrypt_stream(client, io.BytesIO(sealed.read_bytes()), io.BytesIO(), wrong)
    client.shred(key)
    with pytest.raises(WrongStateError):
        files.decrypt_file(client, sealed, back, aad)
    assert back.read_bytes() == plaintext


def test_the_command_through_pipes(shared: Host) -> None:
    client = shared.client()
    shared.serves(client)
    key = client.create_key().key.id
    plaintext = os.urandom(1 << 20)

    def guest(*arguments: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
        head = ["--address", f"unix:{shared.guest_socket}", "--trust", str(shared.directory / "trust.json")]
        return subprocess.run(
            [sys.executable, "-m", "guestlib.cli", *head, "--channel-ca-only", "file", *arguments],
            input=data, capture_output=True, timeout=60, cwd=ROOT, check=False,
        )  # fmt: skip

    sealed = guest("encrypt", key, "--aad", "a=b", data=plaintext)
    assert sealed.returncode == 0, sealed.stderr
    opened = guest("decrypt", "--aad", "a=b", data=sealed.stdout)
    assert (opened.returncode, opened.stdout) == (0, plaintext)
    cut = guest("decrypt", "--aad", "a=b", data=sealed.stdout[:-1])
    assert cut.returncode == 6
    assert b"segment 3" in cut.stderr
    assert plaintext.startswith(cut.stdout)
    wrong = guest("decrypt", data=sealed.stdout)
    assert (wrong.returncode, wrong.stdout) == (6, b"")
