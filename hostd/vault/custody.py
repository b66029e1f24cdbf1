"""Custody: when the root key is in memory, and which reference values are in force.

The root key comes out of the TPM when the vault starts and after an officer has cleared a drift of the
host; it leaves memory at once when the host drifts. What hostd stores about itself (channel CA,
officers, reference values, accepted log entries) is wrapped under it, so it cannot be swapped on the disk.

Reference values come into force by the officers' signatures over the very bytes. When one of their digests
retires they are judged by without it from that second on.

Whoever writes to the store can put back rows that it once had, or take some away. So the ledger's word counts
besides: officers it has entries of are not recorded anew, and reference values older than those it has are
not in force.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from guestlib.errors import (
    ConflictError,
    DeniedError,
    HostdError,
    MalformedError,
    NotFoundError,
)
from hostd.core.appraisal import Appraiser, Rules
from hostd.core.appraise_ima import Accepted
from hostd.core.reference import (
    MalformedReferenceError,
    Reference,
    WrongHostError,
    check_host,
    parse_reference,
    reference_digest,
)
from hostd.platform.hostname import this_host
from hostd.platform.tpm_errors import TpmError, TpmPoisonError, TpmPolicyError
from hostd.vault.channelkeeper import ChannelKeeper
from hostd.vault.council import Council, OfficersError
from hostd.vault.primitives import IntegrityError
from hostd.vault.wallclock import WallClock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostd.config import Config
    from hostd.ipc.loop import Loop
    from hostd.platform.secretmem import SecretBuffer
    from hostd.vault.gate import Gate
    from hostd.vault.keyring import Keyring
    from hostd.vault.ledger import Entry
    from hostd.vault.mint import Mint
    from hostd.vault.store import Store
    from hostd.vault.tpmlink import TpmLink

UNSEAL_RETRY_S: Final = 2.0
LOCKED: Final = "locked after drift; an officer has to clear it"
_ACCEPTED: Final = "ima_accepted"
_REFERENCE: Final = "reference"
_SIGNATURES: Final = "reference_signatures"
RETIRE_CHECK_S: Final = 60.0
"""Longest wait for a digest's retirement: the wall clock may be set while we wait."""
_MANIFEST: Final = re.compile(r"version ([0-9]{1,16}), ([0-9a-f]{64}), signed by ")
"""Begins the detail of the ledger's entry of new reference values."""


class _Installed(NamedTuple):
    """Reference values as the ledger has them."""

    version: int
    digest: str


class House(Protocol):
    """What custody asks of the vault."""

    def record(
        self, event: str, *, outcome: str = "done", principal: str = "", subject: str = "", detail: str = ""
    ) -> int: ...

    def set_shut(self, what: str, reason: str | None) -> None: ...

    def new_reference(self) -> None: ...

    def judge_by(self, reference: Reference) -> None: ...

    def kick(self) -> None: ...


