"""`hostctl host` as officers and the provider run it: files, exit codes, JSON; the TPM is real, and the
vault's desk answers in place of its socket."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from support_enrolment import Desk, certified, maker, now
from support_tpm import Embedded

from guestlib.attest.bundle import TrustBundle, encode_bundle, parse_bundle
from guestlib.attest.hostcert import read_host_certificate
from guestlib.attest.notekey import VerifierKey
from hostd.admin import hostca, hostctl
from hostd.admin.context import Context
from hostd.core import enrolment as docs
from hostd.ipc import operating as adm
from hostd.platform import swtpm
from tests.support.hostcerts import DAY, Provider

Run = Callable[..., tuple[int, str, str]]


class Place:
    """The provider's folder, and paths for what is sent."""

    def __init__(self, folder: Path, host: Embedded) -> None:
        self.folder = folder
        self.provider = Provider(now())
        self.file("ca.pem").write_bytes(self._pem(self.provider.root))
        self.file("ca.key").write_bytes(self.provider.key_pem)
        self.file("maker.pem").write_bytes((host.state / swtpm.CA_FILE).read_bytes())

    @staticmethod
    def _pem(der: bytes) -> bytes:
        import ssl

        return ssl.DER_cert_to_PEM_cert(der).encode()

    def file(self, name: str) -> Path:
        return self.folder / name

    def __getattr__(self, name: str) -> str:
        return str(self.folder / name.replace("_", "."))

    def challenge(self) -> list[str]:
        return [
            *("challenge", self.request, "--ek-root", self.maker_pem, "--name", "web1"),
            *("-o", self.challenge_json, "--state", self.state),
        ]

    def certify(self) -> list[str]:
        return [
            *("certify", self.answer, "--state", self.state, "--ca", self.ca_pem, "-k", self.ca_key),
            *("-o", self.cert_pem),
        ]


@pytest.fixture
def desk(tmp_path: Path, host: Embedded) -> Iterator[Desk]:
    made = Desk(tmp_path / "state-dir", host)
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path, host: Embedded) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place", host)


