"""Promise: reference values come into force by the officers' signatures over the very bytes, and in no
other way; an update of the hypervisor goes through while machines run, and afterwards the old build is
refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hostd.config import load_config
from hostd.core.manifest import checked
from hostd.core.reference import Reference, encode_reference, parse_reference
from hostd.platform import program
from hostd.platform.hostname import this_host
from tests.e2e.harness import VM, Host, Settings, adopted, machine, prepared, until
from tests.support import officers, qemu
from tests.support.deb import deb

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.qemu]
OTHER_VM = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0002"
THIRD_VM = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a0003"


def signature(path: Path) -> Path:
    return path.with_name(path.name + ".sig")


def ctl(host: Host, *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = host.hostctl_json("manifest", *map(str, arguments))
    return found


def in_force(host: Host) -> dict[str, Any]:
    return ctl(host, "status")


def successor(host: Host, name: str, /, **changes: object) -> Path:
    """A document that follows the one in force, unsigned."""
    path = host.directory / name
    host.hostctl("manifest", "approve-next", "@", "--file", "/usr/bin/env", "-o", str(path))
    if changes:
        document = json.loads(path.read_bytes())
        path.write_bytes(encode_reference(checked(_reference({**document, **changes}))))
    return path


def _reference(document: dict[str, Any]) -> Reference:
    raw = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return parse_reference(raw.encode())


# ── Who signs ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def council(binary: Path) -> Iterator[Host]:
    """A host with three officers, of whom two must sign."""
    settings = Settings(officers=("alice", "bob", "carol"), quorum=2)
    with adopted(binary, settings) as host:
        yield host


def refused(host: Host, path: Path) -> str:
    """The vault's refusal, which changes nothing and is no entry of a manifest."""
    before, entries = in_force(host), [e for e in host.ledger() if e["event"] == "manifest"]
    done = host.hostctl("manifest", "install", str(path), check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    after = in_force(host)
    assert (after["digest"], after["version"]) == (before["digest"], before["version"])
    assert [e for e in host.ledger() if e["event"] == "manifest"] == entries
    return done.stderr


def test_unsigned(council: Host) -> None:
    assert "2 officers must sign, 0 did: nobody" in refused(council, successor(council, "unsigned.json"))


def test_one_of_two(council: Host) -> None:
    path = successor(council, "one.json")
    signature(path).write_bytes(council.officer("alice").sign(path.read_bytes()))
    assert "2 officers must sign, 1 did: alice" in refused(council, path)


def test_the_same_officer_twice(council: Host) -> None:
    path = successor(council, "twice.json")
    signature(path).write_bytes(
        council.officer("alice").sign(path.read_bytes())
        + council.officer("alice").sign(path.read_bytes(), "hostd-manifest", "-O", "hashalg=sha256")
    )
    assert "1 did: alice; alice more than once" in refused(council, path)


def test_for_another_purpose(council: Host) -> None:
    path = successor(council, "purpose.json")
    signature(path).write_bytes(
        council.officer("alice").sign(path.read_bytes())
        + council.officer("bob").sign(path.read_bytes(), "file")
    )
    assert "bob signed for the purpose 'file', 'hostd-manifest' is needed" in refused(council, path)


def test_by_somebody_else(council: Host) -> None:
    path = successor(council, "mallory.json")
    signature(path).write_bytes(
        council.officer("alice").sign(path.read_bytes()) + council.officer("mallory").sign(path.read_bytes())
    )
    text = refused(council, path)
    assert council.officer("mallory").key.fingerprint in text
    assert "which is no officer's key" in text


def test_one_byte_changed_after_signing(council: Host) -> None:
    path = successor(council, "tampered.json")
    data = path.read_bytes()
    signature(path).write_bytes(council.officer("alice").sign(data) + council.officer("bob").sign(data))
    path.write_bytes(data.replace(b'"created":1', b'"created":2', 1))
    assert "the signature by alice is not over these bytes" in refused(council, path)


def test_one_byte_of_a_signature_changed(council: Host) -> None:
    path = successor(council, "damaged.json")
    good = council.officer("alice").sign(path.read_bytes())
    bad = bytearray(council.officer("bob").sign(path.read_bytes()))
    bad[len(bad) // 2] ^= 1
    signature(path).write_bytes(good + bad)
    assert "error:" in refused(council, path)


def test_older_or_the_same_version(council: Host) -> None:
    version = in_force(council)["version"]
    for older in (version, 1):
        path = successor(council, f"older{older}.json", version=older)
        for name in ("alice", "bob"):
            council.hostctl("manifest", "sign", str(path), "-k", str(council.officer(name).path))
        assert f"is not newer than version {version}" in refused(council, path)


def test_made_from_another_document(council: Host) -> None:
    path = successor(council, "fork.json", previous="ab" * 32)
    for name in ("alice", "bob"):
        council.hostctl("manifest", "sign", str(path), "-k", str(council.officer(name).path))
    assert "it was made from the document ababababababab" in refused(council, path)


def test_for_another_host(council: Host) -> None:
    path = successor(council, "elsewhere.json", host="another.example")
    for name in ("alice", "bob"):
        council.hostctl("manifest", "sign", str(path), "-k", str(council.officer(name).path))
    assert ctl(council, "verify", path)["host"] == "another.example"
    assert f"it is for host 'another.example', and this one is '{this_host()}'" in refused(council, path)


def test_not_a_document(council: Host) -> None:
    path = council.directory / "none.json"
    path.write_bytes(b"{}")
    assert "malformed" in refused(council, path)


def test_two_officers(council: Host) -> None:
    path = successor(council, "good.json")
    for name in ("carol", "alice"):
        council.hostctl("manifest", "sign", str(path), "-k", str(council.officer(name).path))
    assert ctl(council, "verify", path)["signed_by"] == ["alice", "carol"]
    installed = ctl(council, "install", path)
    assert installed["signed_by"] == ["alice", "carol"]
    entry = [e for e in council.ledger() if e["event"] == "manifest"][-1]
    assert entry["detail"] == (
        f"version {installed['version']}, {installed['digest']}, signed by alice, carol"
    )
    # Its very bytes for programs, and dates for people.
    assert council.hostctl("--json", "manifest", "show").stdout.encode() == path.read_bytes()
    assert council.hostctl("manifest", "show").stdout.startswith(f"version {installed['version']} for host ")
    # Anybody can verify later what is in force.
    again = council.directory / "again.json"
    council.hostctl("manifest", "show", "-o", str(again))
    assert again.read_bytes() == path.read_bytes()
    assert ctl(council, "verify", again)["signed_by"] == ["alice", "carol"]


def test_it_is_in_force_after_a_restart(council: Host) -> None:
    before = in_force(council)
    council.stop()
    council.start()
    council.wait_open()
    after = in_force(council)
    assert (after["digest"], after["signed_by"]) == (before["digest"], before["signed_by"])


def test_other_officers_in_the_configuration_open_nothing(binary: Path) -> None:
    settings = Settings(officers=("alice", "bob"))
    with prepared(binary, settings) as host:
        host.start()
        host.adopt()
        host.stop()
        for officers, quorum, reason in (
            (("mallory",), 1, "mallory ("),
            (("alice",), 1, "1 of the recorded are missing"),
            (("alice", "bob"), 2, "1 had to sign, not 2"),
        ):
            host.settings = Settings(officers=officers, quorum=quorum)
            host.write_config()
            host.start()
            shut = until(
                lambda: (s := host.status()) and "officers" in s.reason and s, "the officers are refused"
            )
            assert (shut.gate, shut.keys_unlocked) == ("closed", False)
            assert reason in shut.reason
            host.stop()
        host.settings = settings
        host.write_config()
        host.start()
        host.wait_open()
        host.stop()


def test_no_officers_no_start(binary: Path) -> None:
    with prepared(binary) as host:
        text = host.config_path.read_text()
        host.config_path.write_text(text[: text.index("[officers]")])
        refused = host.hostd("run", check=False)
        assert refused.returncode != 0
        assert "names no officers" in refused.stderr
        assert "hint: `hostd setup --officer FILE.pub`" in refused.stderr
        # As the hint says.
        done = host.hostd("setup", "--officer", str(host.officer("officer").path.with_suffix(".pub")))
        assert "officer (SHA256:" in done.stdout
        host.start()
        host.stop()


def test_a_development_configuration_comes_with_an_officer(tmp_path: Path) -> None:
    config = tmp_path / "hostd.toml"
    argv = ["--config", str(config), "setup", "--write-config"]
    argv += ["--state-dir", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run")]
    for _ in range(2):
        done = subprocess.run(program.command(*argv), capture_output=True, text=True, timeout=60, check=True)
    assert "made" not in done.stdout
    key = tmp_path / "officer"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert load_config(config).officers.keys == (key.with_suffix(".pub").read_text().strip(),)
    other = officers.make(tmp_path, "other").path.with_suffix(".pub")
    argv = ["--config", str(config), "setup", "--officer", str(other)]
    refused = subprocess.run(program.command(*argv), capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode != 0
    assert "names other officers already" in refused.stderr


def test_an_officer_signs_where_there_is_no_hostd(council: Host, tmp_path: Path) -> None:
    path = successor(council, "away.json")
    argv = [sys.executable, "-m", "hostd.admin.hostctl", "--config", str(tmp_path / "none.toml")]
    done = subprocess.run(
        [*argv, "manifest", "sign", str(path), "-k", str(council.officer("bob").path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    council.hostctl("manifest", "sign", str(path), "-k", str(council.officer("carol").path))
    assert ctl(council, "verify", path)["signed_by"] == ["bob", "carol"]


# ── Packages ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_apt_proposes_and_never_fails(council: Host, tmp_path: Path) -> None:
    package = deb(tmp_path)
    row = f"hostd-test-package - - none < 1:2.0-1 amd64 none {package}"
    told = f"VERSION 3\nAPT::Architecture=amd64\n\n{row}\n"
    done = council.hostctl("manifest", "propose", "--apt", given=told)
    (proposal,) = (council.state / "proposals").glob("*.json")
    assert "4 files of 1 packages are not in the manifest in force" in done.stderr
    assert f"hostctl manifest sign {proposal} -k KEY" in done.stderr
    assert f"hostctl manifest install {proposal}" in done.stderr
    assert stat.S_IMODE(proposal.parent.stat().st_mode) == 0o700
    for name in ("alice", "bob"):
        council.hostctl("manifest", "sign", str(proposal), "-k", str(council.officer(name).path))
    council.hostctl("manifest", "install", str(proposal))
    assert "/usr/bin/tool" in {line["path"] for line in in_force(council)["next"]}
    # Nothing is left to propose.
    again = council.hostctl("manifest", "propose", "--apt", given=told)
    assert "knows these packages" in again.stderr
    for wrong in ("", "VERSION 3\n", "VERSION 3\n\nx 1 < 2 /tmp/no-such.deb\n"):
        assert council.hostctl("manifest", "propose", "--apt", given=wrong).returncode == 0


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_apt_goes_on_without_a_vault(binary: Path, tmp_path: Path) -> None:
    with prepared(binary) as host:
        told = f"VERSION 3\n\nx 1 < 2 {deb(tmp_path)}\n"
        done = host.hostctl("manifest", "propose", "--apt", given=told)
        assert "no manifest was proposed" in done.stderr


def test_from_the_packages_of_this_machine(council: Host) -> None:
    """Digests by the package manager, and the same as on the disk."""
    if not Path("/var/lib/dpkg/info/dpkg.md5sums").exists():
        pytest.skip("no dpkg")
    path = council.directory / "packages.json"
    made = ctl(council, "from-packages", "dpkg", "libc6", "-o", path)
    assert made["files"] > 20
    reference = parse_reference(path.read_bytes())
    digest = hashlib.sha256(Path("/usr/bin/dpkg").read_bytes()).hexdigest()
    assert reference.expected("/usr/bin/dpkg") == (digest,)
    assert {source.name for source in reference.sources} == {"dpkg", "libc6"}
    # With the rules of the host it becomes a manifest that can be in force.
    host = council.directory / "host.json"
    council.hostctl("manifest", "show", "-o", str(host))
    into = council.directory / "into.json"
    ctl(council, "from-packages", "dpkg", "--into", host, "-o", into)
    both = parse_reference(into.read_bytes())
    assert both.posture is not None
    assert both.expected("/usr/bin/dpkg") == (digest,)


# ── Updates ───────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def own_binary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield qemu.copy_of_qemu(tmp_path_factory.mktemp("updated"))


def status_of(host: Host, vm: str) -> str:
    vms = {line["vm"]: line for line in host.hostctl_json("vm", "list")["vms"]}
    return "DRIFTED" if vms.get(vm, {}).get("drifted") else str(vms.get(vm, {}).get("status", "none"))


def verified(host: Host, *vms: str) -> None:
    until(lambda: all(status_of(host, vm) == "verified" for vm in vms), f"{vms} are verified", 60)


def test_an_update_while_a_machine_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Approve the next build, replace the file, start on it, retire the old one; no alarm on the way."""
    with own_binary(tmp_path_factory) as binary, machine(binary), adopted(binary) as host:
        client = host.client()
        host.serves(client)
        old_build = binary.with_name("old")
        shutil.copy2(binary, old_build)
        next_build = binary.with_name("next")
        shutil.copy2(binary, next_build)
        with next_build.open("ab") as file:
            file.write(b"another build")

        approved = host.directory / "approved.json"
        ctl(host, "approve-next", "@", "--file", next_build, "--as", binary, "-o", approved)
        assert host.hostctl("manifest", "diff", "@", str(approved), check=False).returncode == 1
        host.install(approved)
        host.wait_open()
        coming = in_force(host)["next"]
        assert [(line["path"], line["seen"]) for line in coming] == [(str(binary), False)]

        next_build.rename(binary)  # as dpkg does it
        host.serves(client)
        verified(host, VM)  # on "(deleted)"
        with machine(binary, vm=OTHER_VM):
            verified(host, VM, OTHER_VM)
            host.serves(client)
            assert [line["seen"] for line in in_force(host)["next"]] == [True]
            assert host.drift() == {}

            retired = host.directory / "retired.json"
            ctl(host, "retire", "@", "--path", binary, "-o", retired)
            host.install(retired)
            until(lambda: f"process:{VM}" in host.drift(), "the old build is refused")
            verified(host, OTHER_VM)
            findings = host.drift()
            assert set(findings) == {f"process:{VM}"}  # one cause, one drift
            finding = findings[f"process:{VM}"][0]
            print(json.dumps(finding, indent=2))
            assert finding["code"] == "file-retired"
            assert str(binary) in finding["subject"]
            assert ", retired on 20" in finding["seen"]
            # Whoever wants to see everything does not wait for a `relro` that is not asked for.
            seen = host.hostctl("--json", "measure", check=False)
            assert seen.returncode == 4
            lines = {line["component"]: line for line in json.loads(seen.stdout)["components"]}
            assert lines[f"process:{VM}"]["latched"]
            assert not lines[f"relro:{VM}"]["latched"]
            assert lines["files"]["age_ms"] < lines[f"relro:{VM}"]["age_ms"]

        # So is a machine that starts on the old build from now on.
        old_build.rename(binary)
        with machine(binary, vm=THIRD_VM):
            until(lambda: f"process:{THIRD_VM}" in host.drift(), "the old build is refused again")
            assert host.drift()[f"process:{THIRD_VM}"][0]["code"] == "file-retired"


def test_a_digest_retires_by_itself_when_its_time_has_come(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with own_binary(tmp_path_factory) as binary, machine(binary), adopted(binary) as host:
        host.serves(host.client())
        base = host.directory / "in-force.json"
        host.hostctl("manifest", "show", "-o", str(base))
        reference = parse_reference(base.read_bytes())
        (digest,) = reference.expected(str(binary))
        due = int(time.time()) + 8
        path = successor(host, "due.json", retire={str(binary): {digest: due}})
        host.install(path)
        host.wait_open()
        verified(host, VM)
        assert host.drift() == {}
        until(lambda: f"process:{VM}" in host.drift(), "the digest has retired", 40)
        assert time.time() >= due
        (entry,) = [e for e in host.ledger() if e["event"] == "retire"]
        assert entry["detail"] == f"1 paths: {binary}"
        assert host.drift()[f"process:{VM}"][0]["code"] == "file-retired"


def test_a_document_as_large_as_the_limit_says(binary: Path) -> None:
    """15 MiB: the way from hostctl to the store and back has room for it."""
    with adopted(binary) as host:
        path = host.directory / "large.json"
        files = {f"/usr/share/large/{n:06}/" + "x" * 80: ["ab" * 32] for n in range(85_000)}
        document = json.loads(successor(host, "small.json").read_bytes())
        path.write_bytes(encode_reference(_reference({**document, "next": files})))
        assert 14 << 20 < path.stat().st_size < 16 << 20
        started = time.monotonic()
        host.install(path)
        print(f"{path.stat().st_size} bytes signed and installed in {time.monotonic() - started:.1f} s")
        host.wait_open()
        again = host.directory / "large-again.json"
        host.hostctl("manifest", "show", "-o", str(again))
        assert again.read_bytes() == path.read_bytes()
        host.stop()
        host.start()
        host.wait_open()
