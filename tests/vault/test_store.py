"""The store: its file, its transactions, what is left of what was deleted."""

from __future__ import annotations

import os
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from guestlib.errors import ConflictError
from hostd.core.keys import Algorithm, KeyRecord, State, VersionRecord
from hostd.vault.store import APPLICATION_ID, FORMAT, Store, StoreError
from tests.vault.support_keys import NOW


def record(number: int = 1, *, tenant: str = "red", alias: str | None = None, versions: int = 1) -> KeyRecord:
    return KeyRecord(
        f"key-{number:032x}",
        tenant,
        Algorithm.AES_256_GCM,
        State.ACTIVE,
        NOW,
        alias,
        tuple(VersionRecord(n, State.ACTIVE, NOW, 1, b"wrapped %d" % n) for n in range(1, versions + 1)),
    )


# ── The file ──────────────────────────────────────────────────────────────────────────────────────


def test_a_new_store(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = Store(path, create=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    identity = store.store_id
    assert len(identity) == 16
    store.close()
    again = Store(path)
    assert again.store_id == identity
    again.close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()
    other = Store(tmp_path / "other", create=True)
    assert other.store_id != identity
    other.close()


def test_it_is_durable_at_commit(store: Store) -> None:
    assert store._pragma("synchronous") == 2
    assert store._pragma("journal_mode") == "wal"
    assert store._pragma("secure_delete") == 1
    assert store._pragma("foreign_keys") == 1
    assert store._pragma("trusted_schema") == 0


def test_nothing_is_made_where_something_is_missing_nor_replaced_where_something_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(StoreError, match="does not exist"):
        Store(path)
    assert not path.exists()
    path.write_bytes(b"precious")
    with pytest.raises(StoreError, match="already exists"):
        Store(path, create=True)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("content", [b"", b"precious", b"SQLite format 3\0" + bytes(200)], ids=len)
def test_an_alien_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=str(path)):
        Store(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("pragma", "message"),
    [
        ("application_id=1", "not a hostd store"),
        (f"user_version={FORMAT + 1}", f"format {FORMAT + 1}, this hostd knows {FORMAT}"),
        ("user_version=0", "format 0"),
    ],
)
def test_another_programs_and_another_format(tmp_path: Path, pragma: str, message: str) -> None:
    path = tmp_path / "s"
    Store(path, create=True).close()
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA {pragma}")
    raw.close()
    with pytest.raises(StoreError, match=message):
        Store(path)


def test_a_damaged_row_is_said_to_be(store: Store) -> None:
    store.put_key(record(1))
    store.put_key(record(2))
    store.put_key(record(3))
    store._run("UPDATE keys SET state='immortal' WHERE id=?", record(1).id)
    store._run("DELETE FROM versions WHERE key=?", record(2).id)
    store._run("UPDATE versions SET version=2 WHERE key=?", record(3).id)
    for number in (1, 2, 3):
        with pytest.raises(StoreError, match=record(number).id):
            store.key("red", record(number).id)


# ── Transactions ──────────────────────────────────────────────────────────────────────────────────


def reopened(store: Store, tmp_path: Path) -> Store:
    return Store(tmp_path / "store.sqlite")


def test_commit_and_rollback(store: Store, tmp_path: Path) -> None:
    assert not store.dirty
    store.put_key(record(1))
    assert store.dirty
    store.rollback()
    assert not store.dirty
    assert store.key("red", record(1).id) is None
    store.put_key(record(2))
    other = reopened(store, tmp_path)
    assert other.key("red", record(2).id) is None
    store.commit()
    assert other.key("red", record(2).id) == record(2)
    other.close()
    store.commit()
    store.rollback()


def test_one_step_is_undone_alone(store: Store) -> None:
    store.savepoint()
    store.put_key(record(1))
    store.release()
    store.savepoint()
    store.put_key(record(2))
    store.put_token("red", "token", b"r", record(2).id, NOW)
    store.undo()
    store.savepoint()
    store.put_key(record(3))
    store.release()
    store.commit()
    assert [k.id for k in store.keys("red", "", 9)] == [record(1).id, record(3).id]
    assert store.token("red", "token") is None
    store.savepoint()
    store.put_key(record(4))
    store.undo()
    store.rollback()
    assert not store.dirty


def test_another_writer_is_an_error_not_a_wait_for_ever(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    raw.execute("BEGIN IMMEDIATE")
    store._db.execute("PRAGMA busy_timeout=10")
    with pytest.raises(StoreError, match="locked"):
        store.put_key(record(1))
    raw.execute("ROLLBACK")
    raw.close()


# ── Rows ──────────────────────────────────────────────────────────────────────────────────────────


def test_keys_by_id_and_alias_of_their_tenant_only(store: Store) -> None:
    mine, theirs = record(1, alias="alias/a", versions=3), record(2, tenant="blue", alias="alias/a")
    store.put_key(mine)
    store.put_key(theirs)
    assert store.key("red", mine.id) == store.key("red", "alias/a") == mine
    assert store.key("blue", "alias/a") == theirs
    assert store.key("red", theirs.id) is None
    assert store.key("red", "alias/b") is None
    assert store.key("none", mine.id) is None
    assert store.keys("red", "", 10) == [mine]
    assert (store.count_keys("red"), store.count_keys("blue")) == (1, 1)
    assert store.tenants() == [("blue", 1), ("red", 1)]
    assert store.key_counts() == {"active": 2}


def test_an_alias_is_one_keys(store: Store) -> None:
    store.put_key(record(1, alias="alias/a"))
    store.savepoint()
    with pytest.raises(ConflictError):
        store.put_key(record(2, alias="alias/a"))
    store.undo()
    store.put_key(replace(record(1), alias=None))
    store.put_key(record(2, alias="alias/a"))


def test_a_key_never_changes_tenant_or_algorithm(store: Store) -> None:
    store.put_key(record(1))
    store.put_key(replace(record(1), tenant="blue", algorithm=Algorithm.ED25519, state=State.DEACTIVATED))
    key = store.key("red", record(1).id)
    assert key is not None
    assert (key.tenant, key.algorithm, key.state) == ("red", Algorithm.AES_256_GCM, State.DEACTIVATED)


def test_pages_of_keys(store: Store) -> None:
    for number in (3, 1, 2):
        store.put_key(record(number))
    assert [k.id for k in store.keys("red", record(1).id, 1)] == [record(2).id]
    assert [k.id for k in store.keys("red", record(2).id, 9)] == [record(3).id]


def test_a_list_shows_the_newest_versions_and_reads_no_more(store: Store) -> None:
    """Of keys with a hundred versions, a page must not take the vault's time."""
    key = record(1)
    versions = tuple(replace(key.versions[0], version=n) for n in range(1, 101))
    store.put_key(replace(key, versions=versions))
    store.put_key(record(2))
    store.put_key(replace(record(3), tenant="blue"))
    first, second = store.listed("red", "", 9, 16)
    assert [v.version for v in first.versions] == list(range(85, 101))
    assert (first.id, first.current.version, first.algorithm) == (key.id, 100, key.algorithm)
    assert (second.id, [v.version for v in second.versions]) == (record(2).id, [1])
    assert [k.id for k in store.listed("red", first.id, 1, 1)] == [second.id]
    asked: list[str] = []
    store._db.set_trace_callback(asked.append)
    store.listed("red", "", 9, 16)
    assert all("LIMIT" in sql for sql in asked)
    store._db.execute("DELETE FROM versions WHERE key=?", (second.id,))
    with pytest.raises(StoreError, match="lost its versions"):
        store.listed("red", "", 9, 16)
    store._db.execute("UPDATE versions SET state='odd' WHERE key=?", (first.id,))
    with pytest.raises(StoreError, match="damaged"):
        store.listed("red", "", 1, 16)


def test_tenants_and_bindings(store: Store) -> None:
    with pytest.raises(ConflictError):
        store.add_tenant("red", NOW)
    with pytest.raises(ConflictError):
        store.bind("x", "no such tenant", NOW, b"tag")
    store.bind("x", "red", NOW, b"tag")
    with pytest.raises(ConflictError):
        store.bind("x", "blue", NOW, b"tag")
    assert store.tenant_of("x") == "red"
    assert store.binding("x") == ("red", b"tag")
    assert ("x", "red") in store.bindings()
    assert store.unbind("x")
    assert not store.unbind("x")
    assert store.tenant_of("x") is None
    assert store.kek_generation("red") == 1
    assert store.kek_generation("none") is None
    with pytest.raises(ConflictError):
        store.put_key(record(1, tenant="none"))


def test_tokens_are_each_tenants_own(store: Store) -> None:
    store.put_token("red", "t", b"request", "key-1", NOW)
    assert store.token("red", "t") == (b"request", "key-1")
    assert store.token("blue", "t") is None
    store.put_token("blue", "t", b"other", "key-2", NOW)
    with pytest.raises(ConflictError):
        store.put_token("red", "t", b"other", "key-2", NOW)


def test_drift_stays_until_cleared(store: Store, tmp_path: Path) -> None:
    store.put_drift("files", ["f"], 5, 6)
    store.put_drift("files", ["g"], 7, 8)
    store.put_drift("ima", ["h"], 9, 10)
    store.commit()
    other = reopened(store, tmp_path)
    assert [(c, since, ledger) for c, _, since, ledger in other.drift()] == [("files", 7, 8), ("ima", 9, 10)]
    other.close()
    store.clear_drift("files")
    store.commit()
    assert [row[0] for row in store.drift()] == ["ima"]


# ── What is left of what was deleted ──────────────────────────────────────────────────────────────


def everything_on_the_disk(tmp_path: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()) if path.is_file())


@pytest.mark.parametrize("size", [60, 1800, 9000])
def test_flush_leaves_nothing_of_what_was_overwritten(store: Store, tmp_path: Path, size: int) -> None:
    """Rows that fit a page, and rows that need pages of their own."""
    markers = [os.urandom(size) for _ in range(20)]
    for i, marker in enumerate(markers):
        store.put_key(replace(record(i + 1), versions=(VersionRecord(1, State.ACTIVE, NOW, 1, marker),)))
    store.commit()
    store.flush()
    assert all(m[i : i + 16] in everything_on_the_disk(tmp_path) for m in markers for i in (0, size - 16))
    for i in range(len(markers)):
        gone = VersionRecord(1, State.DESTROYED, NOW, 2, b"")
        store.put_key(replace(record(i + 1), state=State.DESTROYED, versions=(gone,)))
    store.commit()
    store.flush()
    left = everything_on_the_disk(tmp_path)
    assert not [i for m in markers for i in range(0, size - 15, 16) if m[i : i + 16] in left]


def test_flush_says_when_a_reader_keeps_the_log_alive(store: Store, tmp_path: Path) -> None:
    store._db.execute("PRAGMA busy_timeout=10")
    raw = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    raw.execute("BEGIN")
    raw.execute("SELECT * FROM keys").fetchall()
    store.put_key(record(1))
    store.commit()
    with pytest.raises(StoreError, match="somebody reads"):
        store.flush()
    raw.close()
    store.flush()
