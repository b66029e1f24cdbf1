"""Signed reference values: how they come into force, are kept under the root key, and retire in time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from guestlib.errors import ConflictError, DeniedError, MalformedError, NotFoundError, UnavailableError
from hostd.config import Config, Officers
from hostd.core.manifest import approve_next, new_document
from hostd.core.reference import ANY_HOST, Reference, encode_reference, reference_digest
from hostd.ipc.loop import Loop
from hostd.platform.hostname import this_host
from hostd.platform.secretmem import SecretBuffer
from hostd.vault.custody import Custody
from hostd.vault.keyring import Keyring
from hostd.vault.ledger import Entry
from hostd.vault.mint import Mint
from hostd.vault.store import Store
from tests.support.officers import Officer, make
from tests.vault.support_gate import make_gate
from tests.vault.support_keys import root

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
A, B = "aa" * 32, "bb" * 32
PATH = "/usr/bin/q"


def document(**parts: object) -> Reference:
    values: dict[str, Any] = {"files": {PATH: (A, B)}, **parts}
    values.setdefault("host", this_host())
    return new_document(created=1, base=None, **values)


class SimulatedTpm:
    """Unseals at once, in the state that it is sealed to."""

    sealed_to: Mapping[int, bytes] = {}

    def unseal(self, told: Callable[[SecretBuffer], None]) -> None:
        told(root())


class House:
    """What custody asks of the vault; real store, keyring and loop."""

    def __init__(
        self, folder: Path, loop: Loop, *officers: Officer, last: Mapping[str, Entry] | None = None
    ) -> None:
        path = folder / "store.sqlite"
        self.store = Store(path, create=not path.exists())
        self.keyring = Keyring(self.store)
        self.entries: list[tuple[str, str, str, str]] = []
        self.last = dict(last or {})
        """As the ledger has it; a custody gets it as it was at its start."""
        self.shut: dict[str, str | None] = {}
        self.judged_by: list[Reference] = []
        self.custody = Custody(
            self,
            Config(officers=Officers(tuple(officer.line for officer in officers), len(officers))),
            loop,
            gate=make_gate(),
            store=self.store,
            keyring=self.keyring,
            mint=Mint(loop),
            tpm=cast("Any", SimulatedTpm()),
            last=dict(self.last),
        )

    def record(
        self, event: str, *, outcome: str = "done", principal: str = "", subject: str = "", detail: str = ""
    ) -> int:
        self.entries.append((event, outcome, principal, detail))
        now = int(time.time() * 1000)
        self.last[event] = Entry(len(self.entries), now, event, outcome, principal=principal, detail=detail)
        return len(self.entries)

    def set_shut(self, what: str, reason: str | None) -> None:
        self.shut[what] = reason

    def new_reference(self) -> None:
        pass

    def judge_by(self, reference: Reference) -> None:
        self.judged_by.append(reference)

    def kick(self) -> None:
        pass

    def close(self) -> None:
        self.custody.lock()
        self.store.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def alice(tmp_path: Path) -> Officer:
    return make(tmp_path, "alice")


Make = Callable[[], House]


@pytest.fixture
def start(tmp_path: Path, loop: Loop, alice: Officer) -> Iterator[Make]:
    """Starts a vault's custody on the one store, after it has ended the one before."""
    made: list[House] = []

    def again() -> House:
        last: Mapping[str, Entry] = {}
        if made:
            before = made.pop()
            before.close()
            last = before.last
        made.append(House(tmp_path, loop, alice, last=last))
        return made[-1]

    yield again
    for house in made:
        house.close()


@pytest.fixture
def house(start: Make) -> House:
    made = start()
    made.custody.unseal()
    assert made.shut["keys"] is None
    return made


def install(house: House, reference: Reference, *officers: Officer) -> tuple[str, ...]:
    data = encode_reference(reference)
    signatures = b"".join(officer.sign(data) for officer in officers)
    return house.custody.install_reference(data, signatures, "Host::root")


def test_signed_values_come_into_force(house: House, alice: Officer) -> None:
    reference = document()
    with pytest.raises(NotFoundError):
        _ = house.custody.signed
    assert install(house, reference, alice) == ("alice",)
    assert house.custody.reference == reference
    assert house.custody.reference_digest == reference_digest(reference)
    assert house.custody.signed[1] == ("alice",)
    assert house.shut["reference"] is None
    digest = reference_digest(reference).hex()
    assert house.entries[-1] == ("manifest", "done", "Host::root", f"version 1, {digest}, signed by alice")


def test_what_is_refused_changes_nothing(house: House, alice: Officer, tmp_path: Path) -> None:
    install(house, document(), alice)
    entries = list(house.entries)
    with pytest.raises(DeniedError):
        install(house, approve_next(document(), {PATH: [A]}, created=2))
    with pytest.raises(DeniedError):
        install(house, approve_next(document(), {PATH: [A]}, created=2), make(tmp_path, "mallory"))
    with pytest.raises(ConflictError, match="not newer"):
        install(house, document(), alice)
    with pytest.raises(ConflictError, match="it was made from"):
        install(house, approve_next(document(files={PATH: (B,)}), {PATH: [A]}, created=2), alice)
    with pytest.raises(MalformedError):
        house.custody.install_reference(b"{}", alice.sign(b"{}"), "Host::root")
    assert house.entries == entries
    assert house.custody.reference == document()


def test_a_manifest_for_another_host_is_refused_by_name(house: House, alice: Officer) -> None:
    """Signed by the officers, and made for a host of another name: it comes into force nowhere else."""
    here = this_host()
    with pytest.raises(ConflictError, match=f"it is for host 'other-{here}', and this one is '{here}'"):
        install(house, document(host=f"other-{here}"), alice)
    assert house.custody.reference is None
    assert house.entries[-1][0] != "manifest"
    everywhere = document(host=ANY_HOST)
    assert install(house, everywhere, alice) == ("alice",)
    assert house.custody.reference == everywhere


