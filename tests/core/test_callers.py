"""A caller is a VM's process, a user or an officer, and never two of them."""

from __future__ import annotations

from typing import Any

import pytest

from hostd.core.callers import Caller, host_principal, vm_principal


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vm": "a"},
        {"vm": "a", "pid": 1},
        {"vm": "a", "start_time": 1},
        {"vm": "a", "pid": 1, "start_time": 1, "uid": 0},
        {"vm": "a", "pid": 1, "start_time": 1, "officer": True},
        {"pid": 1, "start_time": 1},
        {"uid": 0, "pid": 1, "start_time": 1},
        {"uid": 0, "pid": 1},
        {"uid": 0, "start_time": 1},
        {"uid": -2},
        {"officer": True},
    ],
    ids=str,
)
def test_half_a_caller_and_two_callers_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a caller is"):
        Caller(**fields)


def test_principals_do_not_collide() -> None:
    vm = Caller(vm="uid:0", pid=1, start_time=1)
    user, officer = Caller(uid=0), Caller(uid=0, officer=True)
    assert vm.principal == vm_principal("uid:0") == 'VM::"uid:0"'
    assert user.principal == host_principal(0) == 'Host::"uid:0"'
    assert officer.principal == 'Officer::"uid:0"'
    assert len({vm.principal, user.principal, officer.principal}) == 3
