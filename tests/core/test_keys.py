"""The life of a key: the whole table, and the whole matrix of what may be done when."""

from __future__ import annotations

from itertools import product

import pytest

from guestlib.errors import WrongStateError
from hostd.core.keys import (
    PERMITTED,
    SCHEMES,
    TRANSITIONS,
    USAGE,
    Algorithm,
    Event,
    KeyRecord,
    State,
    Use,
    VersionRecord,
    after,
    check_use,
    scheme_of,
)

S, E = State, Event
EXPECTED = {
    S.PRE_ACTIVE: {E.ACTIVATE: S.ACTIVE, E.COMPROMISE: S.COMPROMISED, E.SHRED: S.DESTROYED},
    S.ACTIVE: {
        E.SUSPEND: S.SUSPENDED,
        E.DEACTIVATE: S.DEACTIVATED,
        E.COMPROMISE: S.COMPROMISED,
        E.SHRED: S.DESTROYED,
    },
    S.SUSPENDED: {
        E.REINSTATE: S.ACTIVE,
        E.DEACTIVATE: S.DEACTIVATED,
        E.COMPROMISE: S.COMPROMISED,
        E.SHRED: S.DESTROYED,
    },
    S.DEACTIVATED: {E.COMPROMISE: S.COMPROMISED, E.SHRED: S.DESTROYED},
    S.COMPROMISED: {E.SHRED: S.DESTROYED},
    S.DESTROYED: {},
}
"""SP 800-57 part 1 rev. 5, section 7.1 to 7.6; suspension leads back to ACTIVE only."""

MAKES_NEW = {Use.ENCRYPT, Use.SIGN, Use.MAC}
"""What only an active version does: protect something new."""


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)), ids=str)
def test_every_state_and_event(state: State, event: Event) -> None:
    follows = EXPECTED[state].get(event)
    if follows is None:
        with pytest.raises(WrongStateError, match=f"a key that is {state} cannot {event}"):
            after(state, event)
    else:
        assert after(state, event) is follows


def test_the_table_names_nothing_else() -> None:
    assert dict(TRANSITIONS) == {
        (state, event): follows for state, row in EXPECTED.items() for event, follows in row.items()
    }


def test_nothing_leaves_destroyed_and_nothing_comes_back_to_life() -> None:
    alive = {S.PRE_ACTIVE, S.ACTIVE, S.SUSPENDED}
    for (state, _), follows in TRANSITIONS.items():
        assert state is not S.DESTROYED
        assert state in alive or follows not in alive
    reachable = {S.PRE_ACTIVE}
    while more := {f for (s, _), f in TRANSITIONS.items() if s in reachable} - reachable:
        reachable |= more
    assert reachable == set(State)


@pytest.mark.parametrize(("algorithm", "state", "use"), list(product(Algorithm, State, Use)), ids=str)
def test_every_use_of_every_algorithm_in_every_state(algorithm: Algorithm, state: State, use: Use) -> None:
    purposes = {
        Algorithm.AES_256_GCM: {Use.ENCRYPT, Use.DECRYPT},
        Algorithm.HMAC_SHA_256: {Use.MAC, Use.VERIFY_MAC},
    }.get(algorithm, {Use.SIGN, Use.VERIFY, Use.PUBLIC})
    allowed = state is S.ACTIVE or (state is S.DEACTIVATED and use not in MAKES_NEW)
    if use in purposes and allowed:
        check_use(algorithm, state, use)
    else:
        with pytest.raises(WrongStateError):
            check_use(algorithm, state, use)


def test_every_state_and_algorithm_has_its_row() -> None:
    assert set(PERMITTED) == set(State)
    assert set(USAGE) == set(Algorithm)


def test_schemes() -> None:
    for algorithm in Algorithm:
        if Use.SIGN not in USAGE[algorithm]:
            for asked in (None, "ed25519"):
                with pytest.raises(WrongStateError):
                    scheme_of(algorithm, asked)
            continue
        assert scheme_of(algorithm, None) == SCHEMES[algorithm][0]
        every = {scheme for row in SCHEMES.values() for scheme in row}
        for scheme in SCHEMES[algorithm]:
            assert scheme_of(algorithm, scheme) == scheme
        for scheme in every - set(SCHEMES[algorithm]) | {""}:
            with pytest.raises(WrongStateError):
                scheme_of(algorithm, scheme)


def record(*numbers: int) -> KeyRecord:
    versions = tuple(VersionRecord(n, State.ACTIVE, 0, 1, b"w") for n in numbers)
    return KeyRecord("key-0", "t", Algorithm.AES_256_GCM, State.ACTIVE, 0, None, versions)


@pytest.mark.parametrize("numbers", [(0,), (2,), (1, 3), (2, 1), (1, 1)])
def test_versions_are_numbered_in_order(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="out of order"):
        record(*numbers)


def test_the_newest_version_is_the_current_one() -> None:
    assert record(1, 2, 3).current.version == 3
