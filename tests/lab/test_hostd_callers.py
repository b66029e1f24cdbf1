"""Who asks is decided by the channel: nothing a guest sends, and no reused CID, makes it another."""

from __future__ import annotations

import time

import pytest

from qemu.guest import Guest
from qemu.guest_python import Answer, GuestPython
from tests.lab.conftest import Running

# Runs in the host: connects to itself as a guest would, and says what came.
KNOCK = """
import socket, sys
knock = socket.socket(socket.AF_VSOCK)
knock.settimeout(20)
knock.connect((int(sys.argv[1]), 7700))
try:
    print(repr(knock.recv(1)))
except ConnectionResetError:
    print("reset")
"""
CLOSED = 15.0  # seconds for the connections of a dead VM to be gone
FORGED = ("principal", "vm", "tenant", "uid", "cid")
# A whole request with a field beside the protocol's own, sent as it is.
FORGE_ENVELOPE = (
    "(setattr(codec, 'encode_message', lambda m: plain_encode({{**m, {field!r}: {value!r}}})), "
    "client.describe_key({key!r}))[1]"
)
RESTORE = "setattr(codec, 'encode_message', plain_encode)"


def _key(python: GuestPython, alias: str) -> tuple[str, str]:
    """A key, and something encrypted with it (both as source text)."""
    made = python.ask(f'client.create_key("AES-256-GCM", {alias!r}).key.id')
    assert made.ok, made.shown
    sealed = python.ask(f'client.encrypt({made.value!r}, b"mine").ciphertext')
    assert sealed.ok, sealed.shown
    return made.value, sealed.shown


def test_no_tenant_reaches_the_key_of_another_by_id_alias_or_ciphertext(running: Running) -> None:
    alice, bob = running.python(running.alice), running.python(running.bob)
    keys = {"alice": _key(alice, "alias/hers"), "bob": _key(bob, "alias/his")}
    aliases = {"alice": "alias/hers", "bob": "alias/his"}
    for thief, other in ((alice, "bob"), (bob, "alice")):
        key, sealed = keys[other]
        for name in (key, aliases[other]):
            for attempt in (
                f"client.describe_key({name!r})",
                f'client.encrypt({name!r}, b"x")',
                f"client.decrypt({sealed}, key={name!r})",
                f"client.rotate({name!r})",
                f"client.shred({name!r})",
            ):
                refused = thief.ask(attempt)
                assert not refused.ok, attempt
                assert refused.code in ("not_found", "denied", "invalid_ciphertext"), (attempt, refused.shown)
        refused = thief.ask(f"client.decrypt({sealed})")
        assert refused.code in ("not_found", "invalid_ciphertext"), refused.shown
        listed = thief.ask("[key.id for key in client.list_keys()]")
        assert listed.ok
        assert key not in listed.shown
    # The owners' keys are as they were.
    for owner, name in ((alice, "alice"), (bob, "bob")):
        key, sealed = keys[name]
        assert owner.ask(f"client.decrypt({sealed}, key={key!r}).plaintext").shown == repr(b"mine")
    alice.close()
    bob.close()


@pytest.mark.parametrize("field", FORGED)
def test_a_field_that_names_another_caller_is_malformed(running: Running, field: str) -> None:
    bob = running.python(running.bob)
    value = str(running.alice.uuid)
    refused = bob.ask(f"client.submit('ListKeys', {{{field!r}: {value!r}}}).result()")
    assert not refused.ok
    assert refused.code == "malformed", refused.shown
    # Beside the arguments, in the message itself.
    assert bob.ask("codec = __import__('guestlib.wire.codec').wire.codec").ok
    assert bob.ask("plain_encode = codec.encode_message").ok
    assert bob.ask("client.health().gate").ok
    refused = bob.ask(FORGE_ENVELOPE.format(field=field, value=value, key="alias/hers"))
    assert not refused.ok
    assert refused.code == "malformed", refused.shown
    assert bob.ask(RESTORE).ok
    bob.close()


@pytest.mark.parametrize("cid", [1, 2], ids=["loopback", "host"])
def test_a_vsock_peer_that_is_no_vm_is_hung_up_on(running: Running, cid: int) -> None:
    said = running.host.run(["python3", "-c", KNOCK, str(cid)], 60).text
    assert said in ("b''", "reset")


def _ask(python: GuestPython, code: str) -> Answer:
    """Asks again if the connection breaks: the first one under a CID may find the worker of the VM that had
    it before, which ends as soon as that VM is seen to be gone. It is never answered as that VM."""
    for _ in range(5):
        answer = python.ask(code)
        if answer.code != "transport":
            break
        time.sleep(2.0)
    return answer


def test_a_vm_with_the_cid_of_a_dead_one_has_nothing_of_it(running: Running) -> None:
    bob = running.python(running.bob)
    key, sealed = _key(bob, "alias/left-behind")
    peer = f" {running.bob.cid}:"
    assert any(peer in line for line in running.vsock("state", "established"))
    running.host.run(["kill", "-KILL", str(running.bob.qemu_pid)])
    running.bob.close()
    deadline = time.monotonic() + CLOSED
    while any(peer in line for line in running.vsock("state", "established")):
        assert time.monotonic() < deadline, "the dead VM's connection is still open"

    with Guest(running.host, "mallory", running.bob.cid) as mallory:
        mallory.start()
        running.service.give_trust(mallory)
        python = GuestPython(mallory)
        for attempt in (
            f"client.describe_key({key!r})",
            f"client.decrypt({sealed})",
            'client.encrypt("alias/left-behind", b"x")',
            "list(client.list_keys())",
            'client.create_key("AES-256-GCM")',
        ):
            refused = _ask(python, attempt)
            assert not refused.ok, attempt
            assert refused.code in ("denied", "unauthenticated"), (attempt, refused.shown)
        entries = running.service.ctl_json("ledger", "list", "-n", "20")["entries"]
        hers = [entry for entry in entries if entry.get("principal") == f'VM::"{mallory.uuid}"']
        asked = {"DescribeKey", "Decrypt", "Encrypt", "ListKeys", "CreateKey"}
        assert asked <= {entry["op"] for entry in hers if entry["outcome"] == "denied"}, entries
        assert not any(entry["op"] in asked for entry in hers if entry["outcome"] != "denied"), entries
        python.close()
    # The one with bob's identity has what is bob's.
    bob = running.python(running.bob)
    assert _ask(bob, f"client.decrypt({sealed}).plaintext").shown == repr(b"mine")
    bob.close()
