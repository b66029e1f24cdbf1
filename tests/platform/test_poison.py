"""The poison PCR on a real TPM: after it nothing unseals before a reset, and a PCR of no use is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from support_tpm import Embedded

from hostd.config import Config, Drift, Host
from hostd.config import Tpm as TpmSettings
from hostd.core.reacting import NEVER_POISON
from hostd.ipc.loop import Loop
from hostd.platform.secretmem import SecretBuffer
from hostd.platform.tpm import Tpm
from hostd.platform.tpm_errors import TpmError, TpmPoisonError, TpmPolicyError
from hostd.platform.tpm_files import encode_blob, encode_record, write_file
from hostd.vault.counters import Counters
from hostd.vault.tpmlink import POISON, TpmLink

SECRET = bytes(range(32))
PCR = 12
T = TypeVar("T")


class Link:
    def __init__(self, folder: Path, host: Embedded, *, poison_pcr: int = PCR) -> None:
        self.loop = Loop()
        config = Config(
            host=Host(state_dir=str(folder), run_dir=str(folder)),
            tpm=TpmSettings(device=f"unix:{host.process.socket}", deadline_s=60.0),
            drift=Drift(poison_pcr=poison_pcr),
        )
        try:
            self.link = TpmLink(config, self.loop, Counters())
        except BaseException:
            self.loop.close()
            raise

    def wait(self, ask: Callable[[Callable[[T], None]], None]) -> T:
        told: list[T] = []

        def tell(result: T) -> None:
            told.append(result)
            self.loop.stop()

        ask(tell)
        if not told:
            self.loop.call_after(120, self.loop.stop)
            self.loop.run()
        (result,) = told
        return result

    def close(self) -> None:
        self.link.close()
        self.loop.close()


def seal(folder: Path, host: Embedded, pcrs: tuple[int, ...] = (0, 7, PCR)) -> None:
    tpm = host.open()
    write_file(folder / "tpm.json", encode_record(host.record))
    write_file(folder / "root.json", encode_blob(tpm.seal(SECRET, tpm.read_pcrs(pcrs))))
    tpm.close()


@pytest.fixture
def link(tmp_path: Path, own_host: Embedded) -> Iterator[Link]:
    folder = tmp_path / "hostd"
    folder.mkdir()
    seal(folder, own_host)
    made = Link(folder, own_host)
    yield made
    made.close()


def unsealed(link: Link) -> bytes:
    result = link.wait(link.link.unseal)
    assert isinstance(result, SecretBuffer), result
    with result.view() as view:
        secret = bytes(view)
    result.wipe()
    return secret


def test_a_poisoned_tpm_unseals_nothing_until_it_is_reset(link: Link, own_host: Embedded) -> None:
    assert unsealed(link) == SECRET
    said = link.wait(link.link.poison)
    assert isinstance(said, str)
    assert f"PCR {PCR} extended" in said
    refused = link.wait(link.link.unseal)
    assert isinstance(refused, TpmPolicyError)
    (mismatch,) = refused.mismatches
    assert mismatch.index == PCR

    # Whoever sees the value can tell what it means; another reaction does not hide that.
    tpm = own_host.open()
    import hashlib

    assert tpm.read_pcrs((PCR,))[PCR] == hashlib.sha256(bytes(32) + POISON).digest()
    again = link.wait(link.link.poison)
    assert isinstance(again, str)
    assert "before" in again
    assert tpm.read_pcrs((PCR,))[PCR] == hashlib.sha256(bytes(32) + POISON).digest()
    tpm.close()

    own_host.restart()
    assert unsealed(link) == SECRET


def test_what_hangs_at_poison_is_an_error(link: Link, own_host: Embedded) -> None:
    own_host.process.kill()
    assert isinstance(link.wait(link.link.poison), TpmError)
    own_host.restart()
    assert unsealed(link) == SECRET


def test_which_pcrs_can_serve(tpm: Tpm) -> None:
    refused = set()
    for pcr in range(24):
        try:
            tpm.check_poison(pcr)
        except TpmPoisonError:
            refused.add(pcr)
    # A reset PCR would be good again, one that is not to be extended never poisoned. PCR 10 is the kernel's.
    assert refused | {10} == set(NEVER_POISON)
    with pytest.raises(ValueError, match="no such PCR"):
        tpm.check_poison(24)


def test_a_key_that_is_not_sealed_to_the_poison_pcr_is_not_used(tmp_path: Path, host: Embedded) -> None:
    seal(tmp_path, host, (0, 7))
    with pytest.raises(TpmPoisonError, match="sealed to 0, 7"):
        Link(tmp_path, host)


def test_a_tpm_that_cannot_be_poisoned_unseals_nothing(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    # No TPM here lets a PCR that passes the configuration's check be reset: ask it for one that it does.
    check = Tpm.check_poison
    monkeypatch.setattr(Tpm, "check_poison", lambda self, _pcr: check(self, 16))
    result = link.wait(link.link.unseal)
    assert isinstance(result, TpmPoisonError)
    assert "reset" in str(result)


def test_no_poison_pcr_no_poison(tmp_path: Path, host: Embedded) -> None:
    seal(tmp_path, host)
    loop = Loop()
    config = Config(
        host=Host(state_dir=str(tmp_path), run_dir=str(tmp_path)),
        tpm=TpmSettings(device=f"unix:{host.process.socket}"),
    )
    link = TpmLink(config, loop, Counters())
    told: list[object] = []
    link.poison(told.append)
    assert isinstance(told[0], TpmPoisonError)
    link.close()
    loop.close()
