"""The host's channel CA changes under a client: what is open goes on, and there is always a way on."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from guestlib.client import Client
from guestlib.errors import ChannelChangedError, VerificationError
from guestlib.trust import Trust
from tests.gateway.conftest import GatewayProcess
from tests.gateway.support_vault import ChannelCa, SimulatedVault, wait_for


@dataclass(frozen=True)
class ByEvidence(Trust):
    """As an attested trust's last step, with the vault's own word in place of evidence."""

    vault: SimulatedVault
    asked: list[bytes] = field(default_factory=list)
    before: Callable[[], object] = lambda: None

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def admit(self, leaf_der: bytes, evidence: Callable[[bytes], tuple[bytes, bytes]]) -> None:
        self.asked.append(leaf_der)
        evidence(bytes(16))
        try:
            x509.load_der_x509_certificate(leaf_der).verify_directly_issued_by(self.vault.ca.certificate)
        except (ValueError, InvalidSignature):
            self.before()
            raise ChannelChangedError("14 channel certificate", "changed") from None


def test_attesting_anew_connects_anew_and_loses_no_answer(
    gateway: GatewayProcess, vault: SimulatedVault
) -> None:
    trust = ByEvidence(vault)
    with Client(trust, f"unix:{gateway.path}", timeout_s=30) as client:
        client.attest()
        old = client.peer_certificate()
        assert trust.asked == [old, old]
        waiting = client.submit("DescribeKey", {"key": "hold"})
        wait_for(lambda: vault.held)
        vault.rotate()
        # Nobody asks who it is: the connection goes on.
        assert client.random(1)
        assert client.peer_certificate() == old
        client.attest()
        new = client.peer_certificate()
        assert new != old
        assert trust.asked[2:] == [old, new]
        assert client.random(1)
        vault.release()
        assert waiting.result()
        client.attest()
        assert trust.asked[4:] == [new]
        vault.rotate()
        client.attest()
        assert client.peer_certificate() not in (old, new)


def test_a_connection_that_was_made_while_it_changed(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    """A worker of before took it, and the evidence is of after: the next try meets a new worker."""
    with Client(Trust.channel_ca(vault.ca.pem), f"unix:{gateway.path}", timeout_s=30) as other:
        other.random(1)  # the worker is there
        vault.ca = ChannelCa()
        trust = ByEvidence(vault, before=vault.rotate)
        with Client(trust, f"unix:{gateway.path}", timeout_s=30) as client:
            assert client.random(1)
        assert len(trust.asked) >= 2
        assert other.random(1)


def test_one_that_stays_another_hosts_is_refused(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    with Client(Trust.channel_ca(vault.ca.pem), f"unix:{gateway.path}", timeout_s=30) as other:
        other.random(1)
        vault.ca = ChannelCa()
        trust = ByEvidence(vault)
        with (
            Client(trust, f"unix:{gateway.path}", timeout_s=30) as client,
            pytest.raises(ChannelChangedError),
        ):
            client.encrypt("k", b"secret")
        assert len(trust.asked) > 1


def test_what_is_refused_for_another_reason_is_asked_once(
    gateway: GatewayProcess, vault: SimulatedVault
) -> None:
    def refuse() -> None:
        raise VerificationError("12 claims", "files: drifted")

    vault_ca, vault.ca = vault.ca, ChannelCa()
    trust = ByEvidence(vault, before=refuse)
    vault.identity = vault_ca.issue()
    with Client(trust, f"unix:{gateway.path}", timeout_s=30) as client, pytest.raises(VerificationError) as e:
        client.random(1)
    assert e.value.step == "12 claims"
    assert len(trust.asked) == 1


def test_a_pinned_ca(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    """Whoever pinned it before goes on while connected, and is told why he cannot come again; whoever pinned
    both comes again."""
    old = vault.ca
    address = f"unix:{gateway.path}"
    with Client(Trust.channel_ca(old.pem), address, timeout_s=30) as client:
        client.random(1)
        vault.rotate()
        wait_for(lambda: _admits(Trust.channel_ca(vault.ca.pem), address))
        client.attest()
        assert client.random(1)
        with (
            Client(Trust.channel_ca(old.pem), address, timeout_s=30) as late,
            pytest.raises(ChannelChangedError, match="the host's channel CA has changed") as caught,
        ):
            late.random(1)
        assert caught.value.step == "14 channel certificate"
        with Client(Trust.channel_ca(old.pem + vault.ca.pem), address, timeout_s=30) as both:
            assert both.random(1)


def _admits(trust: Trust, address: str) -> bool:
    try:
        with Client(trust, address, timeout_s=30) as client:
            return bool(client.random(1))
    except ChannelChangedError:
        return False
