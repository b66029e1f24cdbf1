"""The channel CA: how one follows another, by command, by age, and after a kill or an older row put back."""

from __future__ import annotations

import datetime
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from guestlib.errors import ConflictError, UnavailableError
from hostd.ipc.loop import Loop
from hostd.vault import channelkeeper
from hostd.vault.channelca import ChannelCa, utc_now
from hostd.vault.ledger import LedgerError
from hostd.vault.primitives import IntegrityError
from hostd.vault.store import StoreError
from tests.vault.support_channel import DAY, OFFICER, ROWS, Desk, again
from tests.vault.support_keys import root

ROOT = Path(__file__).resolve().parents[2]


def leaf(desk: Desk) -> x509.Certificate:
    return x509.load_pem_x509_certificates(desk.keeper.identity().certificate_chain)[0]


def issued_by(desk: Desk, der: bytes) -> bool:
    try:
        leaf(desk).verify_directly_issued_by(x509.load_der_x509_certificate(der))
    except (ValueError, InvalidSignature):
        return False
    return True


def test_a_rotation_is_recorded_and_kept(desk: Desk, tmp_path: Path, loop: Loop) -> None:
    (old,) = desk.keeper.pinned
    before = desk.show()
    assert (before.issued, before.next) == (0, None)
    assert issued_by(desk, old)
    after = desk.rotate()
    assert after.ca.digest != before.ca.digest
    assert after.ca.digest == desk.keeper.digest.hex()
    assert after.issued == 1
    assert desk.renewed == 2  # the first one too
    (new,) = desk.keeper.pinned
    assert issued_by(desk, new)
    assert not issued_by(desk, old)
    event, officer, detail = desk.entries[-1]
    assert (event, officer) == ("channel", OFFICER)
    assert detail == f"{after.ca.digest}, by an officer, after {before.ca.digest[:16]}…"
    entries = len(desk.entries)
    started = again(desk, tmp_path, loop)
    assert started.show().ca == after.ca
    assert started.keeper.pinned == (new,)
    assert not started.entries
    assert entries == 2


def test_it_lives_a_year_and_its_certificates_no_longer_than_it(desk: Desk) -> None:
    line = desk.show().ca
    assert 365 * DAY <= line.not_after - line.not_before <= 366 * DAY
    ca = desk.keeper.ca
    assert ca is not None
    end = datetime.datetime.fromtimestamp(line.not_after, datetime.UTC)
    assert ca.issue(end - datetime.timedelta(hours=1)).not_after == line.not_after
    assert ca.issue(utc_now()).not_after < line.not_after


def test_prepare_and_commit(desk: Desk, tmp_path: Path, loop: Loop) -> None:
    (old,) = desk.keeper.pinned
    with pytest.raises(ConflictError, match="no channel CA is prepared"):
        desk.rotate("commit")
    prepared = desk.rotate("prepare")
    assert prepared.next is not None
    assert prepared.ca == desk.show().ca
    assert desk.entries[-1] == ("channel-next", OFFICER, f"{prepared.next.digest}, prepared")
    with pytest.raises(ConflictError, match="is prepared already"):
        desk.rotate("prepare")
    assert issued_by(desk, old)
    assert desk.renewed == 1
    started = again(desk, tmp_path, loop)
    assert started.show().next == prepared.next
    pinned = started.keeper.pinned
    assert pinned[0] == old
    after = started.rotate("commit")
    assert (after.ca, after.next) == (prepared.next, None)
    assert started.keeper.pinned == pinned[1:]
    assert issued_by(started, pinned[1])
    assert again(started, tmp_path, loop).show().ca == prepared.next


def test_a_rotation_without_it_forgets_what_was_prepared(desk: Desk, tmp_path: Path, loop: Loop) -> None:
    prepared = desk.rotate("prepare")
    assert prepared.next is not None
    after = desk.rotate()
    assert after.next is None
    assert after.ca.digest not in (prepared.ca.digest, prepared.next.digest)
    started = again(desk, tmp_path, loop)
    assert (started.show().ca, started.show().next) == (after.ca, None)


@pytest.mark.parametrize("step", ["now", "prepare", "commit"])
def test_locked_keys_refuse_it(desk: Desk, step: str) -> None:
    before, entries = desk.show(), list(desk.entries)
    desk.keyring.lock()
    with pytest.raises(UnavailableError, match="the keys are locked"):
        desk.rotate(step)  # type: ignore[arg-type]
    assert desk.show() == before
    assert desk.entries == entries
    desk.keeper.identity()


