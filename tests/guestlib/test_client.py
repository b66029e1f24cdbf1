"""The client against a real gateway; only the vault is played."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guestlib.client import RESENT, Client
from guestlib.errors import (
    ChannelChangedError,
    HostdError,
    InvalidCiphertextError,
    InvalidSignatureError,
    MalformedError,
    NotFoundError,
    TransportError,
    VerificationError,
)
from guestlib.link import Address
from guestlib.trust import Trust
from guestlib.wire.messages import OPERATIONS, DecryptedItem
from hostd.ipc.many_operations import VerifyManyResult
from hostd.ipc.operations import BY_NAME
from tests.gateway.conftest import GatewayProcess
from tests.gateway.support_vault import ChannelCa, SimulatedVault, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def client(gateway: GatewayProcess, vault: SimulatedVault) -> Iterator[Client]:
    with Client(Trust.channel_ca(vault.ca.pem), f"unix:{gateway.path}", timeout_s=10) as client:
        yield client


def test_every_operation_is_known() -> None:
    assert set(BY_NAME) == OPERATIONS
    assert RESENT < OPERATIONS
    takes_token = {name for name, cls in BY_NAME.items() if "token" in cls.__struct_fields__}
    assert takes_token < RESENT
    again = {"Encrypt", "GenerateDataKey", "Sign", "Mac", "GenerateRandom"}
    assert not RESENT & (again | {"EncryptMany", "SignMany", "MacMany"})


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("vsock:", Address("", 2, 7700)),
        ("vsock:3", Address("", 3, 7700)),
        ("vsock:2:99", Address("", 2, 99)),
        ("unix:/run/x", Address("/run/x")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert Address.parse(text) == address


@pytest.mark.parametrize(
    "text", ["", "unix:", "tcp:1", "vsock:x", "vsock:1:2:3", "vsock:-1", "vsock:4294967296"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an address|invalid literal"):
        Address.parse(text)


def test_operations(client: Client) -> None:
    sealed = client.encrypt("alias/a", b"\x00\xffdata", {"env": "prod"})
    assert sealed.receipt is not None
    assert client.decrypt(sealed.ciphertext, {"env": "prod"}).plaintext == b"\x00\xffdata"
    assert client.create_key(alias="alias/new").key.alias == "alias/new"
    assert client.describe_key("key-1").key.usage == ("encrypt", "decrypt")
    assert [key.id for key in client.list_keys()] == [f"key-{n}" for n in range(250)]
    assert len(list(client.list_keys(page=7))) == 250
    assert client.generate_data_key("k", length=16).plaintext == b"k" * 16
    assert client.generate_data_key("k", plaintext=False).plaintext is None
    assert client.get_public_key("k", version=3).version == 3
    assert client.random(1024).random == b"\x5a" * 1024
    assert client.rotate("k").key.id == client.shred("k").key.id == "key-1"
    assert client.health().gate == "open"
    assert client.evidence(b"n" * 16) == (b'{"nonce":"' + b"6e" * 16 + b'"}', b"12345")
    assert client.limits()["in_flight"] == 256


def test_an_invalid_signature_raises(client: Client) -> None:
    signature = client.sign("k", b"message").signature
    assert client.verify("k", b"message", signature).valid
    with pytest.raises(InvalidSignatureError):
        client.verify("k", b"other", signature)
    mac = client.mac("k", b"message").mac
    assert client.verify_mac("k", b"message", mac).valid
    with pytest.raises(InvalidSignatureError) as caught:
        client.verify_mac("k", b"message", mac + b"x")
    assert caught.value.ledger is not None


def test_batches(client: Client) -> None:
    sealed = client.encrypt_many("k", [(b"one", {"n": "1"}), (b"", None)])
    assert sealed.receipt is not None
    assert sealed.ciphertexts == (b"CTeno", b"CT")
    result = client.decrypt_many("k", [(b"CTeno", None), (b"no", {"n": "1"}), (b"CT", None)])
    first, second, third = result.items
    assert (first, third) == (DecryptedItem(b"one", 1), DecryptedItem(b"", 1))
    assert isinstance(second, InvalidCiphertextError)
    assert result.receipt is not None
    assert second.ledger == result.receipt.ledger
    assert "one" not in repr(result)
    signatures = client.sign_many("k", [b"a", b"b"]).signatures
    assert client.verify_many("k", [(b"a", signatures[0]), (b"a", signatures[1])]).valid == (True, False)
    macs = client.mac_many("k", [b"a"]).macs
    assert client.verify_mac_many("k", [(b"a", macs[0]), (b"b", macs[0])]).valid == (True, False)
    for wrong in ([], [(b"", None)] * 257, [(bytes(40_000), None)] * 4):
        with pytest.raises(MalformedError):
            client.encrypt_many("k", wrong)


def test_the_largest_batch_fits_a_frame_both_ways(client: Client) -> None:
    # The simulator adds two bytes to each; 54 more are what the vault adds.
    limits = client.limits()
    count, size = int(limits["batch_items"]), int(limits["batch_bytes"] // limits["batch_items"])
    plaintexts = [bytes([n]) * size for n in range(count)]
    sealed = client.encrypt_many("k", [(p, {"row": str(n)}) for n, p in enumerate(plaintexts)])
    assert len(sealed.ciphertexts) == count
    largest = [(c + bytes(54), {"row": "x"}) for c in sealed.ciphertexts]
    assert sum(len(c) for c, _ in largest) == limits["batch_ciphertext_bytes"]
    assert len(client.decrypt_many("k", largest).items) == count


def test_an_answer_that_leaves_items_out_is_no_answer(client: Client, vault: SimulatedVault) -> None:
    vault.answer = lambda _: VerifyManyResult((True,), "k", 1)
    with pytest.raises(TransportError, match="unexpected shape"):
        client.verify_many("k", [(b"a", b"x"), (b"b", b"x")])


def test_errors(client: Client) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.describe_key("missing")
    assert caught.value.ledger == 7
    with pytest.raises(MalformedError):
        client.encrypt("k", b"x" * 65537)
    with pytest.raises(MalformedError):
        client.encrypt("k", b"x" * 300_000)
    with pytest.raises(ValueError, match="no such operation"):
        client.submit("Export")
    assert client.random(1).random


def test_call_many_keeps_order_and_errors(client: Client) -> None:
    calls = [("GenerateRandom", {"length": n % 5 + 1}) for n in range(1000)]
    calls[500] = ("GenerateRandom", {"length": 0})
    results = client.call_many(calls)
    assert isinstance(results[500], MalformedError)
    assert [len(r.random) for r in results if not isinstance(r, HostdError)] == [  # type: ignore[attr-defined]
        n % 5 + 1 for n in range(1000) if n != 500
    ]


def test_a_pipeline_larger_than_every_buffer(client: Client) -> None:
    # Nobody waits for an answer while these are sent: the sender must read.
    results = client.call_many([("Encrypt", {"key": "k", "plaintext": b"x" * 60_000})] * 300)
    assert not any(isinstance(result, HostdError) for result in results)


def test_threads_share_one_connection(client: Client, vault: SimulatedVault) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(100):
                data = bytes([seed, n])
                assert client.decrypt(client.encrypt("k", data).ciphertext).plaintext == data
        except (HostdError, AssertionError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert vault.calls == 1600
    assert len(vault.binds) == 1


def test_a_timeout_leaves_the_connection_usable(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    with Client(Trust.channel_ca(vault.ca.pem), f"unix:{gateway.path}", timeout_s=0.7) as client:
        assert client.random(1)
        began = time.monotonic()
        with pytest.raises(TransportError, match="no answer in time"):
            client.describe_key("hold")
        assert 0.6 < time.monotonic() - began < 15
        vault.release()  # what comes too late is dropped
        assert client.random(3).random == b"ZZZ"
        assert vault.calls == 3


def test_reconnects_and_resends_only_what_may_be(
    gateway: GatewayProcess, client: Client, vault: SimulatedVault
) -> None:
    hold = vault.answer
    vault.answer = lambda _operation: None
    outcomes: dict[str, object] = {}

    def call(operation: str, args: dict[str, object]) -> None:
        try:
            outcomes[operation] = client.submit(operation, args).result()
        except HostdError as error:
            outcomes[operation] = error

    threads = [
        threading.Thread(target=call, args=("DescribeKey", {"key": "k"})),
        threading.Thread(target=call, args=("Encrypt", {"key": "k", "plaintext": b"x"})),
        threading.Thread(target=call, args=("Rotate", {"key": "k", "token": "tokentoken"})),
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(vault.held) == 3)
    seen: list[str] = []

    def record(operation: object) -> object:
        seen.append(type(operation).__name__)
        return hold(operation)

    vault.answer = record  # type: ignore[assignment]
    # The connection ends in order (the caller is unbound): the next one is served at once.
    vault.unbind(vault.binds[-1].bind)
    for thread in threads:
        thread.join(15)
    assert sorted(seen) == ["DescribeKey", "Rotate"]
    assert isinstance(outcomes["Encrypt"], TransportError)
    assert not isinstance(outcomes["DescribeKey"], HostdError)
    assert not isinstance(outcomes["Rotate"], HostdError)
    assert client.random(1)


def test_an_idle_connection_that_ended_costs_nothing(
    gateway: GatewayProcess, client: Client, vault: SimulatedVault
) -> None:
    assert client.encrypt("k", b"x")
    vault.unbind(vault.binds[-1].bind)
    wait_for(lambda: not gateway.workers())
    assert client.encrypt("k", b"x")  # not resendable: it never went to the dead connection


def test_a_killed_worker_is_survived(gateway: GatewayProcess, client: Client) -> None:
    assert client.random(1)
    os.kill(gateway.workers()[0], signal.SIGKILL)
    wait_for(lambda: _works(client))


def _works(client: Client) -> bool:
    try:
        return len(client.random(1).random) == 1
    except TransportError:
        return False


def test_no_host(run_dir: Path) -> None:
    with Client(Trust.channel_ca(ChannelCa().pem), f"unix:{run_dir}/none", timeout_s=1) as client:
        with pytest.raises(TransportError, match="cannot connect"):
            client.health()
        client.close()
        with pytest.raises(TransportError, match="closed"):
            client.health()


def test_a_host_that_says_nothing(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run_dir / "mute"))
        listener.listen()
        with Client(Trust.channel_ca(ChannelCa().pem), f"unix:{run_dir}/mute", timeout_s=0.5) as client:
            began = time.monotonic()
            with pytest.raises(TransportError):
                client.health()
            assert time.monotonic() - began < 15


def test_another_ca_is_not_trusted(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    address = f"unix:{gateway.path}"
    with (
        Client(Trust.channel_ca(ChannelCa().pem), address, timeout_s=30) as client,
        pytest.raises(ChannelChangedError, match="14 channel certificate: not issued by a pinned channel CA"),
    ):
        client.health()
    with pytest.raises(VerificationError):
        Client(Trust.channel_ca("not pem"), address)
    vault.unbind(vault.binds[-1].bind)
    wait_for(lambda: not gateway.workers())
    vault.identity = vault.ca.issue(dns="other.name")
    with (
        Client(Trust.channel_ca(vault.ca.pem), address, timeout_s=30) as client,
        pytest.raises(VerificationError, match="14 channel certificate: Hostname mismatch") as caught,
    ):
        client.health()
    assert not isinstance(caught.value, ChannelChangedError)
    assert vault.calls == 0


def test_the_plain_path_is_the_standard_library_alone(gateway: GatewayProcess, vault: SimulatedVault) -> None:
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from guestlib.client import Client
from guestlib.trust import Trust
with Client(Trust.channel_ca(sys.argv[3]), "unix:" + sys.argv[2]) as client:
    assert client.decrypt(client.encrypt("k", b"x").ciphertext).plaintext == b"x"
known = set(sys.stdlib_module_names) | {"guestlib", "__main__"}
print([name for name in sys.modules if name.partition(".")[0] not in known])
"""
    result = subprocess.run(
        [sys.executable, "-S", "-c", program, str(ROOT), str(gateway.path), vault.ca.pem],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert result.stdout.strip() == "[]"
