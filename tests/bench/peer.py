"""What the gate's throughput is held against: SoftHSM behind `p11-kit server`, which measures nothing.

Both are Debian's (softhsm2, p11-kit, p11-kit-modules). A client is a process that loads p11-kit-client.so
and encrypts: C_EncryptInit and C_Encrypt (PKCS#11 v3.0, 5.8), each a call over the unix socket. By
AES-256-ECB, as p11-kit 0.24 carries no parameters of GCM; that favours the peer, which neither authenticates
nor draws a nonce.
`python -m tests.bench.peer SECONDS BYTES` is one client.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.bench.clients import together

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT: Final = Path("/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so")
SERVER: Final = Path("/usr/libexec/p11-kit/p11-kit-server")
SOFTHSM: Final = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN: Final = "1234"
LABEL: Final = "hostd-bench"
START_S: Final = 20.0

# Places in CK_FUNCTION_LIST, and constants, of PKCS#11's C header (pkcs11t.h, pkcs11f.h).
_INITIALIZE, _GET_SLOT_LIST, _OPEN_SESSION, _LOGIN = 0, 4, 12, 18
_ENCRYPT_INIT, _ENCRYPT, _GENERATE_KEY = 29, 30, 58
_RW_SERIAL, _USER = 0x6, 1
_CKA_ENCRYPT, _CKA_VALUE_LEN, _CKM_AES_KEY_GEN, _CKM_AES_ECB = 0x104, 0x161, 0x1080, 0x1081
_ULONG: Final = ctypes.c_ulong


class _Attribute(ctypes.Structure):
    _fields_ = (("type", _ULONG), ("value", ctypes.c_void_p), ("length", _ULONG))


class _Mechanism(ctypes.Structure):
    _fields_ = (("mechanism", _ULONG), ("parameter", ctypes.c_void_p), ("length", _ULONG))


class Session:
    """A session with the token behind the server, and a key of its own.

    Raises:
        OSError: a call did not give CKR_OK.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(str(CLIENT))
        table = ctypes.c_void_p()
        _check("C_GetFunctionList", library.C_GetFunctionList(ctypes.byref(table)))
        assert table.value is not None
        # A CK_VERSION and its padding, then the functions.
        pointers = ctypes.cast(table.value + 8, ctypes.POINTER(ctypes.c_void_p))
        self._functions: dict[int, Any] = {
            number: ctypes.CFUNCTYPE(_ULONG)(pointers[number])
            for number in (
                _INITIALIZE,
                _GET_SLOT_LIST,
                _OPEN_SESSION,
                _LOGIN,
                _ENCRYPT_INIT,
                _ENCRYPT,
                _GENERATE_KEY,
            )
        }
        self._call(_INITIALIZE, None)
        slots, count = (_ULONG * 8)(), _ULONG(8)
        self._call(_GET_SLOT_LIST, 1, slots, ctypes.byref(count))
        if not count.value:
            raise OSError("the server offers no token")
        self._session = _ULONG()
        self._call(
            _OPEN_SESSION, _ULONG(slots[0]), _ULONG(_RW_SERIAL), None, None, ctypes.byref(self._session)
        )
        # Logged in is the whole application, not one session.
        self._call(_LOGIN, self._session, _ULONG(_USER), PIN.encode(), _ULONG(len(PIN)))
        length, true = _ULONG(32), ctypes.c_ubyte(1)
        template = (_Attribute * 2)(
            _Attribute(_CKA_VALUE_LEN, ctypes.addressof(length), ctypes.sizeof(length)),
            _Attribute(_CKA_ENCRYPT, ctypes.addressof(true), 1),
        )
        generate = _Mechanism(_CKM_AES_KEY_GEN, None, 0)
        self._key = _ULONG()
        self._call(
            _GENERATE_KEY, self._session, ctypes.byref(generate), template, _ULONG(2), ctypes.byref(self._key)
        )
        self._out = ctypes.create_string_buffer(1 << 17)

    def _call(self, number: int, *arguments: Any) -> None:
        _check(str(number), self._functions[number](*arguments))

    def encrypt(self, plaintext: bytes) -> int:
        """Length of the ciphertext."""
        mechanism = _Mechanism(_CKM_AES_ECB, None, 0)
        self._call(_ENCRYPT_INIT, self._session, ctypes.byref(mechanism), self._key)
        length = _ULONG(len(self._out))
        self._call(
            _ENCRYPT, self._session, plaintext, _ULONG(len(plaintext)), self._out, ctypes.byref(length)
        )
        return length.value


def _check(what: str, code: int) -> None:
    if code:
        raise OSError(f"PKCS#11 function {what}: CKR {code:#x}")


def missing() -> str:
    """What is not installed; empty if all is there."""
    return ", ".join(str(path) for path in (CLIENT, SERVER, SOFTHSM) if not path.exists())


@contextlib.contextmanager
def server(place: Path) -> Iterator[dict[str, str]]:
    """A token in `place` and a server on it; the environment of its clients."""
    tokens = place / "tokens"
    tokens.mkdir()
    (place / "softhsm2.conf").write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\n")
    env = {**os.environ, "SOFTHSM2_CONF": str(place / "softhsm2.conf")}
    tool = ["softhsm2-util", "--init-token", "--free", "--label", LABEL, "--pin", PIN, "--so-pin", PIN]
    subprocess.run(tool, env=env, check=True, capture_output=True)
    path = place / "p11.sock"
    command = [str(SERVER), "--foreground", "--provider", str(SOFTHSM), "--name", str(path)]
    process = subprocess.Popen([*command, f"pkcs11:token={LABEL}"], env=env, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("p11-kit server did not start")
            time.sleep(0.05)
        yield {**env, "P11_KIT_SERVER_ADDRESS": f"unix:path={path}"}
    finally:
        process.kill()
        process.wait()


def saturated(place: Path, *, clients: int, seconds: float, size: int) -> float:
    """Encryptions a second by so many client processes together."""
    place.mkdir()
    with server(place) as env:
        command = [sys.executable, "-m", "tests.bench.peer", str(seconds), str(size)]
        found = together(command, clients, seconds, env)
    return sum(one["count"] / one["seconds"] for one in found)


def main() -> None:
    seconds, size = float(sys.argv[1]), int(sys.argv[2])
    session = Session()
    plaintext = b"\xa5" * size
    assert session.encrypt(plaintext) == size
    print("ready", flush=True)
    sys.stdin.readline()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        session.encrypt(plaintext)
        count += 1
    print(json.dumps({"count": count, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