@pytest.fixture
def run(desk: Desk, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """hostctl in this process: exit code, standard output and error."""

    def ask(_context: Context, command: Any, _result: object, _timeout_s: float = 0) -> Any:
        if isinstance(command, adm.TrustBundle):
            record = desk.host.record
            bundle = TrustBundle(
                require=frozenset({"files"}),
                aks=(record.ak_public,),
                channel_cas=(place.provider.root,),
                pcrs=((7, frozenset({bytes(32)})),),
                reference=frozenset({bytes(32)}),
                ledger=(str(VerifierKey("hostd-ledger", bytes(32))),),
            )
            return adm.Document(encode_bundle(bundle), "")
        return desk.ask(command)

    monkeypatch.setattr(Context, "ask", ask)

    def invoked(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hostctl", *arguments])
        code = 0
        try:
            hostctl.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return invoked


def good(run: Run, *arguments: str) -> Any:
    code, out, err = run("--json", "host", *arguments)
    assert (code, err) == (0, ""), (out, err)
    return json.loads(out)


def test_step_by_step(run: Run, desk: Desk, place: Place) -> None:
    assert good(run, "request", "-o", place.request)["file"] == place.request
    challenged = good(run, *place.challenge())
    assert (challenged["host"], challenged["ak_name"]) == ("web1", desk.host.record.ak_name.hex())
    assert stat.S_IMODE(place.file("state").stat().st_mode) == 0o600
    good(run, "answer", place.challenge_json, "-o", place.answer)
    assert good(run, *place.certify(), "--days", "30")["host"] == "web1"
    assert not place.file("state").exists()
    installed = good(run, "install", place.cert_pem)
    assert (installed["certified"], installed["valid"]) == ("web1", True)
    assert good(run, "show", "-o", place.shown_pem) == installed
    assert place.file("shown.pem").read_bytes() == place.file("cert.pem").read_bytes()
    (der,) = hostca.certificates(place.file("shown.pem").read_bytes())
    assert desk.link.host_certificate == der
    # Days are those asked for.
    assert read_host_certificate(der).not_after - now() < 30 * DAY


def test_for_people(run: Run, place: Place) -> None:
    code, out, _err = run("host", "show")
    assert (code, "certificate  none" in out, "certified the EK" in out) == (0, True, True)
    code, out, _err = run("host", "request", "-o", place.request)
    assert out.startswith(f"wrote {place.request}\ndigest ")
    code, out, err = run("host", "show", "-o", place.shown_pem)
    assert (code, "no host certificate is installed" in err) == (3, True)
    run(*("host", "enroll", "--ek-root", place.maker_pem, "--ca", place.ca_pem, "-k", place.ca_key))
    code, out, _err = run("host", "show")
    assert "by CN=provider" in out
    assert "NOT VALID NOW" not in out


def test_at_once(run: Run, desk: Desk, place: Place) -> None:
    arguments = ("--ek-root", place.maker_pem, "--ca", place.ca_pem, "-k", place.ca_key, "--name", "web1")
    report = good(run, "enroll", *arguments)
    assert (report["certified"], report["valid"]) == ("web1", True)
    assert [entry["subject"] for entry in desk.recorded] == ["answer", "install"]


def test_a_replayed_answer(run: Run, place: Place) -> None:
    good(run, "request", "-o", place.request)
    good(run, *place.challenge())
    good(run, "answer", place.challenge_json, "-o", place.answer)
    good(run, *place.certify())
    place.file("cert.pem").unlink()
    code, _out, err = run("host", *place.certify())
    assert code == 3
    assert "no challenge is open there: it was answered, or made elsewhere" in err
    assert not place.file("cert.pem").exists()
    # Nor for a challenge that was made later.
    good(run, *place.challenge())
    code, _out, err = run("host", *place.certify())
    assert (code, "the answer is to another challenge" in err) == (3, True)


def test_two_at_the_same_time_get_one(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    good(run, "request", "-o", place.request)
    good(run, *place.challenge())
    good(run, "answer", place.challenge_json, "-o", place.answer)
    certify = hostca.certify

    def overtaken(*arguments: Any, **more: Any) -> bytes:
        der = certify(*arguments, **more)
        place.file("state").unlink()
        return der

    monkeypatch.setattr(hostca, "certify", overtaken)
    code, _out, err = run("host", *place.certify())
    assert (code, "no challenge is open there" in err) == (3, True)
    assert not place.file("cert.pem").exists()


def test_a_refused_answer_leaves_the_challenge_open(run: Run, place: Place) -> None:
    good(run, "request", "-o", place.request)
    good(run, *place.challenge())
    good(run, "answer", place.challenge_json, "-o", place.answer)
    true = place.file("answer").read_bytes()
    parsed = docs.parse(true, docs.Answer)
    place.file("answer").write_bytes(docs.encode(docs.Answer(parsed.format, parsed.challenge, bytes(32))))
    code, _out, err = run("host", *place.certify())
    assert (code, "does not show the challenge's secret" in err) == (3, True)
    place.file("answer").write_bytes(true)
    good(run, *place.certify())


def test_an_open_challenge_is_not_written_over(run: Run, place: Place) -> None:
    good(run, "request", "-o", place.request)
    good(run, *place.challenge())
    before = place.file("state").read_bytes()
    code, _out, err = run("host", *place.challenge())
    assert (code, "File exists" in err) == (4, True)
    assert place.file("state").read_bytes() == before


def test_what_a_provider_refuses(run: Run, place: Place, other: Embedded) -> None:
    good(run, "request", "-o", place.request)
    place.file("maker.pem").write_bytes(maker(other))
    code, _out, err = run("host", *place.challenge())
    assert (code, "4 endorsement: no accepted maker vouches for it" in err) == (4, True)
    assert not place.file("state").exists()
    for content in (b"x", b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", bytes(1 << 21)):
        place.file("maker.pem").write_bytes(content)
        code, _out, err = run("host", *place.challenge())
        assert (code, place.maker_pem in err) == (3, True)


def test_what_a_document_says_does_not_command_the_terminal(run: Run, place: Place) -> None:
    place.file("maker.pem").write_bytes(place.provider.root)
    Path(place.request).write_bytes(b'{"\\u001b[2J": 1}')
    code, out, err = run("host", *place.challenge())
    assert (code, out) == (3, "")
    assert "unknown field `\\x1b[2J`" in err


def test_what_the_host_refuses(run: Run, place: Place, desk: Desk) -> None:
    place.file("challenge.json").write_bytes(b"{}")
    code, _out, err = run("host", "answer", place.challenge_json, "-o", place.answer)
    assert (code, "malformed: host challenge: " in err) == (3, True)
    assert not place.file("answer").exists()
    code, _out, err = run("host", "install", place.ca_pem)
    assert (code, "not a host certificate for this host" in err) == (3, True)
    place.file("two.pem").write_bytes(2 * place.file("ca.pem").read_bytes())
    code, _out, err = run("host", "install", place.two_pem)
    assert (code, "not exactly one certificate" in err) == (3, True)
    code, _out, err = run("host", "answer", place.nothing, "-o", place.answer)
    assert code == 2


def test_a_key_with_a_passphrase(run: Run, place: Place, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = place.provider.key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame")
    )
    place.file("ca.key").write_bytes(locked)
    asked: list[str] = []

    def prompt(text: str, **options: Any) -> str:
        assert options["hide_input"]
        asked.append(text)
        return said

    monkeypatch.setattr("hostd.admin.host.click.prompt", prompt)
    arguments = ("enroll", "--ek-root", place.maker_pem, "--ca", place.ca_pem, "-k", place.ca_key)
    said = "wrong"
    code, _out, err = run("host", *arguments, "--name", "web1")
    assert (code, "the CA's key does not read" in err) == (3, True)
    said = "open sesame"
    assert good(run, *arguments, "--name", "web1")["certified"] == "web1"
    assert asked == [f"passphrase of {place.ca_key}"] * 2


def test_trust_bundles(run: Run, place: Place, desk: Desk) -> None:
    code, out, _err = run(
        *("trust", "bundle", "--host-root", place.ca_pem, "--host", "web1", "--host", "web2"),
    )
    bundle = parse_bundle(out.encode())
    assert code == 0
    assert bundle.host_roots == (place.provider.root,)
    assert bundle.hosts == {"web1", "web2"}
    # What is this host's alone is not in it; what it was reviewed for is.
    assert (bundle.aks, bundle.channel_cas, bundle.ledger) == ((), (), ())
    assert bundle.pcrs == ((7, frozenset({bytes(32)})),)
    assert bundle.reference == {bytes(32)}
    code, _out, err = run("trust", "bundle", "--host", "web1")
    assert (code, "--host needs --host-root" in err) == (2, True)
    code, _out, err = run("trust", "bundle", "--host-root", place.ca_pem, "--host", "a b")
    assert (code, "not a host's name" in err) == (3, True)
    place.file("leaf.pem").write_bytes(
        place._pem(certified(desk, hostca.read_ca(place.provider.root, place.provider.key_pem, None)))
    )
    code, _out, err = run("trust", "bundle", "--host-root", place.leaf_pem)
    assert (code, "not a CA certificate" in err) == (3, True)
    code, out, _err = run("trust", "bundle")
    assert parse_bundle(out.encode()).aks == (desk.host.record.ak_public,)


def test_the_ca_of_the_documentation(run: Run, place: Place, desk: Desk) -> None:
    """`openssl` as docs/operations.md has it makes a CA that serves, and verifies what it issued."""
    text = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text()
    (command,) = re.findall(r"^(openssl req -x509 .*?)\n```", text, re.MULTILINE | re.DOTALL)
    argv = shlex.split(command.replace("\\\n", " "))
    made = subprocess.run(
        [*argv, "-passout", "pass:x"], cwd=place.folder, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    key = load_pem_private_key(place.file("host-ca.key").read_bytes(), b"x")
    place.file("ca.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    ca = str(place.file("host-ca.pem"))
    arguments = ("--ek-root", place.maker_pem, "--ca", ca, "-k", place.ca_key, "--name", "web1")
    assert good(run, "enroll", *arguments)["issuer"] == "CN=Example hosts"
    good(run, "show", "-o", place.shown_pem)
    verified = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", ca, place.shown_pem],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
