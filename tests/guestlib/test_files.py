"""Encrypted files: every size, every damage, every kind of pipe, and no more memory for more data."""

from __future__ import annotations

import hmac
import io
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from guestlib import files, filestream
from guestlib.errors import ConflictError, InvalidCiphertextError, VerificationError
from guestlib.files import decrypt_file, decrypt_stream, encrypt_file, encrypt_stream
from guestlib.filestream import Damage, FileError, Header, Opener, Sealer
from guestlib.wire.messages import DataKey, Decrypted

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests" / "data" / "files"
SEGMENT = 4096
AAD = {"path": "/srv/backup", "n": "1"}


class LocalKeys:
    """Makes and opens data keys as the host does, under one key; what it wraps names itself."""

    def __init__(self) -> None:
        self.made: dict[bytes, tuple[bytes, dict[str, str]]] = {}
        self.asked = 0

    def generate_data_key(self, key: str, aad: object = None, *, length: int = 32) -> DataKey:
        self.asked += 1
        plaintext, wrapped = os.urandom(length), b"W" + os.urandom(40)
        self.made[wrapped] = plaintext, dict(cast("dict[str, str]", aad or {}))
        return DataKey(None, wrapped, key, 1, plaintext)

    def decrypt(self, ciphertext: bytes, aad: object = None, *, key: str | None = None) -> Decrypted:
        found = self.made.get(ciphertext)
        if found is None or found[1] != dict(cast("dict[str, str]", aad or {})):
            raise InvalidCiphertextError("they do not belong together")
        if key not in (None, "k"):
            raise ConflictError("the ciphertext is of another key")
        return Decrypted(None, found[0], "k", 1)


class Trickle(io.RawIOBase):
    """A pipe that gives and takes what it likes."""

    def __init__(self, data: bytes = b"", step: int = 1000) -> None:
        self.data, self.step, self.taken = data, step, bytearray()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        part, self.data = self.data[: min(size, self.step)], self.data[min(size, self.step) :]
        return part

    def write(self, data: object) -> int:
        part = bytes(cast("bytes", data))[: self.step]
        self.taken += part
        return len(part)


def sealed(keys: LocalKeys, plaintext: bytes, aad: dict[str, str] | None = None, bits: int = 12) -> bytes:
    target = io.BytesIO()
    encrypt_stream(keys, "k", io.BytesIO(plaintext), target, aad, segment_bits=bits)
    return target.getvalue()


def opened(keys: LocalKeys, data: bytes, aad: dict[str, str] | None = None) -> bytes:
    target = io.BytesIO()
    decrypt_stream(keys, io.BytesIO(data), target, aad)
    return target.getvalue()


def damage(keys: LocalKeys, data: bytes, aad: dict[str, str] | None = None) -> tuple[Damage, int | None]:
    """What is said of a damaged file; what came out before is a beginning of the plaintext."""
    target = io.BytesIO()
    with pytest.raises(FileError) as caught:
        decrypt_stream(keys, io.BytesIO(data), target, aad)
    assert target.getvalue() == PLAIN[: len(target.getvalue())]
    assert len(target.getvalue()) == SEGMENT * (caught.value.segment or 0)
    return caught.value.damage, caught.value.segment


PLAIN = bytes(range(251)) * 82  # 5 segments and a part of the sixth


def parts(data: bytes) -> tuple[bytes, list[bytes]]:
    """Header and segments."""
    end = filestream.FIXED_BYTES + filestream.rest_of_header(data[: filestream.FIXED_BYTES])
    size = SEGMENT + filestream.TAG_BYTES
    return data[:end], [data[n : n + size] for n in range(end, len(data), size)]


# ── Sizes ─────────────────────────────────────────────────────────────────────────────────────────

EDGES = st.builds(
    lambda n, off: max(0, n * SEGMENT + off), st.integers(0, 4), st.sampled_from([-2, -1, 0, 1, 2])
)


