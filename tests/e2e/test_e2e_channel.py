"""Promise: the channel CA is replaced under a working host, and no connection is lost by it."""

from __future__ import annotations

import contextlib
import datetime
import secrets
import ssl
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from guestlib.attest.bundle import TrustBundle, parse_bundle
from guestlib.attest.verifier import VerifiedEvidence, verify_channel, verify_evidence
from guestlib.client import Client
from guestlib.errors import ChannelChangedError, HostdError, VerificationError
from guestlib.trust import Trust
from tests.e2e.harness import Host, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import qemu

pytestmark = pytest.mark.slow


def bundle(host: Host, path: Path) -> TrustBundle:
    """As `hostctl trust bundle` gives it now."""
    host.hostctl("trust", "bundle", "-o", str(path))
    return parse_bundle(path.read_bytes())


def unpinned(trust: TrustBundle) -> TrustBundle:
    return replace(trust, channel_cas=())


@contextlib.contextmanager
def client(host: Host, trust: TrustBundle, *, attested: bool = True) -> Iterator[Client]:
    pem = "".join(map(ssl.DER_cert_to_PEM_cert, trust.channel_cas))
    how = Trust.attested(trust) if attested else Trust.channel_ca(pem)
    with Client(how, f"unix:{host.guest_socket}", timeout_s=30.0) as made:
        yield made


def evidence(of: Client, trust: TrustBundle) -> VerifiedEvidence:
    """Fresh, over the present connection: steps 1 to 13."""
    nonce = secrets.token_bytes(32)
    document, log = of.evidence(nonce)
    now = datetime.datetime.now(datetime.UTC)
    return verify_evidence(document, log, bundle=trust, nonce=nonce, now=now)


def channel(of: Client, verified: VerifiedEvidence) -> None:
    """Step 14."""
    verify_channel(verified, of.peer_certificate(), datetime.datetime.now(datetime.UTC))


def ctl(host: Host, *arguments: str) -> Any:
    return host.hostctl_json("channel", *arguments)


def test_open_connections_outlive_a_rotation(vm: qemu.Vm, host: Host, tmp_path: Path) -> None:
    before = bundle(host, tmp_path / "before.json")
    shown = ctl(host, "show")
    with (
        client(host, unpinned(before)) as attested,
        client(host, before, attested=False) as pinned,
    ):
        key = attested.create_key().key.id
        sealed = attested.encrypt(key, b"secret").ciphertext
        pinned.random(8)
        leaves = attested.peer_certificate(), pinned.peer_certificate()
        verified = evidence(attested, before)
        assert verified.channel_ca_key.hex() == shown["ca"]["digest"]
        channel(attested, verified)

        rotated = ctl(host, "rotate")
        assert rotated["ca"]["digest"] != shown["ca"]["digest"]
        after = bundle(host, tmp_path / "after.json")
        assert after.channel_cas != before.channel_cas

        # What is open answers, under the certificate it began with.
        assert attested.decrypt(sealed).plaintext == b"secret"
        assert len(pinned.random(8).random) == 8
        assert (attested.peer_certificate(), pinned.peer_certificate()) == leaves
        # It gives the new evidence; its certificate does not belong to that.
        verified = evidence(attested, after)
        assert verified.channel_ca_key.hex() == rotated["ca"]["digest"]
        with pytest.raises(ChannelChangedError, match="the host's channel CA has changed") as caught:
            channel(attested, verified)
        assert caught.value.step == "14 channel certificate"
        # The way on.
        attested.attest()
        assert attested.peer_certificate() not in leaves
        channel(attested, evidence(attested, after))
        assert attested.decrypt(sealed).plaintext == b"secret"

        # New connections: by the new CA, all 14 steps.
        with client(host, after) as new:
            assert new.decrypt(sealed).plaintext == b"secret"
            channel(new, evidence(new, after))
        with client(host, after, attested=False) as new:
            assert new.random(8)
        with client(host, before) as late, pytest.raises(VerificationError, match="CA has changed") as step:
            late.random(8)
        assert step.value.step == "13 channel CA"
        with client(host, before, attested=False) as late, pytest.raises(ChannelChangedError):
            late.random(8)
        assert len(pinned.random(8).random) == 8
    entry = [e for e in host.ledger() if e["event"] == "channel"][-1]
    assert entry["principal"] == 'Officer::"uid:0"'
    assert entry["detail"].startswith(f"{rotated['ca']['digest']}, by an officer")
    host.stop()
    host.start()
    host.wait_open()
    assert ctl(host, "show")["ca"] == rotated["ca"]


def test_guests_that_pin_it_roll_over(vm: qemu.Vm, host: Host, tmp_path: Path) -> None:
    before = bundle(host, tmp_path / "before.json")
    refused = host.hostctl("channel", "rotate", "--commit", check=False)
    assert refused.returncode == 3
    assert "no channel CA is prepared" in refused.stderr
    prepared = ctl(host, "rotate", "--prepare")
    both = bundle(host, tmp_path / "both.json")
    assert both.channel_cas[0] == before.channel_cas[0]
    assert len(both.channel_cas) == 2
    for trust in (before, both):
        for attested in (True, False):
            with client(host, trust, attested=attested) as made:
                assert made.random(8)
    committed = ctl(host, "rotate", "--commit")
    assert committed["ca"] == prepared["next"]
    assert committed["next"] is None
    after = bundle(host, tmp_path / "after.json")
    assert after.channel_cas == both.channel_cas[1:]
    for trust in (both, after):
        for attested in (True, False):
            with client(host, trust, attested=attested) as made:
                assert made.random(8)
                channel(made, evidence(made, trust))
    with client(host, before) as late, pytest.raises(VerificationError, match="13 channel CA"):
        late.random(8)


def test_no_request_is_lost_by_rotations(vm: qemu.Vm, host: Host, tmp_path: Path) -> None:
    """One connection that stays, and new ones all the time, attested each: not one error."""
    trust = unpinned(bundle(host, tmp_path / "trust.json"))
    errors: list[Exception] = []
    answered = {"stays": 0, "new": 0}
    ended = threading.Event()

    def stays() -> None:
        with client(host, trust) as made:
            while not ended.is_set():
                made.random(8)
                answered["stays"] += 1

    def new() -> None:
        while not ended.is_set():
            with client(host, trust) as made:
                made.random(8)
            answered["new"] += 1

    def watched(run: Any) -> None:
        try:
            run()
        except (HostdError, OSError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=watched, args=(run,)) for run in (stays, new)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            seen = dict(answered)
            until(
                lambda seen=seen: errors or all(answered[name] > seen[name] + 1 for name in seen),  # type: ignore[misc]
                "both are answered",
            )
            ctl(host, "rotate")
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
    assert errors == []
    assert ctl(host, "show")["issued"] >= 6  # After the last rotation perhaps nobody came.
