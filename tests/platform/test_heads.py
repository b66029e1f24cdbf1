"""The ledger's signed head: whoever changes the ledger while hostd is down is found out at the start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support_tpm import Embedded

from guestlib.attest.binding import pass_qualifying
from guestlib.attest.bundle import TrustBundle
from guestlib.attest.checkpoint import encode_checkpoint, parse_checkpoint, verify_checkpoint
from guestlib.attest.signedhead import SignedHead
from guestlib.errors import VerificationError
from hostd.platform.tpm import Tpm
from hostd.vault.heads import Heads, first_head
from hostd.vault.ledger import Entry, Ledger, LedgerError
from hostd.vault.tpmlink import Quoted

DIGEST = bytes(range(32))
ENTRIES = 12


def fill(path: Path, count: int = ENTRIES) -> Ledger:
    ledger = Ledger(path)
    for seq in range(count):
        ledger.append(Entry(seq=seq, time=1000 + seq, event="operation", outcome="released", op="Encrypt"))
    ledger.sync()
    return ledger


@pytest.fixture
def signed(tmp_path: Path, tpm: Tpm) -> Path:
    """A folder with a ledger and a head signed over all its entries."""
    ledger = fill(tmp_path / "ledger.jsonl")
    size, root = ledger.size, ledger.tree.root()
    quoted = Quoted(*tpm.quote_with_pcrs(pass_qualifying(7, DIGEST, size, root), (0, 10)))
    heads = Heads(tmp_path / "head.json")
    heads.note(size=size, root=root, passed=7, evidence_digest=DIGEST, quoted=quoted)
    ledger.close()
    return tmp_path


def check(folder: Path, ak_public: bytes) -> int:
    signed = Heads(folder / "head.json").load(ak_public)
    Ledger(folder / "ledger.jsonl", signed).close()
    return signed.size


def rewrite(folder: Path, lines: list[bytes]) -> None:
    """Puts other lines in place, numbered as a careful forger would."""
    numbered = []
    for seq, line in enumerate(lines):
        numbered.append(json.dumps({**json.loads(line), "seq": seq}, separators=(",", ":")).encode() + b"\n")
    (folder / "ledger.jsonl").write_bytes(b"".join(numbered))


def lines(folder: Path) -> list[bytes]:
    return (folder / "ledger.jsonl").read_bytes().splitlines()


def test_an_untouched_ledger_is_vouched_for(signed: Path, host: Embedded) -> None:
    assert check(signed, host.record.ak_public) == ENTRIES


def test_entries_after_the_head_are_fine(signed: Path, host: Embedded) -> None:
    ledger = Ledger(signed / "ledger.jsonl")
    ledger.append(Entry(seq=ENTRIES, time=1, event="start", outcome="done"))
    ledger.sync()
    ledger.close()
    assert check(signed, host.record.ak_public) == ENTRIES


def note_of(tpm: Tpm, host: Embedded, size: int, root: bytes, told: int) -> bytes:
    """A checkpoint of `size`, with a quote that the TPM made for a ledger of `told` entries."""
    quoted = Quoted(*tpm.quote_with_pcrs(pass_qualifying(7, DIGEST, told, root), (0, 10)))
    quote = quoted.quote
    head = SignedHead(told, root, 7, DIGEST, quote.attest, quote.signature, quoted.pcrs)
    made = encode_checkpoint(
        "hostd-ledger/x", head, host.record.ak_public, bytes(32), lambda _body: bytes(64)
    )
    return made.replace(b"\n%d\n" % told, b"\n%d\n" % size, 1)


def test_the_tpm_vouches_for_a_checkpoint(tpm: Tpm, host: Embedded, own_host: Embedded) -> None:
    """Without the ledger's own key: whoever pins the attestation key needs no other."""
    root = bytes(range(32))
    checkpoint = parse_checkpoint(note_of(tpm, host, 12, root, 12))
    trusting = TrustBundle(frozenset({"x"}), aks=(host.record.ak_public,))
    assert verify_checkpoint(checkpoint, trusting) == ("TPM quote",)
    with pytest.raises(VerificationError, match="another head"):
        verify_checkpoint(parse_checkpoint(note_of(tpm, host, 13, root, 12)), trusting)
    with pytest.raises(VerificationError, match="no key of the trust bundle"):
        verify_checkpoint(checkpoint, TrustBundle(frozenset({"x"}), aks=(own_host.record.ak_public,)))
    pinned = TrustBundle(frozenset({"x"}), aks=trusting.aks, pcrs=((0, frozenset({bytes(range(32))})),))
    with pytest.raises(VerificationError, match="PCR 0"):
        verify_checkpoint(checkpoint, pinned)
    # The quote of an attestation key that is known, altered.
    name, id_, quote = checkpoint.signatures[1]
    forged = replace(checkpoint, signatures=((name, id_, quote.replace(b'"pass":7', b'"pass":8')),))
    with pytest.raises(VerificationError):
        verify_checkpoint(forged, trusting)


