"""An interactive root shell in L1: this terminal, raw, joined to L1's second serial port."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qemu.errors import LabError
from qemu.host import LabHost

LEAVE: Final = b"\x1d"  # Ctrl-]
TERMINAL: Final = "xterm-256color"
INSTALLED: Final = """, and hostd, which runs as systemd units (/etc/hostd/hostd.toml):

  hostctl status                               the gate, the measurements, keys and ledger
  hostctl vm list; hostctl ledger list; hostctl --help
  python3 -m qemu.demo                         (outside) shows what a guest does, and what hostd refuses"""
BANNER: Final = """
You are root in the lab's host: a Debian 12 with TPM 2.0 (/dev/tpmrm0), IMA, /dev/kvm, vhost-vsock,
libvirt{installed}

Nothing here touches your machine; disk and TPM are thrown away at the end.

  tpm2_pcrread sha256                          the PCRs; 0-9 are the measured boot, 10 is IMA's
  cat /sys/kernel/security/ima/ascii_runtime_measurements
  virsh list --all                             the guests{guests}

Leave with Ctrl-].  Log of the console: {log}
"""


def require_terminal() -> None:
    """Raise unless a person can type here."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LabError("a shell needs a terminal", hint="python3 -m qemu run -- COMMAND works without one")


def interact(host: LabHost, *, installed: str = ".", guests: str = "") -> None:
    """Join the terminal to the host until Ctrl-] or until the host goes off."""
    require_terminal()
    size = shutil.get_terminal_size()
    host.run(["stty", "-F", "/dev/ttyS1", "rows", str(size.lines), "cols", str(size.columns)])
    print(BANNER.format(installed=installed, guests=guests, log=host.console_log))
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(host.tty))
        term = os.environ.get("TERM") or TERMINAL
        line.sendall(f" export TERM={shlex.quote(term)}; clear -x 2>/dev/null; cd\r".encode())
        with _raw(sys.stdin.fileno()):
            _join(line)
    print("\r\nlab: left the shell; the host is being switched off")


def _join(line: socket.socket) -> None:
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    while True:
        ready, _, _ = select.select([keyboard, line], [], [])
        if line in ready:
            data = line.recv(1 << 16)
            if not data:
                return
            while data:
                data = data[os.write(screen, data) :]
        if keyboard in ready:
            typed = os.read(keyboard, 1 << 10)
            before, leave, _ = typed.partition(LEAVE)
            line.sendall(before)
            if leave or not typed:
                return


@contextmanager
def _raw(terminal: int) -> Iterator[None]:
    before = termios.tcgetattr(terminal)
    try:
        tty.setraw(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
