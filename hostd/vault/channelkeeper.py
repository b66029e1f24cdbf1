"""Which channel CA is in force, and how one follows another.

A CA's key is in the store, wrapped under ROOT, and its public key's digest is in the evidence that the TPM
signs: that ties the channel a guest sees to the measured host. It stays in memory when the keys are locked,
because a guest must be able to ask why it is refused.

Another one comes into force by an officer's command, or by itself when three quarters of its life are over.
The ledger names it first, durably; then the store has it, in one transaction. So the ledger's word counts:
a store that has another one, because the vault was killed between the two or because somebody put an older
row back, does not bring a CA back, nor one that was prepared before. What was prepared and is the one that
the ledger names comes into force; else a new one is made.

Connections that are open go on under the certificate they began with; the gateway gives new ones to new
workers (`changed`).
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final, get_args

from guestlib.errors import ConflictError, HostdError, UnavailableError
from hostd.ipc.channel_ca import ChannelCommand, ChannelReport, RotateChannel
from hostd.vault.channelca import LEAF_LIFE, RENEW_AT, ChannelCa, utc_now
from hostd.vault.wallclock import WallClock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hostd.ipc.loop import Loop
    from hostd.ipc.serving import ChannelIdentity
    from hostd.vault.keyring import Keyring
    from hostd.vault.ledger import Entry
    from hostd.vault.store import Store

EVENT: Final = "channel"
"""Of the ledger's entry that names the CA in force from then on."""
PREPARED: Final = "channel-next"
CHECK_S: Final = 600.0
"""How often the CA's age is looked at: the wall clock may be set meanwhile."""
_CURRENT: Final = ("channel-ca", "channel_ca_key", "channel_ca_certificate")
_NEXT: Final = ("channel-ca-next", "channel_ca_next_key", "channel_ca_next_certificate")
"""What the key is wrapped as, and two names in the store. (A next one's row is no current one's.)"""
_NAMED: Final = re.compile(r"([0-9a-f]{64}), ")
"""Begins the detail of both entries."""


def _digest_in(entry: Entry | None) -> bytes:
    """Of the CA that an entry names; empty if there is none."""
    match = None if entry is None else _NAMED.match(entry.detail)
    return b"" if match is None else bytes.fromhex(match[1])