def test_a_missing_head_is_refused(tmp_path: Path, host: Embedded) -> None:
    fill(tmp_path / "ledger.jsonl").close()
    with pytest.raises(LedgerError, match="the signed head is missing"):
        check(tmp_path, host.record.ak_public)


def test_setup_signs_the_empty_ledger(tmp_path: Path, tpm: Tpm, host: Embedded) -> None:
    first_head(tpm, tmp_path / "head.json", (0, 10))
    assert check(tmp_path, host.record.ak_public) == 0


@pytest.mark.parametrize("index", range(ENTRIES))
def test_an_edited_entry_is_found(signed: Path, host: Embedded, index: int) -> None:
    altered = lines(signed)
    altered[index] = altered[index].replace(b"released", b"failed")
    rewrite(signed, altered)
    with pytest.raises(LedgerError, match="not those that were signed"):
        check(signed, host.record.ak_public)


def test_swapped_entries_are_found(signed: Path, host: Embedded) -> None:
    altered = lines(signed)
    altered[3], altered[4] = altered[4], altered[3]
    rewrite(signed, altered)
    with pytest.raises(LedgerError, match="not those that were signed"):
        check(signed, host.record.ak_public)


@pytest.mark.parametrize("left", [0, 1, ENTRIES - 1])
def test_missing_entries_are_found(signed: Path, host: Embedded, left: int) -> None:
    rewrite(signed, lines(signed)[:left])
    with pytest.raises(LedgerError, match="entries are missing"):
        check(signed, host.record.ak_public)


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", ENTRIES - 1), ("passed", 8), ("root", "A" * 43 + "="), ("evidence_digest", "A" * 43 + "=")],
)
def test_an_altered_head_is_found(signed: Path, host: Embedded, field: str, value: object) -> None:
    path = signed / "head.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(LedgerError, match="not a head that this host's TPM signed"):
        check(signed, host.record.ak_public)


@pytest.mark.parametrize("text", ["", "{}", "[", '{"format":"hostd-head/2"}', "[" * 10000])
def test_a_head_that_does_not_parse_is_refused(signed: Path, host: Embedded, text: str) -> None:
    (signed / "head.json").write_text(text)
    with pytest.raises(LedgerError, match="not a head"):
        check(signed, host.record.ak_public)


def test_another_hosts_head_is_refused(signed: Path, own_host: Embedded) -> None:
    with pytest.raises(LedgerError, match="not a head that this host's TPM signed"):
        check(signed, own_host.record.ak_public)


def test_heads_are_saved_at_intervals_and_at_the_end(tmp_path: Path, tpm: Tpm, host: Embedded) -> None:
    ledger = fill(tmp_path / "ledger.jsonl")
    heads = Heads(tmp_path / "head.json")
    for size in (3, 5):
        root = ledger.tree.root(size)
        quoted = Quoted(*tpm.quote_with_pcrs(pass_qualifying(size, DIGEST, size, root), (0, 10)))
        heads.note(size=size, root=root, passed=size, evidence_digest=DIGEST, quoted=quoted)
    assert heads.load(host.record.ak_public) == (3, ledger.tree.root(3))
    heads.save()
    assert heads.load(host.record.ak_public) == (5, ledger.tree.root(5))
    ledger.close()
