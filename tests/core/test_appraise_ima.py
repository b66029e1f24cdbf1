"""What is judged whatever is protected: boot_aggregate, the policy of IMA, entries from memory."""

from __future__ import annotations

import hashlib

import pytest

from guestlib.attest.imalog import parse_entries, replay
from hostd.core.appraisal import Appraiser, Rules
from hostd.core.appraise_ima import MAX_FINDINGS, MAX_UNRESOLVED, Accepted
from hostd.core.codes import Code
from hostd.core.findings import BOOT, IMA, Status, Verdict
from hostd.core.reading_boot import BootReading
from hostd.core.readings import ImaReading
from hostd.core.reference import Reference
from tests.support.eventlog import LAB_COMMAND_LINE, LAB_LOG, SEALED
from tests.support.imalog import body_of, entry, field, framed

BOOT_ID = "b" * 36
KEXEC = framed(b"ima-buf", body_of("kexec-cmdline", b"root=/dev/vda", template="ima-buf"))
KEY = framed(b"ima-buf", body_of(".ima", b"a key", template="ima-buf"))
POLICY = entry("/etc/ima/ima-policy", b"measure func=BPRM_CHECK")


def aggregate(pcrs: dict[int, bytes] = SEALED, *, count: int = 10, algorithm: bytes = b"sha256") -> bytes:
    digest = hashlib.sha256(b"".join(pcrs[n] for n in range(count))).digest()
    return framed(b"ima-ng", field(algorithm + b":\0" + digest) + field(b"boot_aggregate\0"))


def reference(*known: bytes) -> Reference:
    ima: dict[str, tuple[str, ...]] = {}
    for item in parse_entries(b"".join(known)):
        ima[item.path] = tuple(sorted({*ima.get(item.path, ()), item.content}))
    return Reference(format="hostd-reference/2", version=1, created=1, host="h", ima=ima)


def judge(data: bytes, *known: bytes, pcrs: dict[int, bytes] | None = None) -> Verdict:
    rules = Rules(allow_jit=False, protected=("/usr/",), pcrs=SEALED if pcrs is None else pcrs)
    return Appraiser(reference(*known), rules).appraise(IMA, ImaReading(BOOT_ID, 0, data, more=False))


@pytest.mark.parametrize("count", [10, 8])
def test_aggregate_of_this_boot(count: int) -> None:
    verdict = judge(aggregate(count=count))
    assert verdict.good
    assert ("boot_aggregate", "compared with PCRs 0-9") in verdict.claims


@pytest.mark.parametrize("pcr", range(10))
def test_aggregate_of_another_boot(pcr: int) -> None:
    verdict = judge(aggregate({**SEALED, pcr: b"\7" * 32}))
    (finding,) = verdict.findings
    assert (finding.code, finding.subject) == (Code.IMA_AGGREGATE, "boot_aggregate")
    assert finding.expected == "sha256:4967115f5424ead92ed3ab40d75749820245a67e2fe433cf9750376bae86aa8d"


def test_second_aggregate_is_judged_too() -> None:
    """After kexec the log goes on with another one."""
    verdict = judge(aggregate() + aggregate({**SEALED, 4: bytes(32)}))
    assert [f.code for f in verdict.findings] == [Code.IMA_AGGREGATE]


def test_aggregate_that_cannot_be_compared() -> None:
    unknown = {pcr: value for pcr, value in SEALED.items() if pcr != 6}
    for verdict in (judge(aggregate(), pcrs=unknown), judge(aggregate(algorithm=b"sha1"))):
        assert verdict.good
        assert ("boot_aggregate", "not compared") in verdict.claims


def test_boot_log_gives_the_pcr_that_nothing_is_sealed_to() -> None:
    rules = Rules(
        allow_jit=False, protected=("/usr/",), pcrs={pcr: v for pcr, v in SEALED.items() if pcr != 6}
    )
    appraiser = Appraiser(reference(), rules)
    other = aggregate({**SEALED, 6: b"\7" * 32})
    assert appraiser.appraise(IMA, ImaReading(BOOT_ID, 0, other, more=False)).good
    digest = hashlib.sha256(LAB_LOG).digest()
    appraiser.appraise(BOOT, BootReading(len(LAB_LOG), digest, LAB_LOG, LAB_COMMAND_LINE))
    # Nothing new came, and now it is known that the first entry is another boot's.
    verdict = appraiser.appraise(IMA, ImaReading(BOOT_ID, len(other), b"", more=False))
    assert [f.code for f in verdict.findings] == [Code.IMA_AGGREGATE]


@pytest.mark.parametrize("item", [KEXEC, KEY, POLICY], ids=["kexec", "key", "policy"])
def test_judged_whatever_is_protected(item: bytes) -> None:
    assert judge(aggregate() + item, item).good
    verdict = judge(aggregate() + item)
    (finding,) = verdict.findings
    assert finding.code == Code.IMA_UNKNOWN
    assert finding.subject == parse_entries(item)[0].path
    assert finding.seen == parse_entries(item)[0].content


def test_other_paths_are_not() -> None:
    assert judge(aggregate() + entry("/etc/hostname", b"x") + entry("/var/x", violation=True)).good


def test_claims() -> None:
    data = aggregate() + entry("/var/x", violation=True)
    verdict = judge(data)
    claims = dict(verdict.claims)
    assert (claims["entries"], claims["violations"]) == ("2", "1")
    assert claims["PCR 10 replay"] == replay(parse_entries(data)).hex()


def test_accepting_the_log_does_not_accept_another_boot() -> None:
    data = aggregate({**SEALED, 0: bytes(32)}) + entry("/usr/bin/x", b"x")
    rules = Rules(allow_jit=False, protected=("/usr/",), accepted=Accepted(BOOT_ID, len(data)), pcrs=SEALED)
    verdict = Appraiser(reference(), rules).appraise(IMA, ImaReading(BOOT_ID, 0, data, more=False))
    assert verdict.status is Status.DRIFTED
    assert [f.code for f in verdict.findings] == [Code.IMA_AGGREGATE]


def test_more_than_is_kept_is_counted() -> None:
    data = b"".join(entry(f"/usr/bin/{n}", b"x") for n in range(MAX_UNRESOLVED + 5))
    verdict = judge(data)
    assert len(verdict.findings) == MAX_FINDINGS + 1
    assert verdict.findings[-1].seen == "5 further entries"


def test_known_entries_are_not_counted() -> None:
    data = b"".join(entry(f"/usr/bin/{n}", b"x") for n in range(MAX_UNRESOLVED + 5))
    assert judge(data, data).good
