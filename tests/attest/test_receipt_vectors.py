"""The vectors for other implementers hold, cover every step, and can be made again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guestlib.attest.bundle import parse_bundle
from guestlib.attest.receipt import ReceiptStep, verify_receipt
from guestlib.errors import VerificationError
from tests.vectors import receipts

FILES = sorted(receipts.HERE.glob("receipt-*.json"))
CASES = [(path.name, case["what"]) for path in FILES for case in json.loads(path.read_text())["cases"]]


def check(content: dict[str, Any], what: str) -> None:
    (case,) = (case for case in content["cases"] if case["what"] == what)
    bundle = parse_bundle(json.dumps(content["bundle"]).encode())
    request, answer = (None if case[name] is None else case[name].encode() for name in ("request", "answer"))
    document = case["document"].encode()
    if "refused" in case:
        with pytest.raises(VerificationError) as caught:
            verify_receipt(document, bundle=bundle, request=request, answer=answer)
        assert caught.value.step == case["refused"]
    else:
        verified = verify_receipt(document, bundle=bundle, request=request, answer=answer)
        assert [str(step) for step in verified.checked] == case["steps"]


@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_vector_holds(name: str, what: str) -> None:
    check(json.loads((receipts.HERE / name).read_text()), what)


def test_every_step_is_in_the_vectors() -> None:
    cases = [case for path in FILES for case in json.loads(path.read_text())["cases"]]
    assert {case.get("refused") for case in cases} - {None} == {str(step) for step in ReceiptStep}
    assert any(case.get("steps") == [str(step) for step in ReceiptStep] for case in cases)


def test_the_script_makes_files_that_say_the_same() -> None:
    made = receipts.make()
    assert sorted(made) == [path.name for path in FILES]
    for path in FILES:
        there = json.loads(path.read_text())
        for old, new in zip(there["cases"], made[path.name]["cases"], strict=True):
            for told in ("what", "request", "answer", "steps", "refused", "op"):
                assert old.get(told) == new.get(told)
