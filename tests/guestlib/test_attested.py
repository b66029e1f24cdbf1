"""The attested path: nothing is asked of a host before its evidence holds."""

from __future__ import annotations

import pytest

from guestlib.attest.bundle import TrustBundle
from guestlib.client import Client
from guestlib.errors import VerificationError
from guestlib.trust import Trust
from tests.gateway.conftest import GatewayProcess
from tests.gateway.support_vault import SimulatedVault, echo


def test_without_good_evidence_nothing_is_asked(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    asked: list[str] = []

    def record(operation: object) -> object:
        asked.append(type(operation).__name__)
        return echo(operation)

    vault.answer = record  # type: ignore[assignment]
    bundle = TrustBundle(require=frozenset({"ima"}), aks=(b"a key",))
    with Client(Trust.attested(bundle), f"unix:{gateway.path}", timeout_s=30) as client:
        for _ in range(2):
            with pytest.raises(VerificationError):
                client.encrypt("k", b"secret")
    assert asked == ["GetEvidence", "GetEvidenceLog"] * 2
