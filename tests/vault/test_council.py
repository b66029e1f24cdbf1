"""The officers are those of the first unsealing, on a real store and under a real root key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from guestlib.errors import DeniedError, UnavailableError
from hostd.config import Officers
from hostd.vault.council import Council, OfficersError
from hostd.vault.keyring import Keyring
from hostd.vault.primitives import IntegrityError
from hostd.vault.store import Store
from tests.support.officers import Officer, make
from tests.vault.support_keys import root

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


class Place:
    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store.sqlite", create=True)
        self.keyring = Keyring(self.store)
        self.keyring.unlock(root())
        self.officers = {name: make(folder, name) for name in ("alice", "bob", "mallory")}

    def council(self, *names: str, quorum: int = 1) -> Council:
        return Council(Officers(tuple(self.officers[name].line for name in names), quorum))

    def confirm(self, council: Council, *, first: bool = False) -> bool:
        return council.confirm(self.store, self.keyring, first=first)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    assert made.confirm(made.council("alice", "bob", quorum=2), first=True)
    return made


def test_the_same_officers_in_any_order_and_under_any_name(place: Place) -> None:
    assert not place.confirm(place.council("bob", "alice", quorum=2))
    line = place.officers["bob"].line.rsplit(" ", 1)[0] + " robert"
    renamed = Council(Officers((place.officers["alice"].line, line), 2))
    assert not place.confirm(renamed)


@pytest.mark.parametrize(
    ("names", "quorum", "reason"),
    [
        (("alice", "bob", "mallory"), 2, "mallory"),
        (("alice", "mallory"), 2, "was none of them; 1 of the recorded are missing"),
        (("alice",), 1, "1 of the recorded are missing; 2 had to sign, not 1"),
        (("alice", "bob"), 1, "2 had to sign, not 1"),
        ((), 1, "2 of the recorded are missing"),
    ],
)
def test_others_are_refused(place: Place, names: tuple[str, ...], quorum: int, reason: str) -> None:
    council = place.council(*names, quorum=quorum)
    with pytest.raises(OfficersError, match=reason):
        place.confirm(council)
    with pytest.raises(UnavailableError):
        council.verify(b"m", place.officers["alice"].sign(b"m"))


def test_a_record_that_is_gone_is_not_made_again(place: Place) -> None:
    place.store._db.execute("DELETE FROM meta WHERE name='officers'")
    with pytest.raises(OfficersError, match="missing from the store"):
        place.confirm(place.council("mallory"))


def test_a_record_that_was_altered(place: Place) -> None:
    wrapped = bytearray(place.store.meta("officers") or b"")
    wrapped[-1] ^= 1
    place.store.set_meta("officers", bytes(wrapped))
    with pytest.raises(IntegrityError):
        place.confirm(place.council("alice", "bob", quorum=2))


def test_a_record_of_another_purpose(place: Place) -> None:
    """What was wrapped as something else is no record, whoever could choose its bytes."""
    place.store.set_meta("officers", place.keyring.wrap_service_key("reference", b"\x92\x01\x90"))
    with pytest.raises(IntegrityError):
        place.confirm(place.council("alice", "bob", quorum=2))


def signed(message: bytes, *officers: Officer) -> bytes:
    return b"".join(officer.sign(message) for officer in officers)


def test_verify(place: Place) -> None:
    council = place.council("alice", "bob", quorum=2)
    alice, bob = place.officers["alice"], place.officers["bob"]
    with pytest.raises(UnavailableError, match="not unsealed yet"):
        council.verify(b"m", signed(b"m", alice, bob))
    place.confirm(council)
    assert council.verify(b"m", signed(b"m", bob, alice)) == ("alice", "bob")
    with pytest.raises(DeniedError):
        council.verify(b"n", signed(b"m", bob, alice))


def test_nobody_is_never_enough(tmp_path: Path) -> None:
    place = Place(tmp_path)
    council = Council(Officers())
    place.confirm(council, first=True)
    with pytest.raises(DeniedError):
        council.verify(b"m", b"")