def test_before_the_first_unsealing_there_is_none(tmp_path: Path, loop: Loop) -> None:
    made = Desk(tmp_path, loop)
    for ask in (made.show, made.rotate, made.keeper.identity, lambda: made.keeper.pinned):
        with pytest.raises(UnavailableError):
            ask()
    made.close()


@pytest.mark.parametrize("step", ["now", "prepare", "commit"])
@pytest.mark.parametrize("what", ["ledger", "store"])
def test_what_cannot_be_recorded_or_stored_changes_nothing(
    desk: Desk, tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch, what: str, step: str
) -> None:
    if step == "commit":
        desk.rotate("prepare")
    before, renewed, last = desk.show(), desk.renewed, dict(desk.last)

    def fail(*_: object, **__: object) -> int:
        raise LedgerError("full") if what == "ledger" else StoreError("full")

    with monkeypatch.context() as patch:
        patch.setattr(desk.keeper, "_record", fail) if what == "ledger" else patch.setattr(
            desk.store, "commit", fail
        )
        with pytest.raises((LedgerError, StoreError)):
            desk.rotate(step)  # type: ignore[arg-type]
    assert desk.show() == before
    assert desk.renewed == renewed
    assert not desk.store.dirty
    # The ledger may name one that was never stored; else all is as it was.
    if what == "ledger":
        assert desk.last == last
        assert again(desk, tmp_path, loop).show().ca == before.ca


@pytest.mark.parametrize("rows", ["older", "none"])
def test_an_older_ca_does_not_come_back(desk: Desk, tmp_path: Path, loop: Loop, rows: str) -> None:
    """Whoever writes to the store puts back the CA whose key he has."""
    older = {name: desk.store.meta(name) or b"" for name in ROWS}
    known = desk.show().ca.digest
    last = desk.rotate().ca.digest
    for name, value in older.items():
        desk.store.set_meta(name, value if rows == "older" else b"")
    desk.store.commit()
    started = again(desk, tmp_path, loop)
    made = started.show().ca.digest
    assert made not in (known, last)
    (entry,) = started.entries
    assert entry[:2] == ("channel", "")
    if rows == "older":
        assert f"the store had {known[:16]}… and not {last[:16]}…" in entry[2]
    assert again(started, tmp_path, loop).show().ca.digest == made


def test_a_certificate_that_was_swapped_opens_nothing(desk: Desk, tmp_path: Path, loop: Loop) -> None:
    """It is in the clear in the store, and evidence shows it: by another's, another would be the channel."""
    other = ChannelCa.make(utc_now())
    mine = desk.store.meta(ROWS[1]) or b""
    crossed = mine.replace(_point(mine), _point(other.certificate_der))
    assert crossed != mine
    for wrong in (other.certificate_der, crossed, mine[:-1], b"x"):
        desk.store.set_meta(ROWS[1], wrong)
        desk.store.commit()
        with pytest.raises(IntegrityError, match="certificate"):
            again(desk, tmp_path, loop)
        assert desk.keeper.ca is None


def _point(der: bytes) -> bytes:
    key = x509.load_der_x509_certificate(der).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_numbers().x.to_bytes(32, "big")


def test_a_prepared_row_is_no_current_one(desk: Desk, tmp_path: Path, loop: Loop) -> None:
    desk.rotate("prepare")
    for name in ROWS:
        desk.store.set_meta(name, desk.store.meta(name.replace("_ca_", "_ca_next_")) or b"")
    desk.store.commit()
    with pytest.raises(IntegrityError):
        again(desk, tmp_path, loop)


# ── Age ───────────────────────────────────────────────────────────────────────────────────────────


def at(monkeypatch: pytest.MonkeyPatch, when: float) -> None:
    monkeypatch.setattr(time, "time", lambda: when)
    monkeypatch.setattr(channelkeeper, "utc_now", lambda: datetime.datetime.fromtimestamp(when, datetime.UTC))


