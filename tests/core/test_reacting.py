"""Which steps follow which drift: never fewer than before, never more than configured, none on mere doubt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.core.codes import Code
from hostd.core.findings import VM_KINDS, Component, Finding, Kind, Severity
from hostd.core.reacting import (
    NEVER_POISON,
    ORDER,
    REVIEWED,
    UNSURE,
    Plan,
    RuleError,
    Step,
    check_poison_pcr,
    check_rule,
    steps_of,
    sure,
)

VM = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0001"
CONFIGURABLE = [Step.REFUSE, Step.LOCK, Step.SUSPEND_VM, Step.POISON]


def finding(code: Code = Code.CODE_ALTERED, severity: Severity = Severity.CRITICAL) -> Finding:
    return Finding("process", code.value, severity, "thing", "this", "that")


def component(kind: Kind) -> Component:
    return Component(kind, VM if kind in VM_KINDS else "")


components = st.sampled_from(Kind).map(component)
findings = st.lists(st.builds(finding, st.sampled_from(Code), st.sampled_from(Severity)), max_size=4).map(
    tuple
)
tables = st.dictionaries(
    st.tuples(st.sampled_from(Kind), st.sampled_from(Severity)), st.frozensets(st.sampled_from(CONFIGURABLE))
)


@given(components, findings, tables, st.booleans(), st.booleans())
def test_what_holds_for_every_plan(
    about: Component,
    seen: tuple[Finding, ...],
    table: dict[tuple[Kind, Severity], frozenset[Step]],
    host_scope: bool,
    shreds: bool,
) -> None:
    steps = steps_of(about, seen, table, host_scope=host_scope, shreds=shreds)
    assert steps[0] is Step.REFUSE
    assert list(steps) == [step for step in ORDER if step in steps]
    if about.kind not in VM_KINDS or host_scope or Step.POISON in steps:
        assert Step.LOCK in steps
    if not sure(seen):
        assert not {Step.POISON, Step.SHRED} & set(steps)
    assert (Step.SHRED in steps) == (shreds and sure(seen))
    configured = frozenset[Step]().union(*(s for (kind, _), s in table.items() if kind is about.kind))
    assert set(steps) <= {Step.REFUSE, Step.LOCK, Step.SHRED} | configured


@pytest.mark.parametrize("code", sorted(UNSURE | REVIEWED))
def test_what_could_not_be_read_is_never_answered_by_what_cannot_be_undone(code: Code) -> None:
    table = {(Kind.FILES, Severity.CRITICAL): frozenset({Step.POISON})}
    about = component(Kind.FILES)
    unsure = steps_of(about, (finding(code),), table, host_scope=False, shreds=True)
    assert unsure == (Step.REFUSE, Step.LOCK)
    both = steps_of(about, (finding(code), finding()), table, host_scope=False, shreds=True)
    assert both == (Step.REFUSE, Step.LOCK, Step.POISON, Step.SHRED)


def test_severity_decides() -> None:
    table = {
        (Kind.RELRO, Severity.WARNING): frozenset({Step.SUSPEND_VM}),
        (Kind.RELRO, Severity.CRITICAL): frozenset({Step.LOCK}),
    }
    about = component(Kind.RELRO)
    warning = (finding(severity=Severity.WARNING),)
    assert steps_of(about, warning, table, host_scope=False, shreds=False) == (Step.REFUSE, Step.SUSPEND_VM)
    critical = (*warning, finding())
    assert steps_of(about, critical, table, host_scope=False, shreds=False) == (Step.REFUSE, Step.LOCK)


def test_without_rules_all_is_as_the_architecture_says() -> None:
    for kind in Kind:
        steps = steps_of(component(kind), (finding(),), {}, host_scope=False, shreds=False)
        assert steps == ((Step.REFUSE,) if kind in VM_KINDS else (Step.REFUSE, Step.LOCK))


def test_a_poisoned_tpm_leaves_no_key_in_memory() -> None:
    table = {(Kind.PROCESS, Severity.CRITICAL): frozenset({Step.POISON})}
    steps = steps_of(component(Kind.PROCESS), (finding(),), table, host_scope=False, shreds=False)
    assert steps == (Step.REFUSE, Step.LOCK, Step.POISON)


@pytest.mark.parametrize("kind", sorted(Kind))
def test_rules_that_make_no_sense(kind: Kind) -> None:
    with pytest.raises(RuleError, match="on-drift"):
        check_rule(kind, Severity.CRITICAL, [Step.SHRED])
    with pytest.raises(RuleError, match="warning"):
        check_rule(kind, Severity.WARNING, [Step.POISON])
    check_rule(kind, Severity.CRITICAL, [Step.REFUSE, Step.LOCK, Step.POISON])
    if kind in VM_KINDS:
        check_rule(kind, Severity.CRITICAL, [Step.SUSPEND_VM])
    else:
        with pytest.raises(RuleError, match="suspend-vm"):
            check_rule(kind, Severity.CRITICAL, [Step.SUSPEND_VM])


def test_poison_pcrs() -> None:
    every = range(24)
    for pcr in every:
        if pcr in NEVER_POISON:
            with pytest.raises(RuleError, match=f"PCR {pcr} "):
                check_poison_pcr(pcr, every)
        else:
            check_poison_pcr(pcr, every)
    assert {10, 16, 23} <= NEVER_POISON.keys()
    with pytest.raises(RuleError, match="sealed to 0, 7"):
        check_poison_pcr(12, (7, 0))


def test_a_plan_says_itself() -> None:
    assert str(Plan((Step.REFUSE, Step.SUSPEND_VM), "red")) == "then refuse, suspend-vm for red"
    assert str(Plan((Step.REFUSE, Step.LOCK))) == "then refuse, lock"


def test_names_of_steps_are_append_only() -> None:
    assert [str(step) for step in Step] == ["refuse", "lock", "suspend-vm", "poison", "shred"]
