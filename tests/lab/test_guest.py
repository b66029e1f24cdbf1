"""Guests of the lab run under KVM and reach the host over vsock, each under its own CID."""

from __future__ import annotations

from collections.abc import Callable

from qemu.guest import Guest
from qemu.host import LabHost

SERVER = """
import socket
server = socket.socket(socket.AF_VSOCK)
server.bind((socket.VMADDR_CID_ANY, 5000))
server.listen()
print("listening", flush=True)
for _ in range({count}):
    connection, (cid, port) = server.accept()
    connection.sendall(b"%d " % cid + connection.recv(100))
    connection.close()
"""
CLIENT = """
import socket, sys
connection = socket.socket(socket.AF_VSOCK)
connection.settimeout(10)
connection.connect((2, 5000))
connection.sendall(sys.argv[1].encode())
print(connection.recv(100).decode())
"""


def test_two_guests_are_known_by_their_cids(lab: LabHost, make_guest: Callable[[str, int], Guest]) -> None:
    alice, bob = make_guest("alice", 7), make_guest("bob", 8)
    server = lab.start(["python3", "-c", SERVER.format(count=3)])
    server.wait_for(b"listening", 30)

    for guest, said in ((alice, "one"), (bob, "two"), (alice, "three")):
        assert guest.run(["python3", "-c", CLIENT, said]).text == f"{guest.cid} {said}"

    server.wait(10)
    for guest in (alice, bob):
        assert f"/{guest.uuid}\0" in lab.get(f"/proc/{guest.qemu_pid}/cmdline").decode().replace(
            "-uuid\0", "/"
        )
        assert b"\0kvm\0" in lab.get(f"/proc/{guest.qemu_pid}/cmdline")


def test_a_guest_has_what_guestlib_needs_and_starts_again(make_guest: Callable[[str, int], Guest]) -> None:
    guest = make_guest("carol", 9)
    guest.run(["python3", "-c", "import guestlib, ssl, cryptography.hazmat.primitives.hashes"])
    guest.put(b"gone", "/tmp/file")

    guest.destroy()
    guest.start()

    assert guest.run(["ls", "/tmp"]).text == ""
