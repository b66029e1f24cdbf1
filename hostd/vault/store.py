"""The vault's store: SQLite, one writer, durable at `commit`.

Holds names, states and wrapped keys; no plaintext key ever reaches it. Everything a batch changes
is one transaction: `commit` returns after it is on the disk (WAL, synchronous=FULL), `rollback`
leaves nothing. A missing, alien or too new file is refused by name, never replaced.

Keys and bindings that were read are kept (`Known`) until the next statement that is not a SELECT,
whichever row it touches: a change, a step undone and a rollback act at the next request. `refresh`
does the same for what another process wrote.
"""

from __future__ import annotations

import os
import sqlite3
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

from guestlib.errors import ConflictError, UnavailableError
from hostd.core.keys import Algorithm, KeyRecord, Listed, ListedVersion, State, VersionRecord
from hostd.platform.durable import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

APPLICATION_ID: Final = 0x68737464
"""`hstd`, in SQLite's header: what `file` and we look at."""
FORMAT: Final = 1
TOKEN_LIFE_MS: Final = 24 * 3600 * 1000
"""An idempotency token is remembered for a day."""
BUSY_S: Final = 2.0
"""We are the only writer; a lock held longer than this by somebody else is an error."""
MAX_KNOWN: Final = 1024
"""Rows of a kind that are kept after they were read; the least recently used leaves. A key of one version
takes about 1 KiB, one of a hundred (the most it may have) 30 KiB: at worst 30 MiB."""

T = TypeVar("T")

_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TABLE tenants (
    name TEXT PRIMARY KEY, created INTEGER NOT NULL, kek_generation INTEGER NOT NULL
) STRICT;
CREATE TABLE bindings (
    principal TEXT PRIMARY KEY, tenant TEXT NOT NULL REFERENCES tenants(name), created INTEGER NOT NULL,
    tag BLOB NOT NULL
) STRICT;
CREATE TABLE keys (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL REFERENCES tenants(name), algorithm TEXT NOT NULL,
    state TEXT NOT NULL, created INTEGER NOT NULL, alias TEXT, UNIQUE (tenant, alias)
) STRICT;
CREATE INDEX keys_by_tenant ON keys (tenant, id);
CREATE TABLE versions (
    key TEXT NOT NULL REFERENCES keys(id), version INTEGER NOT NULL, state TEXT NOT NULL,
    created INTEGER NOT NULL, generation INTEGER NOT NULL, wrapped BLOB NOT NULL,
    PRIMARY KEY (key, version)
) STRICT, WITHOUT ROWID;
CREATE TABLE tokens (
    tenant TEXT NOT NULL, token TEXT NOT NULL, request BLOB NOT NULL, key TEXT NOT NULL,
    created INTEGER NOT NULL, PRIMARY KEY (tenant, token)
) STRICT, WITHOUT ROWID;
CREATE INDEX tokens_by_age ON tokens (created);
CREATE TABLE drift (
    component TEXT PRIMARY KEY, findings BLOB NOT NULL, since INTEGER NOT NULL, ledger INTEGER NOT NULL
) STRICT;
"""


class StoreError(UnavailableError):
    """The store cannot be used: missing, another program's, a newer format, or the disk failed."""


class Known(Generic[T]):
    """What was read, by what it was asked for. That there is nothing is not kept."""

    def __init__(self) -> None:
        self._found: OrderedDict[object, T] = OrderedDict()

    def get(self, asked: object) -> T | None:
        found = self._found.get(asked)
        if found is not None:
            self._found.move_to_end(asked)
        return found

    def put(self, asked: object, found: T) -> None:
        self._found[asked] = found
        if len(self._found) > MAX_KNOWN:
            self._found.popitem(last=False)

    def clear(self) -> None:
        self._found.clear()


