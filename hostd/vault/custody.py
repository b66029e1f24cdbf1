"""Custody: when the root key is in memory, which reference values are in force, and who issues channels.

The root key comes out of the TPM when the vault starts and after an officer has cleared a drift of the
host; it leaves memory at once when the host drifts. What hostd stores about itself (channel CA,
reference values, accepted log entries) is wrapped under it, so it cannot be swapped on the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from guestlib.errors import UnavailableError
from hostd.core.appraisal import Appraiser, Rules
from hostd.core.appraise_ima import Accepted
from hostd.core.reference import MalformedReferenceError, Reference, parse_reference, reference_digest
from hostd.platform.tpm_errors import TpmError, TpmPolicyError
from hostd.vault.channelca import ChannelCa, utc_now
from hostd.vault.evidence import spki_digest
from hostd.vault.primitives import IntegrityError

if TYPE_CHECKING:
    from hostd.config import Config
    from hostd.ipc.loop import Loop
    from hostd.ipc.serving import ChannelIdentity
    from hostd.platform.secretmem import SecretBuffer
    from hostd.vault.gate import Gate
    from hostd.vault.keyring import Keyring
    from hostd.vault.mint import Mint
    from hostd.vault.store import Store
    from hostd.vault.tpmlink import TpmLink

UNSEAL_RETRY_S: Final = 2.0
LOCKED: Final = "locked after drift; an officer has to clear it"
_ACCEPTED: Final = "ima_accepted"
_REFERENCE: Final = "reference"


class House(Protocol):
    """What custody asks of the vault."""

    def record(
        self, event: str, *, outcome: str = "done", principal: str = "", subject: str = "", detail: str = ""
    ) -> int: ...

    def set_shut(self, what: str, reason: str | None) -> None: ...

    def new_reference(self) -> None: ...

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
    ) -> None:
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
        self._unstored: bytes | None = None
        self.reference: Reference | None = None
        self.reference_digest = bytes(32)
        """Zeros while none is in force."""
        self.channel_ca: ChannelCa | None = None
        self.channel_ca_digest = bytes(32)

    # ── Root key ──────────────────────────────────────────────────────────────────────────────────

    def unseal(self) -> None:
        """Asks the TPM for the root key, unless a drift of the host keeps the vault locked."""
        if self._unsealing or self._keyring.unlocked:
            return
        if self._gate.host_drifted():
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
            if not isinstance(result, TpmPolicyError):
                self._loop.call_after(UNSEAL_RETRY_S, self.unseal)
            return
        if self._gate.host_drifted():
            result.wipe()
            return
        self._keyring.unlock(result)
        try:
            self._load()
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
        if self.channel_ca is None:
            self.channel_ca = ChannelCa.load(self._store, self._keyring, utc_now())
            self.channel_ca_digest = spki_digest(self.channel_ca.certificate_der)
        self._keep_accepted()
        self._store_reference()
        wrapped = self._store.meta(_REFERENCE)
        if wrapped is not None and self.reference is None:
            self._use(parse_reference(self._keyring.unwrap_service_key(_REFERENCE, wrapped)))
        self._store.commit()

    def _use(self, reference: Reference) -> None:
        self.reference = reference
        self.reference_digest = reference_digest(reference)
        self._house.set_shut("reference", None)
        self._house.new_reference()

    def install_reference(self, reference: Reference, document: bytes, officer: str) -> None:
        """Puts reviewed reference values into force.

        They are stored under the keys; while these are locked (after a drift that other values are to
        mend) they are in force and stored with the next unsealing. A vault that ends before it has
        the old ones.

        Raises:
            LedgerError: it could not be recorded; nothing changed.
        """
        digest = reference_digest(reference).hex()
        self._house.record("baseline", principal=officer, detail=f"reference values {digest}")
        self._unstored = document
        if self._keyring.unlocked:
            self._store_reference()
            self._store.commit()
        self._use(reference)

    def _store_reference(self) -> None:
        document, self._unstored = self._unstored, None
        if document is not None:
            self._store.set_meta(_REFERENCE, self._keyring.wrap_service_key(_REFERENCE, document))

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
        if self.reference is None:
            return None
        rules = Rules(
            allow_jit=self._config.hypervisor.allow_jit,
            protected=self._config.measure.protected,
            accepted=self._accepted,
            pcrs=self._tpm.sealed_to,
        )
        return Appraiser(self.reference, rules)

    def identity(self) -> ChannelIdentity:
        """A certificate for a worker.

        Raises:
            UnavailableError: the keys have not been unsealed since the start.
        """
        if self.channel_ca is None:
            raise UnavailableError("the channel CA is not available")
        return self.channel_ca.issue(utc_now())
