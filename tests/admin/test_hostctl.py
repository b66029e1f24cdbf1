"""hostctl's own refusals: in plain words, before the vault is asked."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from hostd.admin.hostctl import cli


@pytest.mark.parametrize(
    "argv",
    [["measure", "--vm"], ["vm", "unbind"], ["vm", "bind", "--"]],
    ids=lambda argv: " ".join(argv),
)
@pytest.mark.parametrize("wrong", ["nonsense", "", "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7a000"])
def test_what_is_no_uuid(argv: list[str], wrong: str) -> None:
    done = CliRunner().invoke(cli, [*argv, wrong, *(["acme"] if "bind" in argv else [])])
    assert done.exit_code == 2
    assert f"{wrong!r} is no VM's UUID; `hostctl vm list` shows them" in done.output
    assert "regex" not in done.output


@pytest.mark.parametrize("reason", ["", " "])
def test_drift_is_not_cleared_without_a_reason(reason: str) -> None:
    done = CliRunner().invoke(cli, ["drift", "clear", "files", "--reason", reason])
    assert done.exit_code == 2
    assert "say why it may go on" in done.output


def test_a_channel_ca_is_prepared_or_put_into_force() -> None:
    done = CliRunner().invoke(cli, ["channel", "rotate", "--prepare", "--commit"])
    assert done.exit_code == 2
    assert "not both" in done.output
