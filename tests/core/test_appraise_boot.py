"""Each step of the boot judge: what it lets through, what it names."""

from __future__ import annotations

import hashlib

import pytest

from guestlib.attest.eventlog import parse_log
from guestlib.attest.eventtext import VARIABLES
from hostd.core.appraisal import Appraiser, Rules
from hostd.core.appraise_boot import BootJudge
from hostd.core.codes import Code
from hostd.core.findings import BOOT, Finding, Status, Verdict
from hostd.core.reading_boot import BootReading
from hostd.core.readings import Missing
from hostd.core.reference import Reference
from hostd.core.rule_boot import BootRule, EventRule, PcrRule, propose_boot
from tests.support.eventlog import LAB_COMMAND_LINE, LAB_LOG, SEALED, event, header

RULE = propose_boot(SEALED, parse_log(LAB_LOG).events)


def reference(boot: BootRule | None = RULE) -> Reference:
    return Reference(format="hostd-reference/2", version=1, created=1, host="h", boot=boot)


def reading(
    data: bytes = LAB_LOG, command_line: str = LAB_COMMAND_LINE, *, held: bool = False
) -> BootReading:
    return BootReading(len(data), hashlib.sha256(data).digest(), b"" if held else data, command_line)


def judge(
    data: bytes = LAB_LOG, *, pcrs: dict[int, bytes] | None = None, boot: BootRule | None = RULE
) -> Verdict:
    return BootJudge(SEALED if pcrs is None else pcrs).appraise(BOOT, reading(data), reference(boot))


def only(verdict: Verdict, code: Code) -> Finding:
    assert verdict.status is Status.DRIFTED
    (finding,) = verdict.findings
    assert finding.code == code
    return finding


def test_as_reviewed() -> None:
    verdict = judge()
    assert verdict.good
    claims = dict(verdict.claims)
    assert claims["command line"] == "as measured in PCR 9"
    assert claims["replay"] == "PCRs 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14"
    assert claims["events"] == "25"


def test_bytes_come_once() -> None:
    appraiser = Appraiser(reference(), Rules(allow_jit=False, protected=(), pcrs=SEALED))
    assert appraiser.boot.position == 0
    assert appraiser.appraise(BOOT, reading()).good
    assert appraiser.boot.position == len(LAB_LOG)
    assert appraiser.appraise(BOOT, reading(held=True)).good
    assert appraiser.boot.values == SEALED


def test_no_data_before_any_was_judged() -> None:
    judge = BootJudge(SEALED)
    assert judge.appraise(BOOT, reading(held=True), reference()).status is Status.PENDING
    assert judge.position == 0


@pytest.mark.parametrize("held", [True, False])
def test_changed_after_boot(held: bool) -> None:
    judge = BootJudge(SEALED)
    assert judge.appraise(BOOT, reading(), reference()).good
    other = LAB_LOG + event(4, 13, b"more")
    found = only(judge.appraise(BOOT, reading(other, held=held), reference()), Code.BOOT_LOG_CHANGED)
    assert found.expected == hashlib.sha256(LAB_LOG).hexdigest()
    assert judge.appraise(BOOT, reading(held=True), reference()).good


def test_absent_is_not_good() -> None:
    assert judge(pcrs={}).status is Status.ABSENT
    assert ("PCRs", "none quoted") in judge(pcrs={}).claims
    assert judge(boot=None).status is Status.ABSENT
    assert ("reference", "none") in judge(boot=None).claims
    missing = Missing("this kernel keeps no boot event log", absent=True)
    assert (
        Appraiser(reference(), Rules(allow_jit=False, protected=())).appraise(BOOT, missing).status
        is Status.ABSENT
    )


@pytest.mark.parametrize("boot", [RULE, None])
def test_log_that_the_tpm_did_not_see(boot: BootRule | None) -> None:
    forged = header(((4, 20), (11, 32))) + event(4, 0x80000003, b"other kernel")
    verdict = judge(forged, boot=boot)
    assert {f.code for f in verdict.findings} == {Code.BOOT_LOG_MISMATCH}
    assert {"PCR 4", "PCR 9"} <= {f.subject for f in verdict.findings}
    assert BootJudge(SEALED).values == {}


def test_log_does_not_vouch_for_itself() -> None:
    """A log that replays to accepted values is nothing if the TPM quotes others."""
    assert only(judge(pcrs={**SEALED, 9: b"\1" * 32}), Code.BOOT_LOG_MISMATCH).subject == "PCR 9"


@pytest.mark.parametrize("data", [b"x", LAB_LOG[:-1]])
def test_malformed(data: bytes) -> None:
    only(judge(data), Code.BOOT_MALFORMED)


