"""A real swtpm for the session, and the host around it."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support_evidence import NOW, Host, certificate, ima_entry

from hostd.platform import swtpm
from hostd.platform.tpm import open_tpm
from hostd.platform.tpm_provision import provision
from hostd.platform.tpm_tcti import SocketLink


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Callable[[], SocketLink]]]:
    directory = tmp_path_factory.mktemp("tpm")
    swtpm.manufacture(directory / "state", now=NOW)
    process = swtpm.start(directory / "state", directory / "sock")
    yield directory / "state", partial(SocketLink, process.socket)
    process.stop()


@pytest.fixture(scope="session")
def host(running: tuple[Path, Callable[[], SocketLink]]) -> Iterator[Host]:
    state, connect = running
    record = provision(connect, command_s=20)
    tpm = open_tpm(connect, record, command_s=20)
    log = b""
    paths = ["/usr/bin/qemu-system-x86_64", "/usr/lib/x86_64-linux-gnu/libc.so.6", "/usr/bin/bash"]
    for path in paths:
        entry, extends = ima_entry(path)
        log += entry
        tpm.extend(10, extends)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = certificate("channel CA", ca_key, "channel CA", ca_key, ca=True)
    root = ssl.PEM_cert_to_DER_cert((state / swtpm.CA_FILE).read_text())
    yield Host(tpm, root, log, len(paths), ca_key, ca)
    tpm.close()
