"""What a machine may be made of: each rule has a test that fails without it."""

from __future__ import annotations

import msgspec
import pytest

from hostd.core.appraise_domain import MAX_FINDINGS, DomainJudge
from hostd.core.findings import Status, Verdict, domain_of
from hostd.core.reading_domain import DomainPart, DomainReading
from hostd.core.reference import FORMAT, Reference, encode_reference, parse_reference
from hostd.core.rule_domain import DomainRule, allows_device, allows_path, propose_domain

VM = "11111111-2222-3333-4444-555555555555"
OTHER = "11111111-2222-3333-4444-666666666666"
QEMU = "/usr/bin/qemu-system-x86_64"


def reading(**changes: object) -> DomainReading:
    values: dict[str, object] = {
        "vm": VM,
        "name": "web1",
        "pid": 812,
        "start_time": 4711,
        "source": "libvirt",
        "virt": "kvm",
        "emulator": QEMU,
        "machine": "pc-q35-7.2",
        "boot": (),
        "arguments": (),
        "environment": (),
        "cid": 7,
        "labels": ("apparmor libvirt-1", "dac +64055:+64055"),
        "memory": (),
        "devices": (DomainPart("disk:file"), DomainPart("rng:random", "/dev/urandom")),
        "definition": b"d" * 32,
        "said_vms": (VM,),
        "said_cids": (7,),
        "said": b"s" * 32,
        "answered": True,
    }
    return DomainReading(**{**values, **changes})  # type: ignore[arg-type]


def reference(rule: DomainRule | None) -> Reference:
    return Reference(format=FORMAT, version=1, created=0, host="h", domain=rule)


RULE = DomainRule(emulators=(QEMU,))


def judge(now: DomainReading, rule: DomainRule | None = RULE, *, judge: DomainJudge | None = None) -> Verdict:
    return (judge or DomainJudge()).appraise(domain_of(VM), now, reference(rule))


def codes(verdict: Verdict) -> list[str]:
    return [finding.code for finding in verdict.findings]


def test_a_usual_machine_is_good_and_says_what_it_is() -> None:
    verdict = judge(reading())
    assert verdict.status is Status.VERIFIED
    claims = dict(verdict.claims)
    assert claims["emulator"] == QEMU
    assert claims["confined"] == "apparmor, dac"
    assert claims["said by"] == "libvirt"
    assert "silent" in dict(judge(reading(answered=False)).claims)["said by"]
    assert "own command line" in dict(judge(reading(source="proc")).claims)["said by"]


def test_without_a_rule_it_is_absent() -> None:
    verdict = judge(reading(), None)
    assert verdict.status is Status.ABSENT
    assert ("reference", "none") in verdict.claims


def test_another_machine_than_asked_for_is_not_good() -> None:
    assert judge(reading(vm=OTHER, said_vms=(OTHER,))).status is Status.PENDING


@pytest.mark.parametrize(
    ("changes", "code", "word", "expected", "seen"),
    [
        ({"emulator": "/tmp/q"}, "domain-emulator", "emulator", QEMU, "/tmp/q"),
        ({"virt": "qemu"}, "domain-emulator", "virtualisation", "kvm", "qemu"),
        ({"boot": (DomainPart("loader", "/tmp/l"),)}, "domain-boot", "loader", "none", "/tmp/l"),
        ({"boot": (DomainPart("template", "/t"),)}, "domain-boot", "template", "none", "/t"),
        ({"boot": (DomainPart("acpi", "/t"),)}, "domain-boot", "acpi", "none", "/t"),
        ({"boot": (DomainPart("rom", "/r"),)}, "domain-boot", "rom", "none", "/r"),
        ({"boot": (DomainPart("kernel", "/k"),)}, "domain-boot", "kernel", "none", "/k"),
        ({"boot": (DomainPart("initrd", "/k"),)}, "domain-boot", "initrd", "none", "/k"),
        ({"boot": (DomainPart("dtb", "/k"),)}, "domain-boot", "dtb", "none", "/k"),
        ({"boot": (DomainPart("shim", "/k"),)}, "domain-boot", "shim", "none", "/k"),
        ({"boot": (DomainPart("new", "/k"),)}, "domain-boot", "new", "no such kind of boot file", "/k"),
        ({"arguments": ("-plugin",)}, "domain-passthrough", "argument", "none", "-plugin"),
        ({"environment": ("LD_PRELOAD=/x",)}, "domain-passthrough", "environment", "none", "LD_PRELOAD=/x"),
        (
            {"devices": (DomainPart("hostdev:pci", "bus=3"),)},
            *("domain-device", "hostdev:pci", "no such device", "bus=3"),
        ),
        (
            {"devices": (DomainPart("rng:random", "/etc/shadow"),)},
            *("domain-device", "rng:random", "/dev/hwrng or /dev/random or /dev/urandom", "/etc/shadow"),
        ),
        ({"memory": ("access:shared",)}, "domain-device", "memory", None, "access:shared"),
        ({"said_vms": (OTHER,)}, "domain-claim", "pid 812", f"-uuid {VM}", f"-uuid {OTHER}"),
        ({"said_vms": ()}, "domain-claim", "pid 812", f"-uuid {VM}", "-uuid "),
        ({"said_vms": (VM, OTHER)}, "domain-claim", "pid 812", f"-uuid {VM}", f"-uuid {VM} or {OTHER}"),
        ({"said_cids": (7, 8)}, "domain-claim", "pid 812", "guest-cid 7", "guest-cid 8"),
        ({"cid": 0}, "domain-claim", "pid 812", "guest-cid none", "guest-cid 7"),
    ],
)
def test_each_rule(changes: dict[str, object], code: str, word: str, expected: str | None, seen: str) -> None:
    verdict = judge(reading(**changes))
    assert verdict.status is Status.DRIFTED
    (finding,) = verdict.findings
    assert (finding.component, finding.code) == (f"domain:{VM}", code)
    assert finding.subject.startswith("vm web1: ")
    assert word in finding.subject
    assert finding.expected == expected or expected is None
    assert finding.seen == seen