class Custody:
    """The keys and the documents that are stored under them."""

    def __init__(
        self,
        house: House,
        config: Config,
        loop: Loop,
        *,
        gate: Gate,
        store: Store,
        keyring: Keyring,
        mint: Mint,
        tpm: TpmLink,
        last: Mapping[str, Entry],
    ) -> None:
        """`last`: the ledger's last entries of events `officers`, `manifest`, `retire`, `channel` and
        `channel-next` before this start."""
        self._house = house
        self._config = config
        self._loop = loop
        self._gate = gate
        self._store = store
        self._keyring = keyring
        self._mint = mint
        self._tpm = tpm
        self._unsealing = False
        self._accepted: Accepted | None = None
        self._newly_accepted = False
        self._unstored: tuple[bytes, bytes] | None = None
        self._council = Council(config.officers)
        self._signatures = b""
        self._signed_by: tuple[str, ...] = ()
        self._officers_known = "officers" in last
        match = _MANIFEST.match(last["manifest"].detail) if "manifest" in last else None
        self._installed = None if match is None else _Installed(int(match[1]), match[2])
        # What has retired stays retired.
        self._clock = WallClock(
            max((last[event].time // 1000 for event in ("manifest", "retire") if event in last), default=0)
        )
        self._in_force: Reference | None = None
        self._retirement = loop.call_after(0.0, lambda: None)
        self.reference: Reference | None = None
        """The document as it was signed."""
        self.reference_digest = bytes(32)
        """Zeros while none is in force."""
        self.channel = ChannelKeeper(house.record, loop, store=store, keyring=keyring, last=last)
        self.held = False
        """A drift keeps the keys out of memory."""

    # ── Root key ──────────────────────────────────────────────────────────────────────────────────

    def unseal(self) -> None:
        """Asks the TPM for the root key, unless a drift of the host keeps the vault locked."""
        if self._unsealing or self._keyring.unlocked:
            return
        if self.held or self._gate.host_drifted():
            self._house.set_shut("keys", LOCKED)
            return
        self._unsealing = True
        self._house.set_shut("keys", "the root key is being unsealed")
        self._tpm.unseal(self._on_unsealed)

    def _on_unsealed(self, result: SecretBuffer | TpmError) -> None:
        self._unsealing = False
        if isinstance(result, TpmError):
            self._fail(f"the TPM does not unseal the root key: {result}")
            # A PCR that differs stays so until a reboot; a TPM that did not answer may come back.
            if not isinstance(result, TpmPolicyError | TpmPoisonError):
                self._loop.call_after(UNSEAL_RETRY_S, self.unseal)
            return
        if self.held or self._gate.host_drifted():
            result.wipe()
            return
        self._keyring.unlock(result)
        try:
            self._load()
        except OfficersError as error:
            self.lock()
            self._fail(str(error))
            return
        except (IntegrityError, MalformedReferenceError) as error:
            self.lock()
            self._fail(f"the store is not this host's, or was altered: {error}")
            return
        self._mint.start()
        self._house.set_shut("keys", None)
        self._house.record("unseal", detail="root key unsealed")
        self._house.kick()

    def _fail(self, reason: str) -> None:
        self._house.set_shut("keys", reason)
        self._house.record("unseal", outcome="failed", detail=reason)

    def lock(self) -> None:
        """Keys leave memory. (The channel CA stays: a guest must be able to ask why.)"""
        self._keyring.lock()
        self._mint.stop()

    # ── What is stored under it ───────────────────────────────────────────────────────────────────

    def _load(self) -> None:
        # Both are made together: a store without officers that has a channel CA has lost them.
        first = self._store.meta("channel_ca_key") is None and not self._officers_known
        if self._council.confirm(self._store, self._keyring, first=first):
            self._house.record("officers", detail=self._council.describe())
        self.channel.load()
        self._keep_accepted()
        self._store_reference()
        document, signatures = self._store.meta(_REFERENCE), self._store.meta(_SIGNATURES)
        if document is not None and self.reference is None:
            self._use_stored(
                self._keyring.unwrap_service_key(_REFERENCE, document),
                self._keyring.unwrap_service_key(_SIGNATURES, signatures or b""),
            )
        elif self.reference is None and self._installed is not None:
            self._want_installed("none")
        self._store.commit()

    def _use_stored(self, document: bytes, signatures: bytes) -> None:
        try:
            signed_by = self._council.verify(document, signatures)
        except (DeniedError, MalformedError) as error:
            raise OfficersError(f"the stored reference values are not the officers': {error}") from error
        reference = parse_reference(document)
        if self._installed is not None and reference.version < self._installed.version:
            self._want_installed(f"version {reference.version}")
        else:
            self._use(reference, signatures, signed_by)

    def _want_installed(self, stored: str) -> None:
        assert self._installed is not None
        version, digest = self._installed
        self._house.set_shut(
            "reference",
            f"version {version} ({digest[:16]}…) of the reference values was in force by the ledger, and the "
            f"store has {stored}: install it again",
        )

    def _use(self, reference: Reference, signatures: bytes, signed_by: tuple[str, ...]) -> None:
        self.reference = reference
        self.reference_digest = reference_digest(reference)
        self._signatures, self._signed_by = signatures, signed_by
        self._in_force = reference.at(self._clock.now())
        self._await_retirement()
        self._house.set_shut("reference", None)
        self._house.new_reference()

    @property
    def signed(self) -> tuple[bytes, tuple[str, ...]]:
        """The signatures over the document in force, and who made them.

        Raises:
            NotFoundError: none is in force.
        """
        if self.reference is None:
            raise NotFoundError("no reference values are in force")
        return self._signatures, self._signed_by

    def install_reference(self, document: bytes, signatures: bytes, officer: str) -> tuple[str, ...]:
        """Puts signed reference values into force; the names of those who signed.

        They are stored under the keys; while these are locked (after a drift that other values are to
        mend) they are in force and stored with the next unsealing. A vault that ends before it has
        none, until they are installed again. `officer` is who asks for it, which gives no right to it.

        Raises:
            MalformedError: not a document, or not signatures.
            DeniedError: too few officers signed it.
            ConflictError: for another host, not newer than the document in force, or made from another one.
            UnavailableError: the keys were never unsealed since the vault's start.
            LedgerError: it could not be recorded; nothing changed.
        """
        try:
            reference = parse_reference(document)
        except MalformedReferenceError as error:
            raise MalformedError(str(error)) from error
        names = self._council.verify(document, signatures)
        try:
            check_host(reference, this_host())
        except WrongHostError as error:
            raise ConflictError(str(error)) from error
        self._check_order(reference)
        digest = reference_digest(reference).hex()
        detail = f"version {reference.version}, {digest}, signed by {', '.join(names)}"
        self._house.record("manifest", principal=officer, detail=detail)
        self._unstored = document, signatures
        if self._keyring.unlocked:
            self._store_reference()
            self._store.commit()
        self._use(reference, signatures, names)
        return names

    def _check_order(self, new: Reference) -> None:
        if self.reference is None:
            self._check_not_older(new)
            return
        if new.version <= self.reference.version:
            raise ConflictError(
                f"version {new.version} is not newer than version {self.reference.version}, which is in force"
            )
        if new.previous and new.previous != self.reference_digest.hex():
            raise ConflictError(
                f"it was made from the document {new.previous[:16]}…, "
                f"and {self.reference_digest.hex()[:16]}… is in force"
            )

    def _check_not_older(self, new: Reference) -> None:
        """The store has lost what was in force: the same may come back, or what is newer."""
        before = self._installed
        if before is None or new.version > before.version:
            return
        if (new.version, reference_digest(new).hex()) != before:
            raise ConflictError(
                f"version {new.version} is not newer than version {before.version} ({before.digest[:16]}…), "
                "which was in force by the ledger"
            )

    def _store_reference(self) -> None:
        unstored, self._unstored = self._unstored, None
        if unstored is not None:
            for name, value in zip((_REFERENCE, _SIGNATURES), unstored, strict=True):
                self._store.set_meta(name, self._keyring.wrap_service_key(name, value))

    # ── Retirement ────────────────────────────────────────────────────────────────────────────────

    def _await_retirement(self) -> None:
        self._retirement.cancel()
        due = None if self.reference is None else self.reference.next_change(self._clock.last)
        if due is not None:
            wait = min(max(due - time.time(), 0.0), RETIRE_CHECK_S)
            self._retirement = self._loop.call_after(wait, self._on_retirement)

    def _on_retirement(self) -> None:
        reference, before = self.reference, self._clock.last
        if reference is None:
            return
        now = self._clock.now()
        retired = sorted(
            path for path, times in reference.retire.items() if any(before < t <= now for t in times.values())
        )
        if retired:
            self._in_force = reference.at(now)
            self._house.judge_by(self._in_force)
            with suppress(HostdError):  # the gate is shut then
                self._house.record("retire", detail=f"{len(retired)} paths: {' | '.join(retired)}")
            self._house.kick()
        self._await_retirement()

    def accept_log(self, accepted: Accepted) -> None:
        """An officer accepts the IMA log so far; kept across restarts once the keys are there."""
        self._accepted = accepted
        self._newly_accepted = True
        if self._keyring.unlocked:
            self._keep_accepted()
            self._store.commit()

    def _keep_accepted(self) -> None:
        if self._newly_accepted:
            body = msgspec.msgpack.encode(self._accepted)
            self._store.set_meta(_ACCEPTED, self._keyring.wrap_service_key(_ACCEPTED, body))
            self._newly_accepted = False
        elif (wrapped := self._store.meta(_ACCEPTED)) is not None:
            body = self._keyring.unwrap_service_key(_ACCEPTED, wrapped)
            self._accepted = msgspec.msgpack.decode(body, type=Accepted)

    def new_appraiser(self) -> Appraiser | None:
        """A judge that knows nothing yet; None without reference values."""
        if self._in_force is None:
            return None
        rules = Rules(
            allow_jit=self._config.hypervisor.allow_jit,
            protected=self._config.measure.protected,
            accepted=self._accepted,
            pcrs=self._tpm.sealed_to,
        )
        return Appraiser(self._in_force, rules)