@given(
    st.one_of(EDGES, st.integers(0, 5 * SEGMENT)), st.dictionaries(st.text("ab", min_size=1), st.text("xé"))
)
@settings(max_examples=60, deadline=None)
def test_every_size_comes_back(size: int, aad: dict[str, str]) -> None:
    keys = LocalKeys()
    plaintext = os.urandom(size)
    data = sealed(keys, plaintext, aad)
    header, segments = parts(data)
    assert len(segments) == max(1, -(-size // SEGMENT))
    assert len(data) == len(header) + size + 16 * len(segments)
    assert opened(keys, data, aad) == plaintext


@pytest.mark.parametrize("step", [1, 7, 4095, 4096, 4097, 1 << 20])
def test_pipes_that_give_and_take_little(step: int) -> None:
    keys = LocalKeys()
    plaintext = PLAIN[: 3000 if step == 1 else None]
    middle, end = Trickle(step=step), Trickle(step=step)
    seen: list[int] = []
    encrypt_stream(
        keys, "k", cast("BinaryIO", Trickle(plaintext, step)), cast("BinaryIO", middle), segment_bits=12,
        progress=seen.append,
    )  # fmt: skip
    assert seen == [*range(SEGMENT, len(plaintext), SEGMENT), len(plaintext)]
    seen.clear()
    source = Trickle(bytes(middle.taken), step)
    done = decrypt_stream(keys, cast("BinaryIO", source), cast("BinaryIO", end), progress=seen.append)
    assert seen[-1] == done.plaintext_bytes == len(plaintext)
    assert done.file_bytes == len(middle.taken)
    assert bytes(end.taken) == plaintext


def test_two_files_of_one_plaintext_have_nothing_in_common() -> None:
    keys = LocalKeys()
    first, second = sealed(keys, PLAIN), sealed(keys, PLAIN)
    assert keys.asked == 2
    assert not {*parts(first)[1]} & {*parts(second)[1]}


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────


def test_each_kind_of_damage_has_its_name() -> None:
    keys = LocalKeys()
    data = sealed(keys, PLAIN, AAD)
    header, segments = parts(data)
    _, others = parts(sealed(keys, PLAIN, AAD))
    assert len(segments) == 6
    assert opened(keys, data, AAD) == PLAIN

    def of(*pieces: bytes) -> tuple[Damage, int | None]:
        return damage(keys, header + b"".join(pieces), AAD)

    s = segments
    # Truncated: at every boundary, the whole body, in the middle of a segment.
    for count in range(1, 6):
        assert of(*s[:count]) == (Damage.TRUNCATED, count - 1)
    assert of() == (Damage.TRUNCATED, 0)
    assert of(*s[:2], s[2][:-1]) == (Damage.ALTERED, 2)
    assert of(*s[:5], s[5][:-1]) == (Damage.ALTERED, 5)
    # Extended: by a byte, a segment, its own beginning, a whole file.
    assert of(*s, b"x")[0] in (Damage.ALTERED, Damage.EXTENDED)
    full = sealed(keys, PLAIN[: 2 * SEGMENT], AAD)
    for more in (b"x", s[0], full):
        assert damage(keys, full + more, AAD) == (Damage.EXTENDED, 1)
    # Moved: swapped, repeated, left out, reversed.
    assert of(s[1], s[0], *s[2:]) == (Damage.MOVED, 0)
    assert of(s[0], s[0], *s[1:]) == (Damage.MOVED, 1)
    assert of(*s[:5], s[4], s[5]) == (Damage.MOVED, 5)
    assert of(s[0], *s[2:]) == (Damage.MOVED, 1)
    assert of(*s[1:]) == (Damage.MOVED, 0)
    assert of(*s[:4], s[5]) == (Damage.MOVED, 4)
    # Spliced with another file's segments, at every place; and altered at every segment.
    for place in range(6):
        assert of(*s[:place], others[place], *s[place + 1 :]) == (Damage.ALTERED, place)
        changed = bytes([s[place][0] ^ 1]) + s[place][1:]
        assert of(*s[:place], changed, *s[place + 1 :]) == (Damage.ALTERED, place)


def test_every_byte_of_the_header_counts() -> None:
    keys = LocalKeys()
    data = sealed(keys, PLAIN[:10], AAD)
    header, _ = parts(data)
    for place in range(len(header)):
        for flip in (1, 0x80):
            changed = data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
            with pytest.raises(FileError) as caught:
                opened(keys, changed, AAD)
            assert caught.value.damage in (
                Damage.HEADER, Damage.NO_FILE, Damage.VERSION, Damage.TRUNCATED
            )  # fmt: skip
            assert caught.value.segment is None
    for end in range(len(header)):
        with pytest.raises(FileError) as caught:
            opened(keys, data[:end], AAD)
        assert caught.value.damage in (Damage.NO_FILE, Damage.TRUNCATED)


def test_another_files_header_or_key_does_not_serve() -> None:
    keys = LocalKeys()
    first, second = sealed(keys, PLAIN, AAD), sealed(keys, PLAIN, AAD)
    (header, segments), (other, _) = parts(first), parts(second)
    assert damage(keys, other + b"".join(segments), AAD) == (Damage.ALTERED, 0)
    # The wrapped key of the other file in this header.
    place = filestream.FIXED_BYTES
    mixed = header[:place] + other[place : -filestream.MAC_BYTES] + header[-filestream.MAC_BYTES :]
    assert damage(keys, mixed + b"".join(segments), AAD) == (Damage.HEADER, None)


def test_the_segment_size_is_bound_even_if_the_keys_would_still_fit() -> None:
    key, salt = bytes(32), bytes(16)
    twelve, thirteen = Header(12, salt, b"w"), Header(13, salt, b"w")
    mac = Sealer(key, twelve, {}).header[-32:]
    Opener(key, Header(12, salt, b"w", mac), {})
    with pytest.raises(FileError):
        Opener(key, Header(13, salt, b"w", mac), {})
    assert Sealer(key, thirteen, {}).header[-32:] != mac


def test_the_additional_data_is_bound_by_the_host_and_by_the_file() -> None:
    keys = LocalKeys()
    data = sealed(keys, PLAIN, AAD)
    for wrong in ({}, {"path": "/srv/backup"}, {**AAD, "n": "2"}, {**AAD, "m": ""}):
        assert damage(keys, data, wrong) == (Damage.HEADER, None)
    header = filestream.parse_header(parts(data)[0])
    data_key = keys.made[header.wrapped][0]
    Opener(data_key, header, AAD)
    with pytest.raises(FileError):  # whoever has the data key still needs the right one
        Opener(data_key, header, {})
    with pytest.raises(FileError) as caught:
        Opener(data_key[:31], header, AAD)
    assert caught.value.damage is Damage.KEY


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_mutation_is_found_before_a_wrong_byte_comes_out(data: st.DataObject) -> None:
    keys = LocalKeys()
    good = sealed(keys, PLAIN, AAD)
    place = data.draw(st.integers(0, len(good) - 1))
    length = data.draw(st.integers(0, 200))
    kind = data.draw(st.sampled_from(["replace", "remove", "insert", "copy", "cut"]))
    new = data.draw(st.binary(min_size=length, max_size=length))
    match kind:
        case "replace":
            bad = good[:place] + new + good[place + length :]
        case "remove":
            bad = good[:place] + good[place + length :]
        case "insert":
            bad = good[:place] + new + good[place:]
        case "copy":
            bad = good[:place] + good[place : place + length] + good[place:]
        case _:
            bad = good[:place]
    target = io.BytesIO()
    if bad == good:
        decrypt_stream(keys, io.BytesIO(bad), target, AAD)
        assert target.getvalue() == PLAIN
        return
    with pytest.raises(FileError):
        decrypt_stream(keys, io.BytesIO(bad), target, AAD)
    assert PLAIN.startswith(target.getvalue())
    assert len(target.getvalue()) % SEGMENT == 0


def test_a_form_that_is_not_the_one_form_is_refused() -> None:
    """Whoever has the key may not write one plaintext in two ways: an empty last segment."""
    header = Header(12, bytes(16), b"w")
    sealer = Sealer(bytes(32), header, {})
    full = sealer.seal(bytes(SEGMENT), last=False)
    with pytest.raises(ValueError, match="no segment"):
        sealer.seal(b"", last=True)
    with pytest.raises(ValueError, match="no segment"):
        sealer.seal(bytes(SEGMENT - 1), last=False)
    with pytest.raises(ValueError, match="no segment"):
        sealer.seal(bytes(SEGMENT + 1), last=True)
    short = sealer._aead.encrypt(filestream._nonce(0, False), b"short", None)
    with pytest.raises(FileError):
        Opener(bytes(32), filestream.parse_header(sealer.header), {}).open(short, last=False)
    empty = sealer._aead.encrypt(filestream._nonce(1, True), b"", None)
    opener = Opener(bytes(32), filestream.parse_header(sealer.header), {})
    opener.open(full, last=False)
    with pytest.raises(FileError):
        opener.open(empty, last=True)
    sealer.seal(b"end", last=True)
    with pytest.raises(ValueError, match="no segment"):
        sealer.seal(b"more", last=True)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = LocalKeys()
    for bits in (11, 21):
        with pytest.raises(ValueError, match="segments of"):
            sealed(keys, b"", bits=bits)
    assert keys.asked == 0
    with pytest.raises(ValueError, match="wrapped key"):
        Header(12, bytes(16), bytes(filestream.MAX_WRAPPED_BYTES + 1))
    with pytest.raises(ValueError, match="salt"):
        Header(12, bytes(15), b"w")
    monkeypatch.setattr(filestream, "MAX_SEGMENTS", 2)
    with pytest.raises(ValueError, match="too many"):
        sealed(keys, PLAIN)


def test_other_errors_are_the_hosts_own() -> None:
    keys = LocalKeys()
    data = sealed(keys, b"x")
    with pytest.raises(ConflictError):
        decrypt_stream(keys, io.BytesIO(data), io.BytesIO(), key="other")
    with pytest.raises(VerificationError):
        opened(keys, b"")


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_come_whole_or_not_at_all(tmp_path: Path) -> None:
    keys = LocalKeys()
    (tmp_path / "plain").write_bytes(PLAIN)
    done = encrypt_file(keys, "k", tmp_path / "plain", tmp_path / "sealed", AAD, segment_bits=12)
    assert done.file_bytes == (tmp_path / "sealed").stat().st_size
    assert stat.S_IMODE((tmp_path / "sealed").stat().st_mode) == 0o600
    decrypt_file(keys, tmp_path / "sealed", tmp_path / "back", AAD)
    assert (tmp_path / "back").read_bytes() == PLAIN
    # Damaged at its end: what was there stays, and nothing is left beside it.
    whole = (tmp_path / "sealed").read_bytes()
    (tmp_path / "sealed").write_bytes(whole[:-1])
    (tmp_path / "back").write_bytes(b"before")
    for target in ("back", "new"):
        with pytest.raises(FileError):
            decrypt_file(keys, tmp_path / "sealed", tmp_path / target, AAD)
    assert (tmp_path / "back").read_bytes() == b"before"
    assert left(tmp_path) == {"plain", "sealed", "back"}
    # In place.
    encrypt_file(keys, "k", tmp_path / "plain", tmp_path / "plain")
    decrypt_file(keys, tmp_path / "plain", tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == PLAIN


def test_targets(tmp_path: Path) -> None:
    keys = LocalKeys()
    (tmp_path / "plain").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        encrypt_file(keys, "k", tmp_path / "plain", tmp_path / "pipe")
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    encrypt_file(keys, "k", tmp_path / "plain", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert opened(keys, (tmp_path / "real").read_bytes()) == b"x"
    with pytest.raises(FileNotFoundError):
        encrypt_file(keys, "k", tmp_path / "plain", tmp_path / "none" / "x")
    with pytest.raises(FileNotFoundError):
        encrypt_file(keys, "k", tmp_path / "none", tmp_path / "x")
    assert left(tmp_path) == {"plain", "pipe", "real", "link"}


def test_the_name_comes_after_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"), fsync(fd))[1],
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    with files.replacing(tmp_path / "x") as writer:
        writer.write(b"x")
        assert left(tmp_path) != {"x"}
    assert events == ["file", "rename", "folder"]


def test_real_pipes() -> None:
    keys = LocalKeys()
    (from_plain, to_plain), (from_sealed, to_sealed) = os.pipe(), os.pipe()
    plaintext = PLAIN * 20

    def feed() -> None:
        with open(to_plain, "wb") as pipe:
            pipe.write(plaintext)

    def encrypt() -> None:
        with open(from_plain, "rb", buffering=0) as source, open(to_sealed, "wb", buffering=0) as target:
            encrypt_stream(keys, "k", source, target, segment_bits=14)

    threads = [threading.Thread(target=feed), threading.Thread(target=encrypt)]
    for thread in threads:
        thread.start()
    result = io.BytesIO()
    with open(from_sealed, "rb", buffering=0) as source:
        decrypt_stream(keys, source, result)
    for thread in threads:
        thread.join(30)
    assert result.getvalue() == plaintext


MEMORY = """
import io, resource, sys
sys.path.insert(0, sys.argv[1])
from guestlib.files import decrypt_stream, encrypt_stream
from guestlib.wire.messages import DataKey, Decrypted

class Keys:
    def generate_data_key(self, key, aad=None, *, length=32):
        return DataKey(None, b"wrapped", key, 1, bytes(32))
    def decrypt(self, ciphertext, aad=None, *, key=None):
        return Decrypted(None, bytes(32), "k", 1)

class Zeros:
    def __init__(self, size): self.left = size
    def read(self, size):
        part = bytes(min(size, self.left)); self.left -= len(part); return part

class Nowhere:
    def write(self, data): return len(data)

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = sys.argv[2]
def run(size):
    with open(path, "wb") as target:
        encrypt_stream(Keys(), "k", Zeros(size), target)
    with open(path, "rb") as source:
        assert decrypt_stream(Keys(), source, Nowhere()).plaintext_bytes == size
run(4 << 20)
before = peak()
run(256 << 20)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak memory after 256 MiB against 4 MiB, in KiB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(ROOT), str(tmp_path / "large")],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert int(result.stdout) < 4096


# ── Vectors ───────────────────────────────────────────────────────────────────────────────────────


def vectors() -> list[dict[str, object]]:
    return json.loads((VECTORS / "version-1.json").read_text())


def expand(key: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256, RFC 5869, one block."""
    return hmac.digest(hmac.digest(salt, key, "sha256"), info + b"\1", "sha256")


@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v["name"])
def test_the_kept_vectors(vector: dict[str, object]) -> None:
    """Files of version 1 open for ever; a second writer, from docs/files.md alone, makes the same bytes."""
    data = (VECTORS / f"version-1-{vector['name']}.bin").read_bytes()
    key, salt, wrapped = (bytes.fromhex(str(vector[n])) for n in ("data_key", "salt", "wrapped"))
    aad = cast("dict[str, str]", vector["aad"])
    size, bits = cast("int", vector["plaintext_bytes"]), cast("int", vector["bits"])
    plaintext = bytes(n % 251 for n in range(size))
    keys = LocalKeys()
    keys.made[wrapped] = key, aad
    assert opened(keys, data, aad) == plaintext

    header = b"HDF1" + bytes([bits]) + salt + len(wrapped).to_bytes(2, "big") + wrapped
    pairs = b"".join(
        len(t.encode()).to_bytes(4, "big") + t.encode() for n in sorted(aad) for t in (n, aad[n])
    )
    mac = hmac.digest(expand(key, salt, b"hostd file v1 header"), header + pairs, "sha256")
    pieces = [plaintext[n : n + 2**bits] for n in range(0, size, 2**bits)] or [b""]
    cipher = AESGCM(expand(key, salt, b"hostd file v1 segments"))
    body = b"".join(
        cipher.encrypt(n.to_bytes(11, "big") + bytes([n == len(pieces) - 1]), piece, None)
        for n, piece in enumerate(pieces)
    )
    assert data == header + mac + body
    if vector["name"] == "short":
        assert data.hex() in (ROOT / "docs" / "files.md").read_text()