def test_what_the_rule_approves_is_good() -> None:
    rule = DomainRule(
        emulators=(QEMU,),
        machines=("pc-q35-7.2",),
        firmware=("/usr/share/OVMF/",),
        kernels=("/boot/vmlinuz",),
        arguments=("-global", "x"),
        environment=("A=b",),
        devices=("channel:unix /run/a/", "disk:file", "hostdev:pci", "rng:random /dev/urandom"),
        memory=("access:shared",),
        labels=("apparmor",),
    )
    now = reading(
        boot=(
            DomainPart("cmdline", "x"),
            DomainPart("kernel", "/boot/vmlinuz"),
            DomainPart("loader", "/usr/share/OVMF/CODE.fd"),
            DomainPart("nvram", "/var/x"),
        ),
        arguments=("-global", "x"),
        environment=("A=b",),
        devices=(DomainPart("channel:unix", "/run/a/b"), DomainPart("hostdev:pci", "x")),
        memory=("access:shared",),
    )
    assert judge(now, rule).status is Status.VERIFIED
    assert codes(judge(reading(machine="pc"), rule)) == ["domain-emulator"]
    assert codes(judge(reading(labels=("dac x",)), rule)) == ["domain-confinement"]
    assert codes(judge(reading(devices=(DomainPart("channel:unix", "/run/ab"),)), rule)) == ["domain-device"]


@pytest.mark.parametrize(
    ("path", "good"),
    [
        *(("/a/b", True), ("/a/b/c", False), ("/d/x", True), ("/d/x/y", True), ("/d", False)),
        *(("/d/../e", False), ("/d/..", False), ("/d/./x", False), ("/d//x", False), ("", False)),
        *(("/dx", False), ("d/x", False)),
    ],
)
def test_paths(path: str, good: bool) -> None:
    assert allows_path(("/a/b", "/d/"), path) is good


def test_a_class_is_not_its_prefix() -> None:
    rule = DomainRule(devices=("channel:unix /a", "disk"))
    assert allows_device(rule, "channel:unix", "/a")
    assert not allows_device(rule, "channel:unix", "")
    assert not allows_device(rule, "disk:file", "")
    assert not allows_device(rule, "channel", "unix /a")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"emulator": "/usr/bin/a2"}, "emulator"),
        ({"virt": "qemu"}, "virtualisation"),
        ({"machine": "pc"}, "machine type"),
        ({"boot": (DomainPart("loader", "/f/a"),)}, "boot files"),
        ({"boot": (DomainPart("cmdline", "init=/bin/sh"),)}, "boot files"),
        ({"arguments": ("-a",)}, "arguments of QEMU"),
        ({"environment": ("A=b",)}, "environment of QEMU"),
        ({"memory": ("locked",)}, "memory backing"),
        ({"said": b"x" * 32}, "command line"),
        ({"cid": 8, "said_cids": ()}, "CID"),
        ({"cid": 0, "said_cids": ()}, "CID"),
    ],
)
def test_a_running_machine_stays_what_it_is(changes: dict[str, object], word: str) -> None:
    rule = DomainRule(
        emulators=("/usr/bin/a2", QEMU),
        types=("kvm", "qemu"),
        firmware=("/f/",),
        arguments=("-a",),
        environment=("A=b",),
    )
    keeper = DomainJudge()
    assert judge(reading(), rule, judge=keeper).status is Status.VERIFIED
    verdict = judge(reading(**changes), rule, judge=keeper)
    assert codes(verdict) == ["domain-changed"]
    assert verdict.findings[0].subject == f"vm web1: {word}"
    # Seen again: the change does not become what is expected.
    assert codes(judge(reading(**changes), rule, judge=keeper)) == ["domain-changed"]
    # The same machine, started again, may be another.
    assert judge(reading(**changes, pid=813), rule, judge=keeper).status is Status.VERIFIED