def test_nothing_before_the_officers_are_known(start: Make, alice: Officer) -> None:
    house = start()
    with pytest.raises(UnavailableError):
        install(house, document(), alice)


def test_they_are_there_after_a_restart(house: House, alice: Officer, start: Make) -> None:
    install(house, document(), alice)
    again = start()
    again.custody.unseal()
    assert again.custody.reference == document()
    assert again.custody.signed == house.custody.signed


def test_installed_while_locked_they_are_stored_with_the_next_unsealing(
    house: House, alice: Officer, start: Make
) -> None:
    house.custody.lock()
    install(house, document(), alice)
    assert house.store.meta("reference") is None
    house.custody.unseal()
    again = start()
    again.custody.unseal()
    assert again.custody.reference == document()


@pytest.mark.parametrize("name", ["reference", "reference_signatures"])
def test_stored_values_without_their_signatures_open_nothing(
    house: House, alice: Officer, start: Make, name: str
) -> None:
    """Even wrapped under the right key: the signatures are verified again."""
    install(house, document(), alice)
    other = encode_reference(document(files={PATH: (A,)})) if name == "reference" else b""
    house.store.set_meta(name, house.keyring.wrap_service_key(name, other))
    house.store.commit()
    again = start()
    again.custody.unseal()
    assert again.custody.reference is None
    assert "the stored reference values are not the officers'" in str(again.shut["keys"])
    assert not again.keyring.unlocked


def rows(store: Store) -> dict[str, bytes | None]:
    return {name: store.meta(name) for name in ("reference", "reference_signatures")}


def put(store: Store, values: Mapping[str, bytes | None]) -> None:
    """What root may do with the file while the vault is stopped."""
    for name, value in values.items():
        if value is None:
            store._write("DELETE FROM meta WHERE name=?", name)
        else:
            store.set_meta(name, value)
    store.commit()


@pytest.mark.parametrize("what", ["older rows", "no rows"])
def test_older_values_come_back_neither_by_the_store_nor_by_the_officers_old_signatures(
    house: House, alice: Officer, start: Make, what: str
) -> None:
    first = document(files={PATH: (A, B)})
    install(house, first, alice)
    older = rows(house.store)
    second = approve_next(first, {"/x": [A]}, created=2)
    install(house, second, alice)
    put(house.store, older if what == "older rows" else dict.fromkeys(older))
    again = start()
    again.custody.unseal()
    assert again.custody.reference is None
    assert again.custody.new_appraiser() is None
    assert "version 2" in str(again.shut["reference"])
    assert "install it again" in str(again.shut["reference"])
    for refused in (first, document(files={PATH: (A,)}), approve_next(first, {"/x": [B]}, created=2)):
        with pytest.raises(ConflictError):
            install(again, refused, alice)
    install(again, second, alice)
    assert again.shut["reference"] is None
    assert start().custody.reference is None
    third = start()
    third.custody.unseal()
    assert third.custody.reference == second


def test_officers_in_the_ledger_are_not_recorded_anew(
    house: House, start: Make, tmp_path: Path, loop: Loop
) -> None:
    """Whoever writes to the configuration and to the store as well does not make himself an officer."""
    names = ("officers", "channel_ca_key", "channel_ca_certificate", "reference", "reference_signatures")
    put(house.store, dict.fromkeys(names))
    last = house.last
    house.close()
    other = House(tmp_path, loop, make(tmp_path, "mallory"), last=last)
    other.custody.unseal()
    assert "the record of the officers is missing" in str(other.shut["keys"])
    assert not other.keyring.unlocked
    other.close()


def run_until(loop: Loop, done: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        loop.run_once(0.05)
    assert done()


def test_a_digest_retires_when_its_time_comes(house: House, alice: Officer, loop: Loop) -> None:
    due = int(time.time()) + 1
    install(house, document(retire={PATH: {A: due}}), alice)
    judge = house.custody.new_appraiser()
    assert judge is not None
    assert judge.reference.expected(PATH) == (A, B)
    run_until(loop, lambda: house.judged_by)
    assert time.time() >= due
    assert house.judged_by[0].expected(PATH) == (B,)
    assert house.judged_by[0].retired(PATH, A) == due
    assert house.entries[-1] == ("retire", "done", "", f"1 paths: {PATH}")
    again = house.custody.new_appraiser()
    assert again is not None
    assert again.reference.expected(PATH) == (B,)
    # The document that was signed stays what it is.
    assert house.custody.reference is not None
    assert house.custody.reference.expected(PATH) == (A, B)


def test_a_clock_that_is_set_back_brings_nothing_back(
    house: House, alice: Officer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.time())
    install(house, document(retire={PATH: {A: now - 10}}), alice)
    monkeypatch.setattr(time, "time", lambda: now - 1000.0)
    following = approve_next(document(retire={PATH: {A: now - 10}}), {"/x": [A]}, created=2)
    install(house, following, alice)
    judge = house.custody.new_appraiser()
    assert judge is not None
    assert judge.reference.expected(PATH) == (B,)


def test_a_clock_that_is_set_back_while_the_vault_is_stopped_brings_nothing_back(
    house: House, alice: Officer, start: Make, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = int(time.time()) + 1
    install(house, document(retire={PATH: {A: due}}), alice)
    run_until(loop, lambda: house.judged_by)
    monkeypatch.setattr(time, "time", lambda: due - 1000.0)
    again = start()
    again.custody.unseal()
    judge = again.custody.new_appraiser()
    assert judge is not None
    assert judge.reference.expected(PATH) == (B,)
