"""This host's name: what evidence says, and what a manifest for this host names."""

from __future__ import annotations

import socket


def this_host() -> str:
    """As gethostname(2) gives it; `localhost` if it has none.

    Under systemd it is the name at the service's start (`ProtectHostname=`). Whoever has root can change it:
    it guards against mistakes, and proves nothing.
    """
    return socket.gethostname() or "localhost"