def test_innocent_change() -> None:
    """Disks, networks with their ROMs and a vsock device plugged in; a CID filled in; libvirt silent."""
    rule = DomainRule(emulators=(QEMU,), firmware=("/r",))
    keeper = DomainJudge()
    for now in (
        reading(cid=0, said_cids=()),
        reading(cid=0, said_cids=(), answered=False),
        reading(said_cids=(), devices=(DomainPart("disk:block"), DomainPart("interface:network"))),
        reading(said_cids=(), boot=(DomainPart("rom", "/r"),), definition=b"e" * 32),
        reading(said_cids=(), name="renamed"),
    ):
        assert judge(now, rule, judge=keeper).status is Status.VERIFIED
    # The CID that it got is its CID from now on.
    assert codes(judge(reading(cid=9, said_cids=()), rule, judge=keeper)) == ["domain-changed"]


def test_machines_that_ended_are_forgotten() -> None:
    keeper = DomainJudge()
    judge(reading(), judge=keeper)
    keeper.keep_only([VM])
    assert codes(judge(reading(machine="x"), judge=keeper)) == ["domain-changed"]
    keeper.keep_only([])
    assert judge(reading(machine="x"), judge=keeper).status is Status.VERIFIED


def test_findings_are_bounded() -> None:
    many = tuple(DomainPart("hostdev:pci", f"{number}") for number in range(1000))
    verdict = judge(reading(devices=many, emulator="x" * 4096))
    assert len(verdict.findings) == MAX_FINDINGS
    assert all(len(finding.seen) <= 512 for finding in verdict.findings)


def test_a_proposal_accepts_what_it_was_made_of() -> None:
    odd = reading(
        virt="qemu",
        emulator="/opt/q",
        boot=(DomainPart("kernel", "/k"), DomainPart("loader", "/l"), DomainPart("nvram", "/n")),
        arguments=("-x", "-a", "-x"),
        environment=("B=1", "A=1"),
        devices=(
            *(DomainPart("channel:unix", "/var/lab/web1.sock"), DomainPart("hostdev:pci", "bus=1")),
            DomainPart("filesystem:mount", "/srv"),
        ),
        memory=("access:shared",),
    )
    rule = propose_domain([odd, reading(labels=("dac x",))], [QEMU])
    assert judge(odd, rule).status is Status.VERIFIED
    assert judge(reading(), rule).status is Status.VERIFIED
    assert rule.emulators == ("/opt/q", QEMU)
    assert rule.labels == ("dac",)
    assert rule.firmware == ("/l",)
    # Another machine's socket lies in the same folder; another shared directory is another matter.
    for device, good in (
        (DomainPart("channel:unix", "/var/lab/web2.sock"), True),
        (DomainPart("filesystem:mount", "/srv2"), False),
        (DomainPart("hostdev:pci", "bus=2"), False),
    ):
        assert (judge(reading(devices=(device,)), rule).status is Status.VERIFIED) is good
    empty = propose_domain([], [QEMU])
    assert judge(reading(), empty).status is Status.VERIFIED
    for each in (rule, empty):
        assert parse_reference(encode_reference(reference(each))).domain == each


@pytest.mark.parametrize("field", ["emulators", "firmware", "kernels", "arguments", "devices", "machines"])
def test_lists_are_sorted(field: str) -> None:
    for wrong in (("b", "a"), ("a", "a")):
        with pytest.raises(ValueError, match="not sorted"):
            DomainRule(**{field: wrong})  # type: ignore[arg-type]


def test_the_reading_is_bounded() -> None:
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(DomainReading)
    assert decoder.decode(encoder.encode(reading())) == reading()
    for wrong in (
        {"devices": (DomainPart("x"),) * 2049},
        {"arguments": ("x" * 4097,)},
        {"said_cids": tuple(range(17))},
        {"definition": b"d" * 31},
        {"vm": "x" * 37},
    ):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(encoder.encode(reading(**wrong)))
