"""Keys as data: algorithms, what they are for, and the states of a key and its versions.

States and their meaning are those of NIST SP 800-57 part 1 rev. 5, section 7. A key is a family of
versions: the current version is ACTIVE, older ones are DEACTIVATED (they decrypt and verify, and
make nothing new). A transition that the table does not name is an error.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from guestlib.errors import WrongStateError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Algorithm(enum.StrEnum):
    """Names on the wire and on disk; append-only."""

    AES_256_GCM = "AES-256-GCM"
    HMAC_SHA_256 = "HMAC-SHA-256"
    ECDSA_P256 = "ECDSA-P256"
    ED25519 = "Ed25519"
    RSA_3072 = "RSA-3072"


class Use(enum.StrEnum):
    """What an operation does with a key version; names as in the ledger and in `usage`."""

    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    SIGN = "sign"
    VERIFY = "verify"
    MAC = "mac"
    VERIFY_MAC = "verify-mac"
    PUBLIC = "public-key"


USAGE: Final[Mapping[Algorithm, frozenset[Use]]] = MappingProxyType(
    {
        Algorithm.AES_256_GCM: frozenset({Use.ENCRYPT, Use.DECRYPT}),
        Algorithm.HMAC_SHA_256: frozenset({Use.MAC, Use.VERIFY_MAC}),
        Algorithm.ECDSA_P256: frozenset({Use.SIGN, Use.VERIFY, Use.PUBLIC}),
        Algorithm.ED25519: frozenset({Use.SIGN, Use.VERIFY, Use.PUBLIC}),
        Algorithm.RSA_3072: frozenset({Use.SIGN, Use.VERIFY, Use.PUBLIC}),
    }
)
"""One key, one purpose (SP 800-57 part 1, section 5.2)."""

SCHEMES: Final[Mapping[Algorithm, tuple[str, ...]]] = MappingProxyType(
    {
        Algorithm.ECDSA_P256: ("ecdsa-sha256",),
        Algorithm.ED25519: ("ed25519",),
        Algorithm.RSA_3072: ("rsa-pss-sha256", "rsa-pkcs1-sha256"),
    }
)
"""Signature schemes; the first is the default."""


class State(enum.StrEnum):
    PRE_ACTIVE = "pre-active"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    DEACTIVATED = "deactivated"
    COMPROMISED = "compromised"
    DESTROYED = "destroyed"


class Event(enum.StrEnum):
    ACTIVATE = "activate"
    SUSPEND = "suspend"
    REINSTATE = "reinstate"
    DEACTIVATE = "deactivate"
    """Also what rotation does to the version that was current."""
    COMPROMISE = "compromise"
    SHRED = "shred"


TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = MappingProxyType(
    {
        (State.PRE_ACTIVE, Event.ACTIVATE): State.ACTIVE,
        (State.PRE_ACTIVE, Event.COMPROMISE): State.COMPROMISED,
        (State.PRE_ACTIVE, Event.SHRED): State.DESTROYED,
        (State.ACTIVE, Event.SUSPEND): State.SUSPENDED,
        (State.ACTIVE, Event.DEACTIVATE): State.DEACTIVATED,
        (State.ACTIVE, Event.COMPROMISE): State.COMPROMISED,
        (State.ACTIVE, Event.SHRED): State.DESTROYED,
        (State.SUSPENDED, Event.REINSTATE): State.ACTIVE,
        (State.SUSPENDED, Event.DEACTIVATE): State.DEACTIVATED,
        (State.SUSPENDED, Event.COMPROMISE): State.COMPROMISED,
        (State.SUSPENDED, Event.SHRED): State.DESTROYED,
        (State.DEACTIVATED, Event.COMPROMISE): State.COMPROMISED,
        (State.DEACTIVATED, Event.SHRED): State.DESTROYED,
        (State.COMPROMISED, Event.SHRED): State.DESTROYED,
    }
)

PERMITTED: Final[Mapping[State, frozenset[Use]]] = MappingProxyType(
    {
        State.PRE_ACTIVE: frozenset(),
        State.ACTIVE: frozenset(Use),
        State.SUSPENDED: frozenset(),
        State.DEACTIVATED: frozenset({Use.DECRYPT, Use.VERIFY, Use.VERIFY_MAC, Use.PUBLIC}),
        State.COMPROMISED: frozenset(),
        State.DESTROYED: frozenset(),
    }
)


def after(state: State, event: Event) -> State:
    """The state that follows.

    Raises:
        WrongStateError: the table has no such transition.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise WrongStateError(f"a key that is {state} cannot {event}") from None


def check_use(algorithm: Algorithm, state: State, use: Use) -> None:
    """Passes if a key version of this algorithm in this state may be used so.

    Raises:
        WrongStateError: the algorithm is not for this, or the state forbids it.
    """
    if use not in USAGE[algorithm]:
        raise WrongStateError(f"an {algorithm} key is not for {use}")
    if use not in PERMITTED[state]:
        raise WrongStateError(f"a key version that is {state} does not {use}")


def scheme_of(algorithm: Algorithm, asked: str | None) -> str:
    """The signature scheme to use; the algorithm's default if none is asked for.

    Raises:
        WrongStateError: the key does not sign that way.
    """
    schemes = SCHEMES.get(algorithm, ())
    if not schemes or (asked is not None and asked not in schemes):
        raise WrongStateError(f"an {algorithm} key does not sign with {asked or 'any scheme'}")
    return asked or schemes[0]


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version as stored. `wrapped` is the material under the tenant's key; empty if destroyed.

    `generation` counts the changes of this row and is bound into the wrapping.
    """

    version: int
    state: State
    created: int
    """Unix time, milliseconds."""
    generation: int
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as stored.

    Raises:
        ValueError: versions are not 1, 2, 3 … in order.
    """

    id: str
    tenant: str
    algorithm: Algorithm
    state: State
    created: int
    alias: str | None
    versions: tuple[VersionRecord, ...]

    def __post_init__(self) -> None:
        if [v.version for v in self.versions] != list(range(1, len(self.versions) + 1)):
            raise ValueError(f"{self.id}: versions out of order")

    @property
    def current(self) -> VersionRecord:
        return self.versions[-1]

    @property
    def raw_id(self) -> bytes:
        """The id as a ciphertext names it, 16 bytes."""
        return bytes.fromhex(self.id.removeprefix("key-"))


@dataclass(frozen=True, slots=True)
class ListedVersion:
    version: int
    state: State
    created: int


@dataclass(frozen=True, slots=True)
class Listed:
    """A key as a list shows it: nothing is done with it."""

    id: str
    algorithm: Algorithm
    state: State
    created: int
    alias: str | None
    versions: tuple[ListedVersion, ...]
    """The newest, oldest first; one at least."""

    @property
    def current(self) -> ListedVersion:
        return self.versions[-1]
