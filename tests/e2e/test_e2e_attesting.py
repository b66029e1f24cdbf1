"""Promise: with `gate.tpm = "read"` a changed PCR closes the gate at the next batch, as with a quote of
each; and the quote that follows covers every answer before it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from guestlib.errors import RefusedDriftError
from hostd.platform.tpm_tcti import SocketLink
from tests.e2e.harness import Settings, adopted, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.harness import Host
    from tests.support import qemu

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
PCR_EXTEND = "800200000041000001820000000000000009400000090000000000" + "00000001000b"
"""PCR 0, password session, one SHA-256 digest that follows (TPM 2.0 part 3, 22.2)."""


def reads(every_s: float) -> Settings:
    return Settings(more=f'[gate]\ntpm = "read"\nquote_every_s = {every_s}\n')


def head(host: Host) -> int:
    """Entries that the saved head signs."""
    size: int = json.loads((host.state / "head.json").read_bytes())["size"]
    return size


@pytest.mark.parametrize("settings", [reads(3600.0), Settings()], ids=["read", "quote"])
def test_a_pcr_that_changed_is_found_by_the_next_batch(binary: Path, vm: qemu.Vm, settings: Settings) -> None:
    with adopted(binary, settings) as host:
        client = host.client()
        host.serves(client)
        before = head(host)
        link = SocketLink(host.run / "swtpm.sock")
        answer = link.exchange(bytes.fromhex(PCR_EXTEND) + bytes(32), time.monotonic() + 10)
        assert answer[6:10] == bytes(4), answer.hex()
        with pytest.raises(RefusedDriftError):
            client.random(8)
        (finding,) = host.drift()["boot"]
        assert (finding["code"], finding["subject"]) == ("pcr-changed", "PCR 0")
        status = host.status()
        assert status is not None
        assert not status.keys_unlocked
        if settings.more:
            assert head(host) == before, "no quote was needed to find it"


def test_the_quote_that_follows_covers_what_was_answered(binary: Path, vm: qemu.Vm) -> None:
    with adopted(binary, reads(1.5)) as host:
        client = host.client()
        host.serves(client)
        for _ in range(3):
            receipt = client.random(8).receipt
            assert receipt is not None
            until(lambda receipt=receipt: head(host) > receipt.ledger, "a quote covers it")
        # The next start holds the ledger against that head.
        host.stop()
        host.start()
        host.wait_open()
        host.serves(host.client())


def test_an_orderly_stop_leaves_no_answer_uncovered(binary: Path, vm: qemu.Vm) -> None:
    with adopted(binary, reads(3600.0)) as host:
        receipt = host.client().random(8).receipt
        assert receipt is not None
        assert head(host) <= receipt.ledger
        host.stop()
        assert head(host) > receipt.ledger