def test_bytes_that_are_not_the_digest_s() -> None:
    lying = BootReading(len(LAB_LOG), bytes(32), LAB_LOG, LAB_COMMAND_LINE)
    only(BootJudge(SEALED).appraise(BOOT, lying, reference()), Code.BOOT_MALFORMED)


def test_other_command_line() -> None:
    other = reading(command_line=LAB_COMMAND_LINE.replace("ima_policy=tcb ", ""))
    found = only(BootJudge(SEALED).appraise(BOOT, other, reference()), Code.BOOT_COMMAND_LINE)
    assert found.subject == "kernel command line, PCR 9"
    assert "ima_policy" not in found.seen


def test_value_that_nobody_approved_names_the_event() -> None:
    events = tuple(
        EventRule(e.pcr, e.type, "00" * 32 if e.text == "Linux initrd" else e.digest, e.text, e.covered)
        for e in RULE.events
    )
    pcrs = tuple(PcrRule(9, ("11" * 32,)) if rule.pcr == 9 else rule for rule in RULE.pcrs)
    found = only(judge(boot=BootRule(pcrs, events)), Code.BOOT_PCR)
    assert (found.subject, found.where) == ("PCR 9", "event 22")
    assert found.expected == 'EV_EVENT_TAG "Linux initrd" 0000000000000000…'
    assert found.seen == 'EV_EVENT_TAG "Linux initrd" afc2e140d762a801…'


def test_value_that_nobody_approved_without_events() -> None:
    pcrs = tuple(PcrRule(4, ("11" * 32, "22" * 32)) if rule.pcr == 4 else rule for rule in RULE.pcrs)
    found = only(judge(boot=BootRule(pcrs)), Code.BOOT_PCR)
    assert found.expected == "11" * 32 + " or " + "22" * 32
    assert found.seen == SEALED[4].hex()


def test_fewer_events_than_reviewed() -> None:
    extra = EventRule(9, 13, "33" * 32, "third", covered=False)
    pcrs = tuple(PcrRule(9, ("11" * 32,)) if rule.pcr == 9 else rule for rule in RULE.pcrs)
    found = only(judge(boot=BootRule(pcrs, (*RULE.events, extra))), Code.BOOT_PCR)
    assert found.expected.startswith('EV_IPL "third"')
    assert found.seen == "no further event"


def test_value_that_is_not_quoted() -> None:
    unquoted = {pcr: value for pcr, value in SEALED.items() if pcr != 6}
    known = BootJudge(unquoted)
    known.appraise(BOOT, reading(), reference())
    assert known.values == unquoted
    assert known.replayed == SEALED
    assert judge(pcrs=unquoted, boot=propose_boot(known.values)).good
    assert only(judge(pcrs=unquoted), Code.BOOT_PCR).seen == "not quoted"


def test_approved_next_boot() -> None:
    old = propose_boot({**SEALED, 9: b"\7" * 32})
    assert judge(boot=propose_boot(SEALED, next_to=old)).good
    assert only(judge(boot=old), Code.BOOT_PCR).subject == "PCR 9"


@pytest.mark.parametrize(
    "pcrs",
    [
        (PcrRule(4, ("11" * 32,)), PcrRule(4, ("11" * 32,))),
        (PcrRule(4, ("11" * 32,)), PcrRule(0, ("11" * 32,))),
        (PcrRule(4, ("22" * 32, "11" * 32)),),
    ],
)
def test_rule_has_one_form(pcrs: tuple[PcrRule, ...]) -> None:
    with pytest.raises(ValueError, match="sorted"):
        BootRule(pcrs)


def test_event_that_says_something_else() -> None:
    """Nothing that the PCR proves has changed, and the words are another's."""
    at = LAB_LOG.index("SecureBoot".encode("utf-16-le"))
    altered = LAB_LOG[:at] + "secureboot".encode("utf-16-le") + LAB_LOG[at + 20 :]
    found = only(judge(altered), Code.BOOT_MALFORMED)
    assert (found.subject, found.where) == ("PCR 7", "event 4")
    assert judge(altered, boot=propose_boot(SEALED)).good


def test_no_flipped_byte_makes_another_boot_pass() -> None:
    """A log with one flipped bit is refused, or says the same of everything that is judged."""
    passed = 0
    for at in range(len(LAB_LOG)):
        flipped = bytearray(LAB_LOG)
        flipped[at] ^= 1 << (at % 8)
        if judge(bytes(flipped)).status is not Status.VERIFIED:
            continue
        passed += 1
        before, after = parse_log(LAB_LOG), parse_log(bytes(flipped))
        for one, other in zip(before.events[1:], after.events[1:], strict=True):
            assert (one.pcr, one.digest) == (other.pcr, other.digest)
            assert one.type == other.type or not one.extends
            assert one.data == other.data or not one.covered or one.type in VARIABLES
    print(f"{passed} of {len(LAB_LOG)} flips change only what no SHA-256 digest covers")