class ChannelKeeper:
    """Answers `COMMANDS`; gives workers their certificates."""

    COMMANDS: Final = get_args(ChannelCommand)

    def __init__(
        self,
        record: Callable[..., int],
        loop: Loop,
        *,
        store: Store,
        keyring: Keyring,
        last: Mapping[str, Entry],
    ) -> None:
        """`record` is the vault's: a durable entry in the ledger. `last`: the last ones of `EVENT` and
        `PREPARED` before this start."""
        self._record = record
        self._loop = loop
        self._store = store
        self._keyring = keyring
        used, prepared = last.get(EVENT), last.get(PREPARED)
        self._named = _digest_in(used)
        newer = prepared is not None and (used is None or prepared.seq > used.seq)
        self._prepared = _digest_in(prepared) if newer else b""
        self._clock = WallClock(0 if used is None else used.time // 1000)
        self._due = 0
        self._issued = 0
        self._next: ChannelCa | None = None
        self.ca: ChannelCa | None = None
        """None until the keys are first unsealed."""
        self.changed: Callable[[], None] = lambda: None
        """Called when certificates issued so far are an earlier CA's."""
        loop.call_after(CHECK_S, self._check)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the CA's SubjectPublicKeyInfo; zeros while there is none."""
        return bytes(32) if self.ca is None else self.ca.digest

    @property
    def pinned(self) -> tuple[bytes, ...]:
        """Certificates (DER) that a bundle accepts: the CA's, and the prepared one's.

        Raises:
            UnavailableError: the keys have not been unsealed since the start.
        """
        return tuple(ca.certificate_der for ca in (self._needed(), self._next) if ca is not None)

    def identity(self) -> ChannelIdentity:
        """A certificate for a worker.

        Raises:
            UnavailableError: the keys have not been unsealed since the start, or were locked for so long that
                the CA is over.
        """
        ca, now = self._needed(), utc_now()
        if ca.line.not_after <= now.timestamp():
            raise UnavailableError("the channel CA is no longer valid")
        made = ca.issue(now)
        self._issued += 1
        return made

    def _needed(self) -> ChannelCa:
        if self.ca is None:
            raise UnavailableError("the channel CA is not available: the keys have not been unsealed")
        return self.ca

    # ── Commands ──────────────────────────────────────────────────────────────────────────────────

    def answer(self, command: ChannelCommand, officer: str) -> ChannelReport:
        """Does what an officer asks for.

        Raises:
            UnavailableError: the keys are locked, or were never unsealed.
            ConflictError: one is prepared already, or none is and it should come into force.
            LedgerError, StoreError: it could not be recorded or stored; the CA is the one before.
        """
        if isinstance(command, RotateChannel):
            if not self._keyring.unlocked:
                raise UnavailableError("the keys are locked: no channel CA can be stored")
            match command.step:
                case "now":
                    self._use(ChannelCa.make(utc_now()), "by an officer", officer)
                case "prepare":
                    self._prepare(officer)
                case "commit":
                    if self._next is None:
                        raise ConflictError("no channel CA is prepared")
                    self._use(self._next, "prepared before, by an officer", officer)
        return self._report()

    def _report(self) -> ChannelReport:
        following = None if self._next is None else self._next.line
        return ChannelReport(self._needed().line, self._due, self._issued, following)

    def _prepare(self, officer: str) -> None:
        if self._next is not None:
            raise ConflictError(
                f"{self._next.digest.hex()[:16]}… is prepared already: commit it, or rotate without it"
            )
        made = ChannelCa.make(utc_now())
        self._record(PREPARED, principal=officer, detail=f"{made.digest.hex()}, prepared")
        self._put(_NEXT, made)
        self._commit()
        self._next = made

    # ── Coming into force ─────────────────────────────────────────────────────────────────────────

    def load(self) -> None:
        """Takes the store's CA, or makes one; called when the keys have been unsealed.

        Raises:
            IntegrityError: a stored key or certificate was altered, or is another host's.
            LedgerError, StoreError: a new one could not be recorded or stored.
        """
        if self.ca is not None:
            return
        current, following = self._get(_CURRENT), self._get(_NEXT)
        if following is not None and following.digest == self._named:
            current, following = following, None
            self._keep(current)
        elif following is not None and self._named and following.digest != self._prepared:
            following = None  # it was forgotten, or has been in force
        self._next = following
        if current is None:
            self._use(following or ChannelCa.make(utc_now()), "the first", "")
        elif self._named not in (b"", current.digest):
            seen = current.digest.hex()[:16]
            why = f"the store had {seen}… and not {self._named.hex()[:16]}…, which was in force"
            self._use(ChannelCa.make(utc_now()), why, "")
        else:
            self._set(current, current.made)
        self.renew()

    def renew(self) -> None:
        """Another CA, if three quarters of this one's life are over and the keys are there: the prepared
        one if it is not as old itself. Or if its last day has begun by the host's clock, which may have been
        ahead before."""
        now = self._clock.now()
        if self.ca is None or not self._keyring.unlocked:
            return
        if now < self._due and (utc_now() + LEAF_LIFE).timestamp() < self.ca.line.not_after:
            return
        following, why = self._next, "prepared before"
        if following is None or following.due(following.made) <= now:
            following, why = ChannelCa.make(utc_now()), "made anew"
        with suppress(HostdError):  # the gate is shut then, or it is tried again
            self._use(following, f"{why}: {RENEW_AT:.0%} of the life of the one before are over", "")

    def _check(self) -> None:
        self.renew()
        self._loop.call_after(CHECK_S, self._check)

    def _use(self, ca: ChannelCa, why: str, officer: str) -> None:
        before = f", after {self.ca.digest.hex()[:16]}…" if self.ca is not None else ""
        self._record(EVENT, principal=officer, detail=f"{ca.digest.hex()}, {why}{before}")
        self._keep(ca)
        self._next = None
        self._set(ca, self._clock.now())
        self.changed()

    def _set(self, ca: ChannelCa, since: int) -> None:
        """`since`: seconds of the clock that its age is told by. (A certificate is dated by the host's own
        clock: guests have no other.)"""
        self.ca, self._named = ca, ca.digest
        self._due = ca.due(since)

    # ── The store ─────────────────────────────────────────────────────────────────────────────────

    def _keep(self, ca: ChannelCa) -> None:
        """In force and none prepared, in one transaction."""
        self._put(_CURRENT, ca)
        self._put(_NEXT, None)
        self._commit()

    def _commit(self) -> None:
        try:
            self._store.commit()
        except HostdError:
            self._store.rollback()
            raise

    def _put(self, names: tuple[str, str, str], ca: ChannelCa | None) -> None:
        wrapped_as, key, certificate = names
        self._store.set_meta(
            key, b"" if ca is None else self._keyring.wrap_service_key(wrapped_as, ca.key_der)
        )
        self._store.set_meta(certificate, b"" if ca is None else ca.certificate_der)

    def _get(self, names: tuple[str, str, str]) -> ChannelCa | None:
        wrapped_as, key, certificate = names
        wrapped, der = self._store.meta(key), self._store.meta(certificate)
        if not wrapped or not der:
            return None
        return ChannelCa.read(self._keyring.unwrap_service_key(wrapped_as, wrapped), der)
