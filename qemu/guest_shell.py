"""Runs in a guest: evaluates Python sent to it, with one hostd client that stays connected.

Each line of input is JSON, ``{"code": ...}``: an expression, or ``name = expression``. Each answer is a
line of JSON: ``ok``, ``ms`` (of the evaluation), ``shown`` (the value's repr, or the error), ``code`` (of a
HostdError), ``pass`` and ``ledger`` (of the answer's receipt, or of the refusal).

    python3 guest_shell.py TRUST.json
"""

from __future__ import annotations

import datetime
import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from guestlib import errors
from guestlib.attest.bundle import TrustBundle, parse_bundle
from guestlib.attest.steps import Step
from guestlib.attest.verifier import verify_channel, verify_evidence
from guestlib.client import Client
from guestlib.trust import Trust


def check_evidence(client: Client, bundle: TrustBundle) -> dict[str, Any]:
    """Fresh evidence, verified here; what each step rested on.

    Raises:
        VerificationError: it does not hold; the error names the step.
    """
    nonce = secrets.token_bytes(32)
    document, log = client.evidence(nonce)
    now = datetime.datetime.now(datetime.UTC)
    verified = verify_evidence(document, log, bundle=bundle, nonce=nonce, now=now)
    verify_channel(verified, client.peer_certificate(), now)
    statement, quote = verified.statement, verified.quote
    seen = {
        Step.FORMAT: f"{len(document)} bytes, canonical",
        Step.NONCE: nonce.hex()[:16] + "…",
        Step.KEY: verified.key_trust,
        Step.ENDORSEMENT: "certified" if bundle.ek_roots else "not asked for: the bundle names no makers",
        Step.SIGNATURE: "by that key, over a TPM structure",
        Step.QUALIFYING: "the quote is for this statement and nonce",
        Step.DIGEST: f"{len(quote.pcrs)} PCRs",
        Step.PCRS: f"{len(bundle.pcrs)} as pinned: {', '.join(str(index) for index, _ in bundle.pcrs)}",
        Step.IMA: f"{len(verified.ima_entries)} entries lead to the quoted PCR 10",
        Step.FRESHNESS: f"issued {statement.issued:%H:%M:%S} UTC",
        Step.REFERENCE: (statement.reference or b"").hex()[:16] + "…",
        Step.CLAIMS: ", ".join(f"{name} {statement.claims[name]}" for name in sorted(bundle.require)),
        Step.CHANNEL_CA: "the pinned one",
        Step.CHANNEL: "this connection's certificate was issued by it",
    }
    return {
        "steps": [[str(step), seen[step]] for step in Step],
        "ima_entries": len(verified.ima_entries),
        "pcrs": len(quote.pcrs),
        "digest": verified.digest.hex(),
    }


def _evaluate(code: str, names: dict[str, Any]) -> Any:
    name, assigned, expression = code.partition(" = ")
    if not (assigned and name.isidentifier()):
        name, expression = "_", code
    names[name] = eval(expression, names)
    return names[name]


def main() -> None:
    """Serve until the input ends."""
    bundle = parse_bundle(Path(sys.argv[1]).read_bytes())
    client = Client(Trust.attested(bundle), timeout_s=60.0)
    names = {"client": client, "bundle": bundle, "check_evidence": check_evidence, "errors": errors}
    for line in sys.stdin:
        answer: dict[str, Any] = {"pass": None, "ledger": None, "code": ""}
        start = time.monotonic()
        try:
            value = _evaluate(json.loads(line)["code"], names)
            answer["ok"], answer["shown"] = True, repr(value)
            answer["value"] = value if isinstance(value, dict | str | int) else None
            receipt = getattr(value, "receipt", None)
            if receipt is not None:
                answer["pass"], answer["ledger"] = receipt.passed, receipt.ledger
        except errors.HostdError as error:
            answer.update(ok=False, shown=str(error), code=error.code, ledger=error.ledger)
        answer["ms"] = round((time.monotonic() - start) * 1000, 1)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
