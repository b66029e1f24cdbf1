"""The TPM as hostd uses it: PCRs, quotes, sealing. Bytes in, bytes out.

Every secret crosses the wire in a session salted with the pinned storage key, so neither a
listener on the bus nor another TPM behind the same device can read it. No authValue and no
password branch: nothing here can run into the TPM's dictionary-attack lockout.

It refuses to work with a TPM whose keys are not the recorded ones. It does not decide anything: which
PCRs, which values, what is signed are the caller's.

TPM 2.0 part 3: sections 12.7 (Unseal), 18.4 (Quote), 22.4 (PCR_Read), 23.7 (PolicyPCR).
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from guestlib.attest.credential import Credential
from guestlib.attest.tpm2 import parse_attest
from hostd.platform.tpm_enrol import activate
from hostd.platform.tpm_errors import (
    PcrMismatch,
    TpmBlobError,
    TpmBusyError,
    TpmCommandError,
    TpmError,
    TpmIdentityError,
    TpmPoisonError,
    TpmPolicyError,
    TpmUnavailableError,
)
from hostd.platform.tpm_esys import (
    RC_NO_SUCH_HANDLE,
    RC_PCR_CHANGED,
    Esys,
    Handle,
    base_error,
    is_parameter_error,
)
from hostd.platform.tpm_files import SealedBlob, TpmRecord, name_of, sealed_blob
from hostd.platform.tpm_policy import DIGEST_BYTES, PCR_COUNT, check_selection, pcr_digest, policy_pcr
from hostd.platform.tpm_tcti import Link
from hostd.platform.tpm_templates import (
    AUDIT,
    ENCRYPT_BOTH,
    ENCRYPT_RESPONSE,
    ESYS_TR,
    digest_values,
    policy_of,
    private_from,
    public_from,
    sealed_template,
    selection_of,
    sensitive,
)

# isort: split
from tpm2_pytss.constants import TPM2_CAP

MAX_SECRET_BYTES: Final = 128
"""MAX_SYM_DATA of the TPM: longer data is refused with 0x1d5."""
MAX_QUALIFYING_BYTES: Final = 64
MAX_RANDOM_BYTES: Final = 1024
UNSEAL_ATTEMPTS: Final = 64
"""Each PCR extend between PolicyPCR and Unseal costs an attempt of about a millisecond."""
QUOTE_ATTEMPTS: Final = 32
_PCR_EXTEND_L0: Final = 1
_PCR_RESET_L0: Final = 2
"""TPM_PT_PCR_EXTEND_L0 and _RESET_L0."""
_RC_POLICY_FAIL: Final = 0x09D
_RC_VALUE: Final = 0x084
_SCRUB_PCRS: Final = tuple(range(8))
"""A response of 300 bytes: longer than the one that carried the secret."""


@dataclass(frozen=True, slots=True)
class Quote:
    """`attest` is TPMS_ATTEST, `signature` TPMT_SIGNATURE, both as the TPM marshals them."""

    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class _Keys:
    srk: Handle
    ak: Handle


class Tpm:
    """A TPM with its pinned keys. One thread owns it (`tpm_worker`)."""

    def __init__(self, esys: Esys, record: TpmRecord) -> None:
        self._esys = esys
        self.record = record
        self._keys: _Keys | None = None
        self._keys_generation = 0
        self._session: Handle | None = None
        """Of `check_pcrs`; it stays in the TPM, because to start one costs it an ECDH."""
        self._session_generation = 0

    def limit(self, deadline: float | None) -> None:
        """No command of what follows outlives `deadline` (monotonic seconds)."""
        self._esys.deadline = deadline

    def close(self) -> None:
        self._keys = None
        self._end_session()
        self._esys.close()

    def _end_session(self) -> None:
        """Has the TPM forget the session of `check_pcrs`, if it still knows it."""
        session, self._session = self._session, None
        if session is not None and self._session_generation == self._esys.generation:
            with contextlib.suppress(TpmError):
                self._esys.flush(session)

    # ── Identity ──────────────────────────────────────────────────────────────────────────────────

    def check_identity(self) -> None:
        """Compares the TPM's keys with the record.

        Raises:
            TpmIdentityError: they are others, or not there.
        """
        self._keys = None
        self._open_keys()

    def _open_keys(self) -> _Keys:
        generation = self._esys.ready()
        if self._keys is None or self._keys_generation != generation:
            record = self.record
            srk = self._open_key("storage key", record.srk_handle, record.srk_public)
            ak = self._open_key("attestation key", record.ak_handle, record.ak_public)
            self._keys, self._keys_generation = _Keys(srk, ak), generation
        return self._keys

    def _open_key(self, what: str, handle: int, public: bytes) -> Handle:
        """What ESAPI holds for `handle` must be the pinned public area itself: the salt of every
        session is encrypted to it, and somebody on the wire could have answered ReadPublic."""
        try:
            key = self._esys.attach(handle)
        except TpmCommandError as error:
            if base_error(error.rc) == base_error(RC_NO_SUCH_HANDLE):
                raise TpmIdentityError(
                    f"another TPM, or one that was cleared: no {what} at 0x{handle:x}"
                ) from error
            raise
        seen = self._esys.call("GetName", lambda e: bytes(e.tr_get_name(key)))
        held = self._esys.call("Serialize", lambda e: bytes(key.serialize(e)))
        if seen != name_of(public) or not held.endswith(public):
            raise TpmIdentityError(
                f"another TPM: the name of its {what} at 0x{handle:x} is {seen.hex()}, "
                f"recorded is {name_of(public).hex()}"
            )
        return key

    # ── PCRs ──────────────────────────────────────────────────────────────────────────────────────

    def read_pcrs(self, selection: Iterable[int]) -> dict[int, bytes]:
        """Values of the SHA-256 bank, 32 bytes each.

        The TPM gives eight at a time: each value is true, all of them together only if nothing was
        extended meanwhile. For values that belong together see `quote_with_pcrs`.
        """
        return self._read_pcrs(selection, ESYS_TR.NONE)[0]

    def _read_pcrs(self, selection: Iterable[int], session: Handle) -> tuple[dict[int, bytes], set[int]]:
        """The values, and the TPM's counters of PCR updates at each part: one, if nothing moved."""
        wanted = set(check_selection(selection))
        values: dict[int, bytes] = {}
        counters: set[int] = set()
        while left := wanted - values.keys():
            ask = selection_of(left)
            count, got, digests = self._esys.call("PCR_Read", partial(_pcr_read, ask, session))
            counters.add(int(count))
            indices = [
                index
                for bank in got
                for index in range(PCR_COUNT)
                if bytes(bank.pcrSelect)[index // 8] >> (index % 8) & 1
            ]
            fresh = {index: bytes(digest) for index, digest in zip(indices, digests, strict=True)}
            if not fresh or not fresh.keys() <= left:
                raise TpmCommandError(0, "PCR_Read", "the TPM has no such PCRs in a SHA-256 bank")
            values.update(fresh)
        return {index: values[index] for index in sorted(values)}, counters

    def check_pcrs(self, selection: Iterable[int]) -> dict[int, bytes]:
        """Values that belong together, 32 bytes each, in a session whose key only the pinned storage key's
        TPM knows: each response carries an HMAC over it and over a nonce of ours (part 1, section 17.6), so
        that nobody on the wire can make or repeat one. Unlike a quote it convinces nobody but us.

        Raises:
            TpmBusyError: PCRs moved between the parts, every time.
            TpmUnavailableError: a response was not authenticated, or none came.
        """
        indices = check_selection(selection)
        keys = self._open_keys()
        try:
            if self._session is None or self._session_generation != self._esys.generation:
                self._session = self._esys.start_session(keys.srk, policy=False, attributes=AUDIT)
                self._session_generation = self._esys.generation
            for _attempt in range(QUOTE_ATTEMPTS):
                values, counters = self._read_pcrs(indices, self._session)
                if len(counters) == 1:
                    return values
        except (TpmCommandError, TpmUnavailableError):
            self._end_session()  # the TPM may have been reset: the next call starts another
            raise
        raise TpmBusyError(f"PCRs moved while they were read, {QUOTE_ATTEMPTS} times")

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extends a PCR of the SHA-256 bank by a digest of 32 bytes."""
        (index,) = check_selection((pcr,))
        if len(digest) != DIGEST_BYTES:
            raise ValueError("not a SHA-256 digest")
        self._esys.call("PCR_Extend", lambda e: e.pcr_extend(ESYS_TR(index), digest_values(digest)))

    def check_poison(self, pcr: int) -> None:
        """Passes if this PCR can be extended and not reset from where the operating system is (locality 0).

        Raises:
            TpmPoisonError: it cannot serve (TPM 2.0 part 2, sections 6.14 and 10.9, TPM_PT_PCR).
        """
        check_selection((pcr,))
        _more, data = self._esys.call(
            "GetCapability", lambda e: e.get_capability(TPM2_CAP.PCR_PROPERTIES, _PCR_EXTEND_L0, 2)
        )
        bits = {
            int(tagged.tag): bytes(tagged.pcrSelect)[pcr // 8] >> (pcr % 8) & 1
            for tagged in data.data.pcrProperties
        }
        if bits.get(_PCR_EXTEND_L0) != 1:
            raise TpmPoisonError(f"PCR {pcr} cannot be the poison PCR: this TPM does not let it be extended")
        if bits.get(_PCR_RESET_L0) != 0:
            raise TpmPoisonError(f"PCR {pcr} cannot be the poison PCR: this TPM lets anybody reset it")

    def random(self, count: int) -> bytes:
        """Random bytes of the TPM, at most 1024. They cross the bus in clear: mix them, do not use them
        as a key."""
        if not 0 < count <= MAX_RANDOM_BYTES:
            raise ValueError(f"1 to {MAX_RANDOM_BYTES} bytes")
        data = b""
        while len(data) < count:
            ask = min(count - len(data), DIGEST_BYTES)
            data += self._esys.call("GetRandom", partial(_get_random, ask))
        return data

    # ── Quotes ────────────────────────────────────────────────────────────────────────────────────

    def quote(self, qualifying: bytes, selection: Iterable[int]) -> Quote:
        """A quote by the attestation key over the PCRs, with at most 64 bytes of qualifying data."""
        if len(qualifying) > MAX_QUALIFYING_BYTES:
            raise ValueError(f"over {MAX_QUALIFYING_BYTES} bytes of qualifying data")
        keys, ask = self._open_keys(), selection_of(check_selection(selection))
        attest, signature = self._esys.call("Quote", lambda e: e.quote(keys.ak, ask, qualifying))
        return Quote(bytes(attest), signature.marshal())

    def quote_with_pcrs(self, qualifying: bytes, selection: Iterable[int]) -> tuple[Quote, dict[int, bytes]]:
        """A quote and the very values that it is about: their digest is the quote's.

        Raises:
            TpmBusyError: PCRs moved between reading and quoting, every time.
        """
        indices = check_selection(selection)
        for _attempt in range(QUOTE_ATTEMPTS):
            values = self.read_pcrs(indices)
            quote = self.quote(qualifying, indices)
            if parse_attest(quote.attest).pcr_digest == pcr_digest(values):
                return quote, values
        raise TpmBusyError(f"PCRs moved between reading and quoting, {QUOTE_ATTEMPTS} times")

    def activate(self, credential: Credential) -> bytes:
        """The secret of a credential for the attestation key (`tpm_enrol.activate`)."""
        keys = self._open_keys()
        return activate(self._esys, keys.srk, keys.ak, self.record.ek_public, credential)

    # ── Sealing ───────────────────────────────────────────────────────────────────────────────────

    def seal(self, secret: bytes | bytearray, pcrs: Mapping[int, bytes]) -> SealedBlob:
        """Seals 1 to 128 bytes to the given values of PCRs (not to what the PCRs hold now)."""
        if not 0 < len(secret) <= MAX_SECRET_BYTES:
            raise ValueError(f"1 to {MAX_SECRET_BYTES} bytes")
        template, keys = sealed_template(policy_pcr(pcrs)), self._open_keys()
        with (
            sensitive(secret) as data,
            self._esys.salted_session(keys.srk, policy=False, attributes=ENCRYPT_BOTH) as session,
        ):
            private, public, *_ = self._esys.call(
                "Create", lambda e: e.create(keys.srk, data, template, session1=session)
            )
        # ESAPI keeps the input of its last Create for a second try: give it another.
        with sensitive(bytes(len(secret))) as blank:
            self._esys.call("Create", lambda e: e.create(keys.srk, blank, template))
        return sealed_blob(public.marshal(), private.marshal(), pcrs)

    def unseal(self, blob: SealedBlob) -> bytearray:
        """The secret, in the one copy that this process then has of it: the caller wipes it.

        Raises:
            TpmPolicyError: PCRs differ from what it was sealed to; each is named.
            TpmBlobError: the blob was altered or is not of this TPM.
            TpmBusyError: PCRs were extended all the time.
        """
        values = blob.values()
        public, private = public_from(blob.public), private_from(blob.private)
        if policy_of(public) != policy_pcr(values):
            raise TpmBlobError("sealed file: its PCR values are not those of its policy")
        keys = self._open_keys()
        with self._esys.flushing(self._load(keys.srk, private, public)) as sealed:
            secret = self._unseal_loaded(keys.srk, sealed, values)
            try:
                # Overwrites ESAPI's buffer, which still holds the decrypted response.
                self.read_pcrs(_SCRUB_PCRS)
            except BaseException:
                secret[:] = bytes(len(secret))
                raise
            return secret

    def _load(self, srk: Handle, private: Any, public: Any) -> Handle:
        try:
            return self._esys.call("Load", lambda e: e.load(srk, private, public))
        except TpmCommandError as error:
            if is_parameter_error(error.rc):
                raise TpmBlobError(f"sealed file: altered, or of another TPM ({error})") from error
            raise

    def _unseal_loaded(self, srk: Handle, sealed: Handle, values: Mapping[int, bytes]) -> bytearray:
        esys, selection, digest = self._esys, selection_of(values), pcr_digest(values)
        with esys.salted_session(srk, policy=True, attributes=ENCRYPT_RESPONSE) as session:
            for attempt in range(UNSEAL_ATTEMPTS):
                try:
                    # Nothing may come between these two: any counted extend makes the second fail.
                    esys.call("PolicyPCR", lambda e: e.policy_pcr(session, digest, selection))
                    return esys.call("Unseal", lambda e: _taken(e.unseal(sealed, session1=session)))
                except TpmCommandError as error:
                    if base_error(error.rc) in (_RC_VALUE, _RC_POLICY_FAIL):
                        self._raise_mismatch(values, error)
                    elif error.rc != RC_PCR_CHANGED:
                        raise
                esys.call("PolicyRestart", lambda e: e.policy_restart(session))
                if attempt:
                    time.sleep(random.uniform(0.0, 0.0005 * attempt))  # noqa: S311
        raise TpmBusyError(f"PCRs were extended during each of {UNSEAL_ATTEMPTS} attempts to unseal")

    def _raise_mismatch(self, values: Mapping[int, bytes], cause: TpmCommandError) -> None:
        seen = self.read_pcrs(values)
        mismatches = tuple(
            PcrMismatch(index, values[index], seen[index])
            for index in sorted(values)
            if seen[index] != values[index]
        )
        if mismatches:
            raise TpmPolicyError(mismatches) from cause


def _pcr_read(ask: Any, session: Any, esapi: Any) -> Any:
    return esapi.pcr_read(ask, session1=session)


def _get_random(count: int, esapi: Any) -> bytes:
    return bytes(esapi.get_random(count))


def _taken(data: Any) -> bytearray:
    """Moves the secret out of a TPM2B: one copy is left, the one returned."""
    view = data.buffer
    secret = bytearray(view)
    view[:] = bytes(len(view))
    return secret


def open_tpm(connect: Callable[[], Link], record: TpmRecord, *, command_s: float) -> Tpm:
    """Opens the TPM behind `connect` and checks that it is the recorded one.

    `command_s` bounds each command, in seconds.

    Raises:
        TpmUnavailableError: no TPM answers.
        TpmIdentityError: it is another TPM.
    """
    tpm = Tpm(Esys(connect, command_s), record)
    try:
        tpm.check_identity()
    except BaseException:
        tpm.close()
        raise
    return tpm