class Store:
    """The one connection to the store."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Opens the store; `create` makes a new one and refuses to touch an existing file.

        Raises:
            StoreError: see the class.
        """
        self._keys: Known[KeyRecord] = Known()
        self._bindings: Known[tuple[str, bytes]] = Known()
        self._version = 0
        if create == path.exists():
            raise StoreError(f"{path}: {'already exists' if create else 'does not exist'}")
        try:
            if create:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.execute("PRAGMA trusted_schema=OFF")
            self._db.execute("PRAGMA secure_delete=ON")
            if create:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.executescript(
                    f"BEGIN; PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={FORMAT};"
                    f"{_SCHEMA} COMMIT;"
                )
            if self._pragma("application_id") != APPLICATION_ID:
                raise StoreError(f"{path}: not a hostd store")
            if self._pragma("user_version") != FORMAT:
                raise StoreError(f"{path}: format {self._pragma('user_version')}, this hostd knows {FORMAT}")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            if create:
                sync_folder(path.parent)
                self.set_meta("store_id", os.urandom(16))
                self.commit()
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{path}: {error}") from error

    def _pragma(self, name: str) -> Any:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    # ── Transactions ──────────────────────────────────────────────────────────────────────────────

    def _run(self, sql: str, *values: object) -> sqlite3.Cursor:
        if not sql.startswith("SELECT"):
            self._forget()
        try:
            return self._db.execute(sql, values)
        except sqlite3.IntegrityError as error:
            raise ConflictError("that already exists, or depends on something that does not") from error
        except sqlite3.Error as error:
            raise StoreError(f"store: {error}") from error

    def _forget(self) -> None:
        self._keys.clear()
        self._bindings.clear()

    def refresh(self) -> None:
        """Forgets what was read if another process has changed the file since (once a batch: 2 µs).

        Source: sqlite.org/pragma.html#pragma_data_version.
        """
        try:
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error as error:
            raise StoreError(f"store: {error}") from error
        if version != self._version:
            self._version = version
            self._forget()

    def _write(self, sql: str, *values: object) -> None:
        if not self._db.in_transaction:
            self._run("BEGIN IMMEDIATE")
        self._run(sql, *values)

    @property
    def dirty(self) -> bool:
        return self._db.in_transaction

    def savepoint(self) -> None:
        """Starts a step that can be undone alone inside the batch's transaction."""
        if not self._db.in_transaction:
            self._run("BEGIN IMMEDIATE")
        self._run("SAVEPOINT step")

    def release(self) -> None:
        self._run("RELEASE step")

    def undo(self) -> None:
        self._run("ROLLBACK TO step")
        self._run("RELEASE step")

    def commit(self) -> None:
        """Makes everything since the last commit durable."""
        if self._db.in_transaction:
            self._run("COMMIT")

    def flush(self) -> None:
        """Moves the write-ahead log into the file and empties it: a shredded row stays in neither.

        Raises:
            StoreError: another process holds the file open for reading, and what it reads stays.
        """
        ((busy, _, _),) = self._run("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if busy:
            raise StoreError("store: somebody reads the file; its write-ahead log cannot be emptied")

    def rollback(self) -> None:
        if self._db.in_transaction:
            self._run("ROLLBACK")

    def close(self) -> None:
        self._db.close()

    # ── Small things ──────────────────────────────────────────────────────────────────────────────

    def meta(self, name: str) -> bytes | None:
        row = self._run("SELECT value FROM meta WHERE name=?", name).fetchone()
        return None if row is None else bytes(row[0])

    def set_meta(self, name: str, value: bytes) -> None:
        self._write("INSERT OR REPLACE INTO meta VALUES (?,?)", name, value)

    @property
    def store_id(self) -> bytes:
        value = self.meta("store_id")
        if value is None:
            raise StoreError("store has no id")
        return value

    # ── Tenants and who belongs to them ───────────────────────────────────────────────────────────

    def add_tenant(self, name: str, now: int) -> None:
        self._write("INSERT INTO tenants VALUES (?,?,1)", name, now)

    def tenants(self) -> list[tuple[str, int]]:
        return self._run(
            "SELECT name, (SELECT count(*) FROM keys WHERE tenant=name) FROM tenants ORDER BY name"
        ).fetchall()

    def kek_generation(self, tenant: str) -> int | None:
        row = self._run("SELECT kek_generation FROM tenants WHERE name=?", tenant).fetchone()
        return None if row is None else int(row[0])

    def bind(self, principal: str, tenant: str, now: int, tag: bytes) -> None:
        self._write("INSERT INTO bindings VALUES (?,?,?,?)", principal, tenant, now, tag)

    def unbind(self, principal: str) -> bool:
        self._write("DELETE FROM bindings WHERE principal=?", principal)
        return bool(self._run("SELECT changes()").fetchone()[0])

    def binding(self, principal: str) -> tuple[str, bytes] | None:
        """(tenant, tag) as stored; `membership` says whether it may be believed."""
        found = self._bindings.get(principal)
        if found is None:
            row = self._run("SELECT tenant, tag FROM bindings WHERE principal=?", principal).fetchone()
            if row is None:
                return None
            found = str(row[0]), bytes(row[1])
            self._bindings.put(principal, found)
        return found

    def tenant_of(self, principal: str) -> str | None:
        """The tenant as stored, for lists that officers read. Nothing is granted on it."""
        found = self.binding(principal)
        return None if found is None else found[0]

    def bindings(self) -> list[tuple[str, str]]:
        return self._run("SELECT principal, tenant FROM bindings ORDER BY principal").fetchall()

    # ── Keys ──────────────────────────────────────────────────────────────────────────────────────

    def put_key(self, key: KeyRecord) -> None:
        """Inserts or replaces a key and all its versions.

        Raises:
            ConflictError: the alias is in use.
        """
        self._write(
            "INSERT INTO keys VALUES (?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET state=excluded.state,"
            " alias=excluded.alias",
            *(key.id, key.tenant, key.algorithm.value, key.state.value, key.created, key.alias),
        )
        for v in key.versions:
            self._write(
                "INSERT OR REPLACE INTO versions VALUES (?,?,?,?,?,?)",
                *(key.id, v.version, v.state.value, v.created, v.generation, v.wrapped),
            )

    def key(self, tenant: str, reference: str) -> KeyRecord | None:
        """A key of this tenant, by id or alias; another tenant's key is no key."""
        key = self._keys.get((tenant, reference))
        if key is not None:
            return key
        column = "alias" if reference.startswith("alias/") else "id"
        row = self._run(
            f"SELECT id, tenant, algorithm, state, created, alias FROM keys WHERE tenant=? AND {column}=?",  # noqa: S608
            *(tenant, reference),
        ).fetchone()
        if row is None:
            return None
        key = self._with_versions(row)
        self._keys.put((tenant, reference), key)
        return key

    def keys(self, tenant: str, after: str, limit: int) -> list[KeyRecord]:
        rows = self._run(
            "SELECT id, tenant, algorithm, state, created, alias FROM keys"
            " WHERE tenant=? AND id>? ORDER BY id LIMIT ?",
            *(tenant, after, limit),
        ).fetchall()
        return [self._with_versions(row) for row in rows]

    def listed(self, tenant: str, after: str, limit: int, newest: int) -> list[Listed]:
        """`keys` with so many of their versions: one of a hundred is not read whole."""
        rows = self._run(
            "SELECT id, algorithm, state, created, alias FROM keys"
            " WHERE tenant=? AND id>? ORDER BY id LIMIT ?",
            *(tenant, after, limit),
        ).fetchall()
        return [self._listed(row, newest) for row in rows]

    def _listed(self, row: tuple[Any, ...], newest: int) -> Listed:
        versions = self._run(
            "SELECT version, state, created FROM versions WHERE key=? ORDER BY version DESC LIMIT ?",
            *(row[0], newest),
        ).fetchall()
        if not versions:
            raise StoreError(f"store: key {row[0]!r} has lost its versions")
        try:
            shown = tuple(ListedVersion(v[0], State(v[1]), v[2]) for v in reversed(versions))
            return Listed(row[0], Algorithm(row[1]), State(row[2]), row[3], row[4], shown)
        except ValueError as error:
            raise StoreError(f"store: row of key {row[0]!r} is damaged: {error}") from error

    def _with_versions(self, row: tuple[Any, ...]) -> KeyRecord:
        versions = self._run(
            "SELECT version, state, created, generation, wrapped FROM versions WHERE key=? ORDER BY version",
            row[0],
        )
        try:
            key = KeyRecord(
                id=row[0],
                tenant=row[1],
                algorithm=Algorithm(row[2]),
                state=State(row[3]),
                created=row[4],
                alias=row[5],
                versions=tuple(VersionRecord(v[0], State(v[1]), v[2], v[3], bytes(v[4])) for v in versions),
            )
        except ValueError as error:
            raise StoreError(f"store: row of key {row[0]!r} is damaged: {error}") from error
        if not key.versions:
            raise StoreError(f"store: key {row[0]!r} has lost its versions")
        return key

    def count_keys(self, tenant: str) -> int:
        """Keys of a tenant, destroyed ones included."""
        return int(self._run("SELECT count(*) FROM keys WHERE tenant=?", tenant).fetchone()[0])

    def key_counts(self) -> dict[str, int]:
        """Keys by state."""
        return dict(self._run("SELECT state, count(*) FROM keys GROUP BY state").fetchall())

    # ── Idempotency ───────────────────────────────────────────────────────────────────────────────

    def token(self, tenant: str, token: str) -> tuple[bytes, str] | None:
        """(digest of the request it was used for, key it made or changed)."""
        row = self._run(
            "SELECT request, key FROM tokens WHERE tenant=? AND token=?", tenant, token
        ).fetchone()
        return None if row is None else (bytes(row[0]), str(row[1]))

    def put_token(self, tenant: str, token: str, request: bytes, key: str, now: int) -> None:
        self._write("DELETE FROM tokens WHERE created < ?", now - TOKEN_LIFE_MS)
        self._write("INSERT INTO tokens VALUES (?,?,?,?,?)", tenant, token, request, key, now)

    # ── Drift that no officer has cleared ─────────────────────────────────────────────────────────

    def put_drift(self, component: str, findings: object, since: int, ledger: int) -> None:
        self._write(
            "INSERT OR REPLACE INTO drift VALUES (?,?,?,?)",
            *(component, msgspec.msgpack.encode(findings), since, ledger),
        )

    def clear_drift(self, component: str) -> None:
        self._write("DELETE FROM drift WHERE component=?", component)

    def drift(self) -> Iterator[tuple[str, bytes, int, int]]:
        yield from self._run("SELECT component, findings, since, ledger FROM drift ORDER BY component")
