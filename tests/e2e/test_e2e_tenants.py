"""Promise: who asks is who the kernel says, and one tenant learns nothing of another's keys."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guestlib.attest.bundle import parse_bundle
from hostd.ipc import operating as adm
from tests.e2e.harness import Host, adopted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
ALICE, BOB, NOBODY = 64101, 64102, 64103
ROOT = Path(__file__).resolve().parents[2]
Request = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def shared(binary: Path) -> Iterator[Host]:
    with adopted(binary, tenants=(("acme", ALICE), ("globex", BOB))) as host:
        bundle = parse_bundle((host.directory / "trust.json").read_bytes())
        (host.directory / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(bundle.channel_cas[0]))
        yield host


def ask(host: Host, uid: int, *requests: Request) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.as_user", str(uid), host.guest_socket, host.directory / "ca.pem"],
        input=json.dumps(requests), capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def create(number: int, **more: str) -> Request:
    return ("CreateKey", {"token": f"{number:032x}", **more})


def test_another_tenants_key_is_as_if_it_never_was(shared: Host) -> None:
    alias = "alias/payroll"
    made, sealed = ask(
        shared, ALICE, create(1, alias=alias), ("Encrypt", {"key": alias, "bytes:plaintext": "secret"})
    )
    key, ciphertext = made["ok"]["key"]["id"], sealed["ok"]["ciphertext"]
    never = "key-" + "0" * 32
    forged = ciphertext[:4] + "\0" * 16 + ciphertext[20:]

    def uses(reference: str) -> list[Request]:
        return [
            ("DescribeKey", {"key": reference}),
            ("Encrypt", {"key": reference, "bytes:plaintext": "x"}),
            ("GenerateDataKey", {"key": reference}),
            ("Rotate", {"key": reference, "token": "2" * 32}),
            ("Shred", {"key": reference, "token": "3" * 32}),
        ]

    mine = ask(shared, ALICE, ("Decrypt", {"bytes:ciphertext": ciphertext}))
    assert mine[0]["ok"]["plaintext"] == "secret"
    requests = [
        *uses(key), ("Decrypt", {"bytes:ciphertext": ciphertext}),
        *uses(alias),
        *uses(never), ("Decrypt", {"bytes:ciphertext": forged}),
    ]  # fmt: skip
    answers = ask(shared, BOB, *requests)
    assert {(a["code"], a["message"]) for a in answers} == {("not_found", "no such key")}
    # Nothing of it was done, and the alias is free for the other tenant.
    assert ask(shared, ALICE, ("DescribeKey", {"key": key}))[0]["ok"]["key"]["state"] == "active"
    assert "ok" in ask(shared, BOB, create(4, alias=alias))[0]
    listed = ask(shared, BOB, ("ListKeys", {}))[0]["ok"]["keys"]
    assert key not in {info["id"] for info in listed}


def test_same_token_of_two_tenants_makes_two_keys(shared: Host) -> None:
    (one,), (other,) = ask(shared, ALICE, create(5)), ask(shared, BOB, create(5))
    assert one["ok"]["key"]["id"] != other["ok"]["key"]["id"]


def test_unbound_user_is_denied(shared: Host) -> None:
    answers = ask(
        shared, NOBODY, create(6), ("GenerateRandom", {"length": 8}), ("ListKeys", {}), ("Health", {})
    )
    assert [a.get("code") for a in answers] == ["denied", "denied", "denied", None]
    entries = [e for e in shared.ledger() if e.get("principal") == f'Host::"uid:{NOBODY}"']
    assert entries
    assert {e["outcome"] for e in entries} == {"denied"}


@pytest.mark.parametrize("field", ["tenant", "principal", "uid", "caller", "vm"])
def test_a_name_in_the_message_is_refused(shared: Host, field: str) -> None:
    """There is no field that says who asks; one that is added makes the request malformed."""
    answers = ask(shared, NOBODY, ("GenerateRandom", {"length": 8, field: "acme"}))
    assert answers[0]["code"] == "malformed"


def test_taking_the_tenant_away_works_at_once(shared: Host) -> None:
    shared.ask(adm.BindUser(uid=NOBODY, tenant="acme"), adm.Nothing)
    assert "ok" in ask(shared, NOBODY, ("GenerateRandom", {"length": 8}))[0]
    shared.ask(adm.UnbindUser(uid=NOBODY), adm.Nothing)
    assert ask(shared, NOBODY, ("GenerateRandom", {"length": 8}))[0]["code"] == "denied"
