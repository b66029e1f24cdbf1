"""Configuration: what is not understood is refused by name."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from hostd import config
from hostd.config import MAX_CONFIG_BYTES, Config, ConfigError, load_config, parse_config, uid_of
from hostd.core.findings import Kind


def parse(text: str) -> Config:
    return parse_config(text.encode(), origin="hostd.toml")


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith("hostd.toml: ")
    return str(caught.value)


def test_an_empty_file_is_the_defaults_and_they_check_everything() -> None:
    assert parse("") == Config()
    assert set(Config().measure.require) == {str(k) for k in Kind} - {"guests", "process"}
    assert 10 not in Config().tpm.pcrs
    assert not Config().hypervisor.allow_jit
    assert Config().drift.recovery == "officer"


@pytest.mark.parametrize("section", Config.__struct_fields__)
def test_an_unknown_key_is_named_with_its_section(section: str) -> None:
    message = refused(f"[{section}]\nno_such_key = 1")
    assert "no_such_key" in message
    assert f"$.{section}" in message


def test_an_unknown_section_is_named() -> None:
    assert "debug" in refused("[debug]\nskip = true")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[gate]\nbatch = 0", "$.gate.batch"),
        ("[gate]\nbatch = 1000001", "$.gate.batch"),
        ("[gate]\nbatch = true", "$.gate.batch"),
        ("[gate]\nbatch = 1.5", "$.gate.batch"),
        ('[gate]\nbatch = "8"', "$.gate.batch"),
        ("[gate]\nwaiting_per_caller = 0", "$.gate.waiting_per_caller"),
        ("[gate]\ndeadline_s = 0", "$.gate.deadline_s"),
        ("[gate]\ndeadline_s = -1.0", "$.gate.deadline_s"),
        ("[gate]\ndeadline_s = inf", "$.gate.deadline_s"),
        ("[measure]\ndeadline_s = nan", "$.measure.deadline_s"),
        ("[measure]\nsweep_s = inf", "$.measure.sweep_s"),
        ("[measure]\nrandom_s = 0", "$.measure.random_s"),
        ('[gate]\nfreeze = "sometimes"', "$.gate.freeze"),
        ('[measure]\nrequire = ["guests"]', "$.measure.require"),
        ('[measure]\nrequire = "ima"', "$.measure.require"),
        ('[measure]\nprotected = "/usr/"', "$.measure.protected"),
        ("[tpm]\npcrs = [24]", "$.tpm.pcrs"),
        ("[tpm]\npcrs = [-1]", "$.tpm.pcrs"),
        ("[tpm]\ndeadline_s = inf", "$.tpm.deadline_s"),
        ('[drift]\nrecovery = "auto"', "$.drift.recovery"),
        ('[drift]\nscope = "none"', "$.drift.scope"),
        ('[hypervisor]\nprovider = "guess"', "$.hypervisor.provider"),
        ("[hypervisor]\nallow_jit = 1", "$.hypervisor.allow_jit"),
        ("[gateway]\nvsock_port = 2147483648", "$.gateway.vsock_port"),
        ("[gateway]\nworkers = 0", "$.gateway.workers"),
        ("[metrics]\nport = 65536", "$.metrics.port"),
        ("[users]\nvault = -1", "$.users.vault"),
        ("[users]\nvault = 4294967295", "$.users.vault"),
        ("[users]\nadmin = [1.0]", "$.users.admin"),
        ("host = 1", "$.host"),
    ],
)
def test_a_wrong_type_or_a_value_out_of_bounds_is_named(text: str, place: str) -> None:
    assert f"`{place}" in refused(text)


def test_pcrs_that_would_lock_out_or_protect_nothing() -> None:
    assert "$.tpm.pcrs" in refused("[tpm]\npcrs = [0, 10]")
    assert "$.tpm.pcrs" in refused("[tpm]\npcrs = []")
    assert parse("[tpm]\npcrs = [0, 7]").tpm.pcrs == (0, 7)


def test_somebody_can_clear_a_drift() -> None:
    assert "$.users.admin" in refused("[users]\nadmin = []")


@pytest.mark.parametrize("text", ["[gate", "gate = ", "a = 1\na = 2", "\x00"])
def test_what_is_not_toml(text: str) -> None:
    refused(text)


def test_what_is_not_text() -> None:
    with pytest.raises(ConfigError, match=r"^x: "):
        parse_config(b"\xff\xfe", origin="x")
    with pytest.raises(ConfigError, match=r"^x: "):
        parse_config(b"a=" + b"[" * 100_000, origin="x")


def test_no_number_of_the_defaults_is_without_end() -> None:
    for section in msgspec.to_builtins(Config()).values():
        for value in section.values():
            assert not isinstance(value, float) or math.isfinite(value)


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "hostd.toml"
    with pytest.raises(ConfigError, match="No such file"):
        load_config(path)
    path.write_text("[gate]\nbatch = 7\n")
    assert load_config(path).gate.batch == 7
    path.write_text("[gate]\nbatches = 7\n")
    with pytest.raises(ConfigError, match=f"{path}: .*batches"):
        load_config(path)
    path.write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match=f"over {MAX_CONFIG_BYTES} bytes"):
        load_config(path)
    path.write_bytes(b"#" * MAX_CONFIG_BYTES)
    assert load_config(path) == Config()


def test_users() -> None:
    assert uid_of("") == os.geteuid()
    assert uid_of("root") == 0
    assert uid_of(12345) == 12345
    with pytest.raises(ConfigError, match="no-such-user"):
        uid_of("no-such-user")
    parsed = parse('[users]\nvault = 7\ngateway = 8\nmetrics = 9\nmeasurer = 10\nadmin = ["root", 5]')
    roles: tuple[Literal["vault", "gateway", "metrics", "measurer"], ...]
    roles = ("vault", "gateway", "metrics", "measurer")
    assert [parsed.uid_of(role) for role in roles] == [7, 8, 9, 10]
    assert parsed.admin_uids() == {0, 5}
    assert {Config().uid_of(role) for role in roles} == {os.geteuid()}


def test_paths() -> None:
    parsed = parse('[host]\nstate_dir = "/s"\nrun_dir = "/r"')
    assert (parsed.state, parsed.run) == (Path("/s"), Path("/r"))


def test_no_environment_variable_has_a_say() -> None:
    source = Path(config.__file__).read_text()
    assert "os.environ" not in source
    assert "getenv" not in source


ED = "AAAAC3NzaC1lZDI1NTE5AAAAI"
ALICE = f"ssh-ed25519 {ED}{'A' * 43} alice"
BOB = f"ssh-ed25519 {ED}{'B' * 43} bob"


def officers(*lines: str, more: str = "") -> str:
    return f"[officers]\nkeys = [{', '.join(repr(line) for line in lines)}]\n{more}"


def test_officers() -> None:
    parsed = parse(officers(ALICE, BOB, more="quorum = 2")).officers
    assert [key.name for key in parsed.public_keys] == ["alice", "bob"]
    assert parsed.quorum == 2
    for text, reason in (
        (officers("ssh-ed25519 x alice"), "not base64"),
        (officers(ALICE.removesuffix(" alice")), "type base64 name"),
        (officers(ALICE, ALICE.replace("alice", "other")), "alice and other are the same key"),
        (officers(ALICE, BOB.replace("bob", "alice")), "two keys of the name alice"),
        (officers(ALICE, more="quorum = 2"), "quorum` is 2, there are 1 keys"),
        (officers(ALICE, more="quorum = 0"), "quorum"),
        (officers(ALICE, more="quorums = 1"), "quorums"),
    ):
        assert reason in refused(text)


def test_somebody_must_be_able_to_sign() -> None:
    parse(officers(ALICE)).require_officers()
    with pytest.raises(ConfigError, match=r"hostd setup --officer FILE\.pub"):
        parse("").require_officers()


def test_the_quote_that_follows() -> None:
    assert Config().gate.tpm == "quote"
    assert parse('[gate]\ntpm = "read"').gate.follows_s == 10.0
    assert parse('[gate]\ntpm = "read"\nquote_every_s = 60').gate.follows_s == 60.0
    assert "quote_every_s" in refused("[gate]\nquote_every_s = 60")
    assert "gate.tpm" in refused('[gate]\ntpm = "none"')
    assert "quote_every_s" in refused('[gate]\ntpm = "read"\nquote_every_s = 0')
    assert "quote_every_s" in refused('[gate]\ntpm = "read"\nquote_every_s = 3601.0')
