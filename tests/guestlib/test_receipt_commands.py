"""`hostd-guest receipt`: the steps on the screen, and exit codes that say who is to blame."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guestlib import receiptcommands
from guestlib.wire import messages
from tests.gateway.support_vault import SimulatedVault
from tests.guestlib.test_cli import run
from tests.vectors import receipts

__all__ = ["run"]
Run = Callable[..., subprocess.CompletedProcess[bytes]]
ROOT = Path(__file__).resolve().parents[2]
GOOD = json.loads((receipts.HERE / "receipt-good.json").read_text())
FALSE = json.loads((receipts.HERE / "receipt-false.json").read_text())


@pytest.fixture
def verify(tmp_path: Path) -> Run:
    """Verifies a case of the vectors, in a process that has no host."""

    def made(case: dict[str, str], *more: str) -> subprocess.CompletedProcess[bytes]:
        (tmp_path / "trust.json").write_text(json.dumps(GOOD["bundle"]))
        for name in ("document", "request", "answer"):
            if case[name] is not None:
                (tmp_path / name).write_text(case[name])
        command = ["--trust", "trust.json", *more, "receipt", "verify", "document"]
        for name in ("request", "answer"):
            if case[name] is not None:
                command += [f"--{name}", name]
        return subprocess.run(
            [sys.executable, "-m", "guestlib.cli", *command],
            cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    return made


def test_every_step_is_told(verify: Run) -> None:
    done = verify(GOOD["cases"][1])
    assert (done.returncode, done.stderr) == (0, b"")
    *steps, entry = done.stdout.decode().splitlines()
    assert [line.split(maxsplit=1) for line in steps] == [["ok", step] for step in GOOD["cases"][1]["steps"]]
    assert "Encrypt" in entry
    assert "released" in entry


def test_what_was_not_given_is_told(verify: Run) -> None:
    done = verify(next(case for case in GOOD["cases"] if case["answer"] is None))
    assert done.returncode == 0
    assert "not given 10 answer" in done.stdout.decode().splitlines()


@pytest.mark.parametrize("what", [case["what"] for case in FALSE["cases"]])
def test_the_step_that_refuses_is_told(verify: Run, what: str) -> None:
    (case,) = (case for case in FALSE["cases"] if case["what"] == what)
    done = verify(case)
    assert done.returncode == 6
    lines = done.stdout.decode().splitlines()
    assert lines[-1] == f"REFUSED   {case['refused']}"
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert len(lines) == int(case["refused"].split()[0])
    assert done.stderr.decode().startswith(f"error: verification: {case['refused']}: ")


def test_json(verify: Run) -> None:
    case = GOOD["cases"][1]
    done = json.loads(verify(case, "--json").stdout)
    assert done["checked"] == case["steps"]
    assert done["entry"]["op"] == "Encrypt"
    assert verify(FALSE["cases"][0], "--json").stdout == b""


def test_a_request_in_other_words_is_the_same_request(verify: Run) -> None:
    case = dict(GOOD["cases"][1])
    request = json.loads(case["request"])
    request["args"] = {"key": request["args"].pop("key"), "version": None, **request["args"]}
    case["request"] = json.dumps(request, indent=2)
    assert "ok        9 request" in verify(case).stdout.decode()


@pytest.mark.parametrize(
    ("name", "content"),
    [("request", "no"), ("request", "[]"), ("request", '{"op":1}'), ("request", '{"op":"A","args":[]}'),
     ("answer", '{"a":1,"a":2}'), ("answer", '"\\ud800"'),
     ("request", '{"op":"EncryptMany","args":{"items":[1]}}')],
)  # fmt: skip
def test_files_that_cannot_be_read_are_the_command_lines_fault(verify: Run, name: str, content: str) -> None:
    done = verify(dict(GOOD["cases"][1]) | {name: content})
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_a_receipt_is_saved_for_its_owner_alone(run: Run, vault: SimulatedVault, run_dir: Path) -> None:
    path = run_dir / "receipt"
    done = run("--receipt", str(path), "encrypt", "alias/a", "--aad", "b=1", data=b"hi")
    assert (done.returncode, done.stdout) == (0, b"CTih")
    assert path.read_bytes() == vault.document
    assert (run_dir / "receipt.request").read_bytes() == (
        b'{"args":{"aad":{"b":"1"},"key":"alias/a","plaintext":"aGk="},"op":"Encrypt"}'
    )
    assert (
        run_dir / "receipt.answer"
    ).read_bytes() == b'{"ciphertext":"Q1RpaA==","key":"alias/a","version":1}'
    for name in ("receipt", "receipt.request", "receipt.answer"):
        assert stat.S_IMODE((run_dir / name).stat().st_mode) == 0o600


def test_an_answer_is_given_whatever_becomes_of_its_receipt(
    run: Run, vault: SimulatedVault, run_dir: Path
) -> None:
    done = run("--receipt", "/nonexistent/receipt", "encrypt", "k", data=b"hi")
    assert (done.returncode, done.stdout) == (2, b"CTih")
    vault.document = b""
    path = run_dir / "receipt"
    done = run("--receipt", str(path), "encrypt", "k", data=b"hi")
    assert (done.returncode, done.stdout) == (0, b"CTih")
    assert f"receipt get {vault.calls} -o {path}" in done.stderr.decode()
    assert not path.exists()
    assert (run_dir / "receipt.request").read_bytes().endswith(b'"op":"Encrypt"}')
    assert run("--receipt", str(path), "file", "encrypt", "k", data=b"hi").returncode == 2


def test_get(run: Run, vault: SimulatedVault, run_dir: Path) -> None:
    assert run("receipt", "get", "7").stdout == vault.document + b"\n"
    assert run("receipt", "get", "7", "-o", str(run_dir / "r")).stdout == b""
    assert (run_dir / "r").read_bytes() == vault.document
    assert run("receipt", "get", "x").returncode == 2
    assert run("receipt", "get", "-1").returncode == 3


def test_list_shows_nothing_unverified(run: Run) -> None:
    done = run("receipt", "list")
    assert (done.returncode, done.stdout) == (6, b"")


def test_what_is_saved_is_for_this_user_alone(tmp_path: Path) -> None:
    """The answer holds what was decrypted: also where a file was that others could read."""
    asked = messages.Receipt(7, 1, document=b"{}", request=b"request", answer=b"plaintext")
    result = messages.Random(asked, b"")
    names = [tmp_path / f"r{end}" for end in ("", ".request", ".answer")]
    for name in names[1:]:
        name.write_bytes(b"older")
        name.chmod(0o644)
    receiptcommands.save(str(names[0]), result)
    assert [name.read_bytes() for name in names] == [b"{}", b"request", b"plaintext"]
    assert {stat.S_IMODE(name.stat().st_mode) for name in names} == {0o600}
    receiptcommands._write("/dev/null", b"not a file")
