"""libvirt's XML and QEMU's command lines: whole, hostile, cut and mutated."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.core.reading_domain import MAX_PARTS, DomainPart
from hostd.measurer.commandline import parse_claims, parse_command_line
from hostd.measurer.directory import in_scope
from hostd.measurer.domain_line import definition_of
from hostd.measurer.domain_xml import (
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_XML_BYTES,
    MalformedDomainError,
    parse_cid,
    parse_domain,
)

DATA: Final = Path(__file__).parent.parent / "data"
LIVE: Final = (DATA / "domain-live.xml").read_text()
LINE: Final = (DATA / "domain-command-line.bin").read_bytes()
VM: Final = "ad781bfa-aebd-4ba6-bccf-41856e4d828c"


def domain(devices: str = "", rest: str = "", *, attributes: str = "type='kvm'") -> str:
    return (
        f"<domain {attributes}><name>web1</name><uuid>{VM}</uuid>"
        f"<os><type machine='pc-q35-7.2'>hvm</type></os>"
        f"<devices><emulator>/usr/bin/q</emulator>{devices}</devices>{rest}</domain>"
    )


def devices_of(xml: str) -> set[tuple[str, str]]:
    return {(part.kind, part.target) for part in parse_domain(domain(xml)).devices}


def test_what_libvirt_wrote_of_a_running_machine() -> None:
    live = parse_domain(LIVE)
    assert (live.vm, live.name, live.virt, live.cid) == (VM, "web-1", "kvm", 17)
    assert (live.emulator, live.machine) == ("/usr/bin/qemu-system-x86_64", "pc-q35-7.2")
    assert live.arguments == ("-global", "kvm-pit.lost_tick_policy=discard")
    assert live.environment == ("LD_BIND_NOW=1",)
    assert live.labels == ("dac +64055:+64055",)
    assert live.memory == ("access:shared", "source:memfd")
    assert DomainPart("rng:random", "/dev/urandom") in live.devices
    assert DomainPart("serial:file", "/var/log/libvirt/qemu/web-1-console.log") in live.devices
    assert {part.kind for part in live.devices} == {
        *("audio", "channel:unix", "console:pty", "controller", "disk:file", "graphics:vnc", "input"),
        *("interface:user", "memballoon", "rng:random", "serial:file", "serial:pty", "video", "vsock"),
    }


def test_the_process_says_the_same() -> None:
    assert parse_claims(LINE) == ({VM}, {"web-1"}, {17})
    said = definition_of(LINE, emulator="/usr/bin/q", accel="kvm")
    assert (said.vm, said.name, said.cid, said.virt) == (VM, "web-1", 17, "kvm")
    assert said.machine == "pc-q35-7.2"
    assert said.memory == ("access:shared", "source:memfd")


def test_form_does_not_count_and_content_does() -> None:
    plain = parse_domain(domain()).digest
    assert parse_domain(domain().replace("><", ">\n  <")).digest == plain
    assert parse_domain(domain().replace("'", '"')).digest == plain
    assert parse_domain(domain("<video/>")).digest != plain


@pytest.mark.parametrize(
    ("xml", "kind", "target"),
    [
        (
            "<hostdev mode='subsystem' type='pci'><source><address domain='0x0000' bus='0x3b' slot='0x00' "
            "function='0x1'/></source></hostdev>",
            "hostdev:pci",
            "bus=0x3b,domain=0x0000,function=0x1,slot=0x00",
        ),
        ("<hostdev mode='capabilities' type='misc'><source/></hostdev>", "hostdev:misc", ""),
        (
            "<filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/></filesystem>",
            "filesystem:mount",
            "/srv",
        ),
        ("<shmem name='x'><model type='ivshmem-plain'/></shmem>", "shmem", ""),
        ("<serial type='unix'><source mode='bind' path='/run/x'/></serial>", "serial:unix", "/run/x"),
        ("<serial type='tcp'><source host='10.0.0.1' service='99'/></serial>", "serial:tcp", "10.0.0.1:99"),
        ("<serial type='pty'><log file='/tmp/l'/></serial>", "serial:file", "/tmp/l"),
        ("<console type='dev'><source path='/dev/ttyS0'/></console>", "console:dev", "/dev/ttyS0"),
        ("<redirdev bus='usb' type='tcp'><source host='h' service='1'/></redirdev>", "redirdev:tcp", "h:1"),
        ("<smartcard mode='host'/>", "smartcard:host", ""),
        ("<tpm model='tpm-crb'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
         "tpm:passthrough", "/dev/tpm0"),
        ("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>", "tpm:emulator", ""),
        ("<rng model='virtio'><backend model='random'>/etc/shadow</backend></rng>", "rng:random",
         "/etc/shadow"),
        ("<rng><backend model='egd' type='unix'><source path='/e'/></backend></rng>", "rng:egd", "/e"),
        ("<interface type='vhostuser'><source type='unix' path='/v'/></interface>", "interface:vhostuser",
         "/v"),
        ("<interface type='ethernet'><script path='/x.sh'/></interface>", "interface:script", "/x.sh"),
        ("<disk type='vhostuser'><source type='unix' path='/d'/></disk>", "disk:vhostuser", "/d"),
        ("<disk type='block' device='lun'><source dev='/dev/sda'/></disk>", "disk:lun", "/dev/sda"),
        ("<input type='evdev'><source dev='/dev/input/event3'/></input>", "input:evdev",
         "/dev/input/event3"),
        ("<memory model='nvdimm'><source><path>/nv</path></source></memory>", "memory:nvdimm", "/nv"),
        ("<audio id='1' type='file' path='/a'/>", "audio:file", ""),
        ("<newthing type='x y'><source path='/n'/></newthing>", "newthing:x_y", "/n"),
    ],
)  # fmt: skip
def test_devices_that_reach_the_host(xml: str, kind: str, target: str) -> None:
    assert (kind, target) in devices_of(xml)


def test_what_a_machine_starts_from() -> None:
    xml = domain(
        "<interface type='user'><rom bar='on' file='/r'/></interface>",
        "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:arg value='-x'/>"
        "<qemu:arg value='-x'/></qemu:commandline>"
        "<qemu:override xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:device alias='v'/>"
        "</qemu:override>",
    ).replace(
        "</os>",
        "<loader readonly='yes'>/l</loader><nvram template='/t'>/n</nvram><kernel>/k</kernel>"
        "<initrd>/i</initrd><dtb>/d</dtb><shim>/s</shim><cmdline>a b</cmdline>"
        "<acpi><table type='slic'>/a</table></acpi></os>",
    )
    found = parse_domain(xml)
    assert set(found.boot) == {
        DomainPart(kind, target)
        for kind, target in (
            *(("loader", "/l"), ("nvram", "/n"), ("template", "/t"), ("kernel", "/k"), ("initrd", "/i")),
            *(("dtb", "/d"), ("shim", "/s"), ("cmdline", "a b"), ("acpi", "/a"), ("rom", "/r")),
        )
    }
    assert found.arguments[:2] == ("-x", "-x")
    assert "override" in found.arguments[2]


def test_a_label_that_does_not_confine_is_none() -> None:
    xml = domain(rest="<seclabel type='none' model='apparmor'/><seclabel type='static' model='dac'/>")
    assert parse_domain(xml).labels == ("dac",)


HOSTILE: Final = {
    "document type": '<!DOCTYPE domain [<!ENTITY a "b">]>' + domain(),
    "entities": (
        '<!DOCTYPE d [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
        f"<domain><name>&b;</name><uuid>{VM}</uuid></domain>"
    ),
    "external": f'<!DOCTYPE d SYSTEM "file:///etc/passwd">{domain()}',
    "deep": domain("<a>" * MAX_DEPTH + "</a>" * MAX_DEPTH),
    "many": domain("<a/>" * MAX_ELEMENTS),
    "long": domain(f"<a b='{'x' * MAX_XML_BYTES}'/>"),
    "many devices": domain("".join(f"<a type='{n}'/>" for n in range(MAX_PARTS + 1))),
    "long text": domain(f"<serial type='unix'><source path='{'x' * 5000}'/></serial>"),
    "many arguments": domain(
        rest="<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        + "<qemu:arg value='x'/>" * (MAX_PARTS + 1)
        + "</qemu:commandline>"
    ),
    "no UUID": "<domain><name>x</name></domain>",
    "no domain": f"<network><uuid>{VM}</uuid></network>",
    "empty": "",
    "surrogate": domain().replace("web1", "\udc80"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(name: str) -> None:
    with pytest.raises(MalformedDomainError):
        parse_domain(HOSTILE[name])
    assert parse_cid(HOSTILE[name]) == 0


def test_mutations_and_cuts_raise_nothing_else() -> None:
    rng = random.Random(7)
    alphabet = "<>/='\"& \0\xff}{:x"
    for number in range(1200):
        text = list(LIVE)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 40)] = rng.choice(alphabet) * rng.randint(0, 2)
        cut = "".join(text)[: rng.randrange(len(LIVE))] if number % 3 == 0 else "".join(text)
        try:
            found = parse_domain(cut)
        except MalformedDomainError:
            continue
        msgspec.msgpack.encode([list(part) for part in map(msgspec.structs.astuple, found.devices)])


@given(st.text(max_size=300))
def test_any_text(text: str) -> None:
    for xml in (text, domain(text), domain(rest=text)):
        with contextlib.suppress(MalformedDomainError):
            parse_domain(xml)


@given(st.lists(st.sampled_from(LINE.split(b"\0")) | st.binary(max_size=40), max_size=30))
def test_any_command_line(arguments: list[bytes]) -> None:
    data = b"\0".join(arguments)
    vms, names, cids = parse_claims(data)
    said = parse_command_line(data)
    assert said.vm in {"", *vms}
    assert said.name in {"", *names}
    assert said.cid in {0, *cids}
    definition_of(data, emulator="/q", accel="tcg")


def test_a_command_line_of_another_kind() -> None:
    line = b"\0".join(
        [
            *(b"q", b"-M", b"q35,accel=tcg", b"-kernel", b"/k", b"--initrd", b"/i", b"-append", b"x"),
            *(b"-drive", b"if=pflash,file=/code.fd,readonly=on", b"-drive", b"if=pflash,file=/vars.fd"),
            *(b"-device", b"vfio-pci,host=3b:00.0,romfile=/r", b"-device", b"vhost-vsock-pci,guest-cid=9"),
            *(b"-device", b'{"driver":"vhost-vsock-pci","guest-cid":10}', b"-fsdev", b"local,path=/srv,id=f"),
            *(b"-chardev", b"socket,id=c,path=/run/c", b"-qmp", b"unix:/run/q,server=on", b"-plugin", b"/p"),
            *(b"-object", b"memory-backend-file,mem-path=/m,share=on", b"-netdev", b"vhost-user,chardev=c"),
            b"",
        ]
    )
    found = definition_of(line, emulator="/q", accel="tcg")
    assert {(part.kind, part.target) for part in found.boot} == {
        *(("kernel", "/k"), ("initrd", "/i"), ("cmdline", "x"), ("loader", "/code.fd")),
        *(("nvram", "/vars.fd"), ("rom", "/r")),
    }
    assert {(part.kind, part.target) for part in found.devices} == {
        *(("hostdev:pci", "3b:00.0"), ("vsock", ""), ("filesystem:mount", "/srv")),
        *(("chardev:unix", "/run/c"), ("qmp:unix", "/run/q"), ("plugin", "/p")),
        ("interface:vhost-user", ""),
    }
    assert found.memory == ("access:shared", "source:file")
    assert (found.machine, found.virt, found.cid) == ("q35", "qemu", 0)
    assert parse_claims(line)[2] == {9, 10}
    with pytest.raises(MalformedDomainError):
        definition_of(b"-kernel\0" + b"k" * 5000 + b"\0", emulator="/q", accel="tcg")


SCOPE: Final = rb"0::/machine.slice/machine-qemu\x2d12\x2dweb\x2d1.scope/libvirt/emulator"


@pytest.mark.parametrize(
    ("cgroup", "run", "good"),
    [
        (SCOPE, 12, True),
        (SCOPE, 1, False),
        (SCOPE, 0, False),
        (SCOPE.replace(b"/libvirt/emulator", b""), 12, True),
        (rb"0::/machine.slice/machine-prod.slice/machine-qemu\x2d12\x2dx.scope", 12, True),
        (b"4:cpu:/machine/qemu-12-web1.libvirt-qemu/emulator\n0::/x", 12, True),
        (rb"0::/user.slice/u.service/machine-qemu\x2d12\x2dweb.scope", 12, False),
        (rb"0::/user.slice/machine.slice/machine-qemu\x2d12\x2dweb.scope", 12, False),
        (SCOPE + b"\n" + SCOPE.replace(b"d12", b"d13"), 12, False),
        (b"0::/machine.slice/other.scope", 12, False),
        (b"0::/", 0, False),
        (b"", 0, False),
    ],
)
def test_the_control_group_of_a_run(cgroup: bytes, run: int, good: bool) -> None:
    assert in_scope(cgroup, run) is good


@given(st.binary(max_size=300), st.integers(0, 20))
def test_any_control_group(cgroup: bytes, run: int) -> None:
    assert in_scope(cgroup, run) is False or b"qemu" in cgroup
