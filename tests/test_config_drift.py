"""Reactions to drift in the configuration: what makes no sense is refused by name."""

from __future__ import annotations

import pytest

from hostd.config import Config, ConfigError, parse_config
from hostd.core.findings import Kind, Severity
from hostd.core.reacting import Step


def parse(text: str) -> Config:
    return parse_config(text.encode(), origin="hostd.toml")


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith("hostd.toml: ")
    return str(caught.value)


def test_reactions() -> None:
    drift = parse(
        """
        [drift]
        poison_pcr = 14
        recovery = { posture = "auto", files = "officer" }
        [[drift.reactions]]
        kinds = ["process", "relro"]
        steps = ["lock", "suspend-vm", "poison"]
        [[drift.reactions]]
        kinds = ["relro"]
        severity = "warning"
        steps = []
        """
    ).drift
    steps = frozenset({Step.LOCK, Step.SUSPEND_VM, Step.POISON})
    assert drift.table == {
        (Kind.PROCESS, Severity.CRITICAL): steps,
        (Kind.RELRO, Severity.CRITICAL): steps,
        (Kind.RELRO, Severity.WARNING): frozenset(),
    }
    assert drift.auto == {Kind.POSTURE}
    assert drift.has(Step.SUSPEND_VM)
    assert not Config().drift.has(Step.LOCK)
    assert not Config().drift.auto


def rule(kinds: str, steps: str, more: str = "") -> str:
    return f"[[drift.reactions]]\nkinds = {kinds}\nsteps = {steps}\n{more}\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (rule('["nothing"]', "[]"), "nothing"),
        (rule('["process"]', '["burn"]'), "burn"),
        (rule("[]", "[]"), "kinds"),
        (rule('["process"]', "[]", 'severity = "mild"'), "mild"),
        (rule('["process"]', "[]", "often = 1"), "often"),
        (rule('["process"]', '["shred"]'), "tenant's own choice"),
        (rule('["files"]', '["suspend-vm"]'), "no VM"),
        (rule('["files"]', '["poison"]'), "poison_pcr"),
        (rule('["relro"]', '["poison"]', 'severity = "warning"') + "[drift]\npoison_pcr = 14", "warning"),
        (rule('["process"]', "[]") + rule('["relro", "process"]', "[]"), "two reactions to critical process"),
        ('[hypervisor]\nprovider = "proc"\n' + rule('["process"]', '["suspend-vm"]'), "provider"),
        *((f"[drift]\npoison_pcr = {pcr}", f"PCR {pcr} ") for pcr in (10, 16, 17, 22, 23)),
        ("[drift]\npoison_pcr = 12", "sealed to"),
        ("[drift]\npoison_pcr = 24", "poison_pcr"),
        ('[drift]\nrecovery = "auto"', "recovery"),
        ('[drift]\nrecovery = { ima = "auto" }', "officer accepts"),
        ('[drift]\nrecovery = { boot = "auto" }', "measured at boot"),
        ('[drift]\nrecovery = { files = "never" }', "never"),
        ('[drift]\nrecovery = { everything = "auto" }', "everything"),
        ('[drift]\nscope = "host"\nrecovery = { relro = "auto" }', "scope"),
        (
            '[drift]\npoison_pcr = 14\nrecovery = { files = "auto" }\n' + rule('["files"]', '["poison"]'),
            "poisons the TPM",
        ),
    ],
)
def test_reactions_that_make_no_sense(text: str, why: str) -> None:
    message = refused(text)
    assert why in message
    assert "$.drift" in message or "`$.drift`" in message