def test_it_rotates_by_itself_when_three_quarters_are_over(
    desk: Desk, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = desk.show()
    assert report.renews == pytest.approx(time.time() + 0.75 * 365 * DAY, abs=600)
    at(monkeypatch, report.renews - 1)
    desk.keeper.renew()
    assert desk.show().ca == report.ca
    at(monkeypatch, report.renews)
    desk.keeper.renew()
    after = desk.show()
    assert after.ca.digest != report.ca.digest
    assert after.renews > report.renews + 0.74 * 365 * DAY
    assert desk.renewed == 2
    event, officer, detail = desk.entries[-1]
    assert (event, officer) == ("channel", "")
    assert "made anew: 75% of the life of the one before are over" in detail
    desk.keeper.renew()
    assert desk.show() == after


def test_the_loop_looks_at_its_age(tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channelkeeper, "CHECK_S", 0.05)
    desk = Desk(tmp_path, loop)
    desk.unseal()
    before = desk.show()
    at(monkeypatch, before.renews + 1)
    deadline = time.monotonic() + 30
    while desk.show().ca == before.ca and time.monotonic() < deadline:
        loop.run_once(0.05)
    assert desk.show().ca != before.ca
    desk.close()


def test_a_clock_that_is_set_back_neither_prolongs_nor_repeats(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the clock has shown counts, also while the keys were locked; the next one lives its time."""
    now, report = time.time(), desk.show()
    desk.keyring.lock()
    at(monkeypatch, report.renews + DAY)
    desk.keeper.renew()
    assert desk.show().ca == report.ca
    at(monkeypatch, now)
    desk.keyring.unlock(root())
    desk.keeper.renew()
    after = desk.show()
    assert after.ca.digest != report.ca.digest
    # Guests have the host's clock only, so it is dated by that.
    assert after.ca.not_before <= now < after.ca.not_after
    desk.keeper.renew()
    at(monkeypatch, report.renews + 2 * DAY)
    desk.keeper.renew()
    assert desk.show() == after


def test_an_old_ca_is_renewed_at_the_next_start(
    desk: Desk, tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = desk.show()
    at(monkeypatch, report.ca.not_after + DAY)
    started = again(desk, tmp_path, loop)
    after = started.show()
    assert after.ca.digest != report.ca.digest
    assert after.ca.not_after > report.ca.not_after + 365 * DAY
    assert after.renews > report.ca.not_after + 200 * DAY


@pytest.mark.parametrize("fresh", [True, False])
def test_by_itself_it_takes_what_was_prepared_unless_that_is_old_too(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    if fresh:
        at(monkeypatch, desk.show().renews - 30 * DAY)
    prepared = desk.rotate("prepare")
    assert prepared.next is not None
    at(monkeypatch, prepared.renews + DAY)
    desk.keeper.renew()
    after = desk.show()
    assert after.next is None
    assert (after.ca == prepared.next) == fresh
    assert after.ca != prepared.ca


# ── Killed ────────────────────────────────────────────────────────────────────────────────────────


def child(folder: Path, step: str, number: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.vault.rotate_and_die", str(folder), step, str(number)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("step", ["now", "commit"])
def test_killed_at_any_moment_the_old_or_the_new_one_is_there(tmp_path: Path, step: str) -> None:
    """Never none, never one that was before; and the store has one whole CA at each moment. What was prepared
    comes into force itself, once it is named."""
    origin = tmp_path / "origin"
    origin.mkdir()
    old = child(origin, "now", 0).stdout.strip()
    if step == "commit":
        done = child(origin, "prepare", 1000)
        assert done.stdout.strip() == old, done.stderr
    prepared = _stored(origin)[1]
    assert bool(prepared) == (step == "commit")
    outcomes: list[str] = []
    for number in range(1, 100):
        folder = tmp_path / str(number)
        shutil.copytree(origin, folder)
        done = child(folder, step, number)
        in_store, _ = _stored(folder)
        after = child(folder, step, 0)
        assert after.returncode == 0, after.stderr
        found = after.stdout.strip()
        assert child(folder, step, 0).stdout.strip() == found
        assert not prepared or found in (old, prepared)
        if done.returncode == 0:
            assert done.stdout.strip() == found == in_store != old
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        outcomes.append("old" if found == old else "new" if found == in_store else "other")
    else:
        raise AssertionError("it never came to its end")
    # One after the other: not named yet; named and not stored (finished, or made anew); stored.
    assert outcomes == sorted(outcomes, key=["old", "other", "new"].index)
    assert {"old", "other", "new"} == set(outcomes)


def _stored(folder: Path) -> tuple[str, str]:
    """Digests of the CA in the store, read as a start reads it, and of the prepared one (or empty)."""
    loop = Loop()
    desk = Desk(folder, loop)
    desk.unseal()
    assert not desk.entries  # Without a ledger it believes the store, and made none.
    report = desk.show()
    desk.close()
    loop.close()
    return report.ca.digest, "" if report.next is None else report.next.digest
