"""Promise: a guest that knows the provider's CA alone accepts a host that was enrolled, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from guestlib.attest.bundle import parse_bundle
from guestlib.client import Client
from guestlib.errors import VerificationError
from guestlib.trust import Trust
from tests.e2e.harness import Host
from tests.support import qemu
from tests.support.hostcerts import Provider

if TYPE_CHECKING:
    from pathlib import Path

    from guestlib.attest.bundle import TrustBundle

pytestmark = pytest.mark.slow


def ask(host: Host, bundle: TrustBundle) -> None:
    client = Client(Trust.attested(bundle), f"unix:{host.guest_socket}", timeout_s=15.0)
    try:
        client.random(8)
    finally:
        client.close()


def refused(host: Host, bundle: TrustBundle, why: str) -> None:
    with pytest.raises(VerificationError, match=why) as caught:
        ask(host, bundle)
    assert caught.value.step == "3 attestation key"


@pytest.fixture
def provider(tmp_path: Path) -> Provider:
    import datetime
    import ssl

    made = Provider(datetime.datetime.now(datetime.UTC))
    (tmp_path / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(made.root))
    (tmp_path / "ca.key").write_bytes(made.key_pem)
    return made


def test_an_enrolled_host(vm: qemu.Vm, host: Host, provider: Provider, tmp_path: Path) -> None:
    def path(name: str) -> str:
        return str(tmp_path / name)

    def ctl(*arguments: str) -> Any:
        return host.hostctl_json("host", *arguments)

    by_ca = ("trust", "bundle", "--host-root", path("ca.pem"))
    host.hostctl(*by_ca, "--host", "web1", "-o", path("trust.json"))
    trust = parse_bundle((tmp_path / "trust.json").read_bytes())
    assert (trust.aks, trust.channel_cas, trust.hosts) == ((), (), {"web1"})
    refused(host, trust, "the host shows no certificate")

    ctl("request", "-o", path("request"))
    maker = str(host.state / "swtpm" / "ek-ca.pem")
    sent = ("challenge", path("request"), "--ek-root", maker, "--name", "web1")
    ctl(*sent, "-o", path("challenge"), "--state", path("state"))
    ctl("answer", path("challenge"), "-o", path("answer"))
    issued = ("--ca", path("ca.pem"), "-k", path("ca.key"), "-o", path("host.pem"))
    ctl("certify", path("answer"), "--state", path("state"), *issued)
    report = ctl("install", path("host.pem"))
    assert (report["certified"], report["valid"]) == ("web1", True)
    assert ctl("show") == report

    ask(host, trust)
    # By its pinned key as before; not under another name, nor by another provider.
    ask(host, parse_bundle((host.directory / "trust.json").read_bytes()))
    refused(host, replace(trust, hosts=frozenset({"web2"})), "which the bundle does not name")
    stranger = Provider(provider.now)
    refused(host, replace(trust, host_roots=(stranger.root,)), "no accepted CA issued")
    entries = [e for e in host.ledger() if e["event"] == "enrol"]
    assert [e["op"] for e in entries] == ["answer", "install"]
    assert {e["principal"] for e in entries} == {'Officer::"uid:0"'}

    # It outlives a loss of power, and gives way to the next.
    host.kill()
    host.start()
    host.wait_open()
    ask(host, trust)
    again = ctl("enroll", "--ek-root", maker, *issued[:4], "--name", "web2", "--days", "1")
    assert again["certified"] == "web2"
    refused(host, trust, "of web2, which the bundle does not name")
    ask(host, replace(trust, hosts=frozenset({"web2"})))


def test_who_is_no_officer(host: Host) -> None:
    """The commands are the officers', like every other on that socket."""
    host.stop()
    host.settings.more = "[users]\nadmin = [64999]\n"
    host.write_config()
    with pytest.raises(AssertionError, match="the vault answers"):
        host.start(seconds=6)
    for command in (("host", "show"), ("host", "request", "-o", str(host.directory / "request"))):
        said = host.hostctl(*command, check=False)
        assert said.returncode == 5
        assert "are you an officer?" in said.stderr
    assert not (host.directory / "request").exists()
    host.kill()
