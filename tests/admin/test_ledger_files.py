"""Exports, archives and state directories, verified by somebody who has only a trust bundle; and attacked."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from guestlib.attest.bundle import encode_bundle
from guestlib.attest.checkpoint import parse_checkpoint
from guestlib.attest.merkle import leaf_hash
from guestlib.errors import (
    ConflictError,
    HostdError,
    MalformedError,
    NotFoundError,
    VerificationError,
    WrongStateError,
)
from hostd.admin import ledger_read, ledger_write
from hostd.admin.hostctl import cli
from hostd.admin.ledger_read import TILE, split_bundle, tile_name, tile_path, verify
from hostd.core.entry import Entry, LedgerError
from hostd.ipc import operating as adm
from hostd.platform.segments import closed_segments, folder_of
from hostd.vault import ledgerdesk
from tests.support.ledgers import Desk, quick_folder
from tests.support.merkletree import Tree

Change = Callable[[list[bytes]], list[bytes]]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "state").mkdir()
    made = Desk(tmp_path / "state")
    made.fill(70)
    yield made
    made.close()


def fine(folder: Path, desk: Desk) -> ledger_read.Verified:
    found = verify(folder, desk.bundle)
    assert found.problem == ""
    assert found.vouched == (desk.checkpoints.origin,)
    return found


# ── The three kinds ───────────────────────────────────────────────────────────────────────────────


def test_a_state_directory(desk: Desk) -> None:
    found = fine(desk.folder, desk)
    assert (found.kind, found.first, found.entries) == ("state", 0, desk.ledger.durable)
    assert found.root == desk.ledger.tree.root()
    assert found.later == 0
    desk.fill(130, sign=False)
    found = fine(desk.folder, desk)
    assert found.entries < desk.ledger.size, "as far as the checkpoint goes"
    assert found.later == desk.ledger.size - found.entries, "and what it does not cover is counted"
    with desk.path.open("ab") as file:
        file.write(b"torn, so never acknowledged")
    assert fine(desk.folder, desk).later == found.later


def test_what_stands_behind_an_archive_is_counted(desk: Desk, tmp_path: Path) -> None:
    place = tmp_path / "archive"
    _, end = ledger_write.archive(desk.ask, place, 1)
    assert fine(place, desk).later == 0
    with closed_segments(place)[-1].path.open("ab") as file:
        file.write(b'{"seq":%d,"event":"operation"}\n' % end)
    assert (fine(place, desk).entries, fine(place, desk).later) == (end, 1)


def test_an_export(desk: Desk, tmp_path: Path) -> None:
    desk.fill(600)
    count = ledger_write.export(desk.ask, tmp_path / "out", None, 0)
    found = fine(tmp_path / "out", desk)
    assert (found.kind, found.entries) == ("export", count)
    # By the words of C2SP tlog-tiles.
    tiles = tmp_path / "out" / "tile"
    lines = desk.ledger.stretch(0, count)
    hashes = [leaf_hash(line) for line in lines]
    width = count % 256
    assert (tiles / "0" / "000").read_bytes() == b"".join(hashes[:256])
    assert (tiles / "0" / "002.p" / str(width)).read_bytes() == b"".join(hashes[512:])
    subtrees = []
    for start in (0, 256):
        tree = Tree()
        for one in hashes[start : start + 256]:
            tree.append(one)
        subtrees.append(tree.root())
    assert (tiles / "1" / "000.p" / "2").read_bytes() == b"".join(subtrees)
    assert split_bundle((tiles / "entries" / "001").read_bytes()) == lines[256:512]
    files = {str(path.relative_to(tiles)) for path in tiles.rglob("*") if path.is_file()}
    partial = {f"0/002.p/{width}", "1/000.p/2", f"entries/002.p/{width}"}
    assert files == {"0/000", "0/001", "entries/000", "entries/001"} | partial


@pytest.mark.parametrize("size", [1, 255, 256, 257, 512])
def test_exports_of_whole_tiles(tmp_path: Path, size: int) -> None:
    (tmp_path / "s").mkdir()
    desk = Desk(tmp_path / "s", entries=10_000)
    desk.fill(size)
    assert ledger_write.export(desk.ask, tmp_path / "out", None, 0) == size
    assert fine(tmp_path / "out", desk).entries == size
    desk.close()


def test_tile_paths() -> None:
    assert tile_path(1234067) == "x001/x234/067"
    assert tile_path(0) == "000"
    assert tile_path(999) == "999"
    assert tile_path(1000) == "x001/000"
    assert tile_name(273, 112) == "273.p/112"
    assert tile_name(273, TILE) == "273"


def test_archives_one_after_the_other(desk: Desk, tmp_path: Path) -> None:
    place, lines = tmp_path / "archive", desk.ledger.stretch(0, 999)
    first, end = ledger_write.archive(desk.ask, place, 1)
    assert (first, end) == (0, desk.ledger.first)
    assert len(desk.ledger.closed) == 1
    found = fine(place, desk)
    assert (found.kind, found.entries) == ("archive", end)
    (said,) = desk.ledger.entries(desk.ledger.size - 1, 1)
    assert (said.event, said.op, said.principal) == ("archive", str(end), 'Officer::"uid:0"')
    desk.restart()
    desk.fill(150)
    before = fine(place, desk).entries
    assert ledger_write.archive(desk.ask, place, 0)[0] == before
    assert fine(place, desk).entries == desk.ledger.first == desk.ledger.open_first
    assert [line for some in ledger_read.archived_lines(place, end) for line in some] == lines[:end]
    # What stays is verified as well, and tells that something is not here.
    desk.sign()
    left = fine(desk.folder, desk)
    assert left.first == desk.ledger.first > 0
    # All of it together.
    older = ledger_read.archived_lines(place, desk.ledger.first)
    count = ledger_write.export(desk.ask, tmp_path / "out", older, desk.ledger.first)
    assert fine(tmp_path / "out", desk).entries == count == desk.ledger.durable


def test_an_archive_that_was_not_finished(desk: Desk, tmp_path: Path) -> None:
    """The vault removes nothing before the copy is whole, and what was copied is not lost when it refuses."""
    place = tmp_path / "archive"

    def refusing(command: adm.LedgerCommand, result: type) -> object:
        if isinstance(command, adm.DropSegments):
            raise ConflictError("not now")
        return desk.ask(command, result)

    with pytest.raises(ConflictError, match="not now"):
        ledger_write.archive(refusing, place, 1)
    assert desk.ledger.first == 0
    with pytest.raises(WrongStateError, match="no closed segment"):
        ledger_write.archive(desk.ask, place, 1)
    assert fine(place, desk).entries == desk.ledger.first > 0


@pytest.mark.parametrize("lost", ["removed", "edited", "cut"])
def test_a_copy_that_was_lost_meanwhile_is_not_taken_for_one(desk: Desk, tmp_path: Path, lost: str) -> None:
    """`archive.json` says that the entries are there: the vault removes its own only if they are."""
    place, segments = tmp_path / "archive", len(desk.ledger.closed)

    def refusing(command: adm.LedgerCommand, result: type) -> object:
        if isinstance(command, adm.DropSegments):
            raise ConflictError("not now")
        return desk.ask(command, result)

    with pytest.raises(ConflictError, match="not now"):
        ledger_write.archive(refusing, place, 1)
    copy = closed_segments(place)[0].path
    data = copy.read_bytes()
    if lost == "removed":
        copy.unlink()
    else:
        copy.write_bytes(data[:-20] if lost == "cut" else data.replace(b'"released"', b'"relaesed"', 1))
    with pytest.raises(LedgerError, match=r"nothing was removed|are missing"):
        ledger_write.archive(desk.ask, place, 1)
    assert (desk.ledger.first, len(desk.ledger.closed)) == (0, segments)


def test_an_archive_is_nobody_elses_to_read(desk: Desk, tmp_path: Path) -> None:
    place = tmp_path / "archive"
    place.mkdir(mode=0o755)
    before = os.umask(0o022)
    try:
        ledger_write.archive(desk.ask, place, 1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o007 for path in place.iterdir() if path.name != "checkpoint"}
    assert {name: mode for name, mode in modes.items() if name != "archive.json"} == dict.fromkeys(
        ["hashes-0", *(path.name for _, path in closed_segments(place))], 0
    )


@pytest.mark.parametrize("entries", [70, 256])
@pytest.mark.parametrize("junk", [b"\0", b"\xff\xff and no such length", b"\0\x02{}"])
def test_an_export_has_nothing_behind_its_last_entry(tmp_path: Path, junk: bytes, entries: int) -> None:
    (tmp_path / "s").mkdir()
    desk = Desk(tmp_path / "s", entries=10_000)
    desk.fill(entries)
    ledger_write.export(desk.ask, tmp_path / "out", None, 0)
    (bundle,) = [path for path in (tmp_path / "out" / "tile" / "entries").rglob("*") if path.is_file()]
    bundle.write_bytes(bundle.read_bytes() + junk)
    assert verify(tmp_path / "out", desk.bundle).problem.endswith(
        f"something stands after entry {entries - 1}"
    )
    desk.close()


def test_an_archive_is_of_one_ledger(desk: Desk, tmp_path: Path) -> None:
    ledger_write.archive(desk.ask, tmp_path / "one", 2)
    with pytest.raises(ConflictError, match="has the first 0 entries"):
        ledger_write.archive(desk.ask, tmp_path / "two", 1)


def test_what_is_not_archived_is_not_removed(desk: Desk) -> None:
    end = desk.ledger.closed[1].first
    with pytest.raises(ConflictError, match="not of this ledger"):
        desk.ask(adm.DropSegments(end, bytes(32)))
    with pytest.raises(ConflictError, match="no closed segment ends"):
        desk.ask(adm.DropSegments(end - 1, desk.ledger.tree.root(end - 1)))
    assert desk.ledger.first == 0


def test_an_open_drift_is_not_archived(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    desk = Desk(tmp_path / "s")
    desk.ledger.append(Entry(0, 1, "drift", "refused", op="kernel"))
    desk.fill(70)
    with pytest.raises(ConflictError, match="entry 0 is of a drift that is not cleared"):
        ledger_write.archive(desk.ask, tmp_path / "archive", 1)
    assert desk.ledger.first == 0
    desk.close()


def test_an_export_goes_to_an_empty_folder(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(ConflictError, match="not empty"):
        ledger_write.export(desk.ask, tmp_path / "out", None, 0)


def test_an_export_of_entries_that_were_not_signed(desk: Desk, tmp_path: Path) -> None:
    """Whatever the vault sends is hashed here."""

    def lying(command: adm.LedgerCommand, result: type) -> object:
        answer = desk.ask(command, result)
        if isinstance(answer, adm.LedgerPage):
            lines = (answer.lines[0].replace(b"released", b"withheld"), *answer.lines[1:])
            return msgspec.structs.replace(answer, lines=lines)
        return answer

    with pytest.raises(LedgerError, match="do not lead to the checkpoint's root"):
        ledger_write.export(lying, tmp_path / "out", None, 0)
    assert not (tmp_path / "out" / "checkpoint").exists()
    with pytest.raises(LedgerError, match="nothing was removed"):
        ledger_write.archive(lying, tmp_path / "archive", 1)
    assert desk.ledger.first == 0


# ── Attacks ───────────────────────────────────────────────────────────────────────────────────────

AT = 33


def edited(lines: list[bytes]) -> list[bytes]:
    return [*lines[:AT], lines[AT].replace(b'"outcome":"', b'"outcome":"x'), *lines[AT + 1 :]]


def deleted(lines: list[bytes]) -> list[bytes]:
    return lines[:AT] + lines[AT + 1 :]


def many_deleted(lines: list[bytes]) -> list[bytes]:
    return lines[:AT] + lines[AT + 4 :]


def inserted(lines: list[bytes]) -> list[bytes]:
    return [*lines[:AT], b'{"seq":33,"time":1,"event":"operation","outcome":"released"}\n', *lines[AT:]]


def reordered(lines: list[bytes]) -> list[bytes]:
    return [*lines[:AT], lines[AT + 1], lines[AT], *lines[AT + 2 :]]


def repeated(lines: list[bytes]) -> list[bytes]:
    return [*lines[:AT], lines[2], *lines[AT + 1 :]]


def truncated(lines: list[bytes]) -> list[bytes]:
    return lines[:AT]


SAID = {
    edited: "entry 33 was edited",
    deleted: "entry 33 is missing",
    many_deleted: "entries 33 to 36 are missing",
    inserted: "1 line inserted before entry 33",
    reordered: "entries 33 and 34 are out of order",
    repeated: "entry 2 stands in the place of entry 33",
}


def put(desk: Desk, change: Change) -> None:
    """Changes the ledger's lines and leaves the segments where they were cut."""
    files = [segment.path for segment in closed_segments(folder_of(desk.path))] + [desk.path]
    counts = [path.read_bytes().count(b"\n") for path in files]
    lines = change([line for path in files for line in path.read_bytes().splitlines(keepends=True)])
    for path, count in zip(files, counts, strict=True):
        path.write_bytes(b"".join(lines[:count]))
        lines = lines[count:]
    with desk.path.open("ab") as file:
        file.write(b"".join(lines))


@pytest.mark.parametrize("change", SAID)
def test_a_running_vault_names_the_place(desk: Desk, change: Change) -> None:
    assert desk.ask(adm.VerifyLedger()) == adm.LedgerVerified(
        0, desk.ledger.durable, desk.ledger.tree.root().hex(), ""
    )
    put(desk, change)
    said = desk.ask(adm.VerifyLedger())
    assert isinstance(said, adm.LedgerVerified)
    first = max(s.first for s in closed_segments(folder_of(desk.path)) if s.first <= AT)
    assert said.problem == f"{first:012d}.jsonl line {AT - first + 1}: {SAID[change]}"
    with pytest.raises(LedgerError, match=r"is not entry 3[0-9] as it was recorded"):
        desk.ledger.stretch(30, 10)
    problems: list[str] = []
    desk.desk.sweep(problems.append)
    while not problems:
        desk.loop.run_once(1.0)
    assert SAID[change] in problems[0]


def test_a_closed_segment_edited_while_it_was_stopped(desk: Desk) -> None:
    """The start does not read it; what follows the start does, and nobody is shown it meanwhile."""
    put(desk, edited)
    desk.restart()
    with pytest.raises(LedgerError, match="is not entry 33 as it was recorded"):
        desk.ask(adm.ListLedger(33, 1))
    problems: list[str] = []
    desk.desk.sweep(problems.append)
    while not problems:
        desk.loop.run_once(1.0)
    assert problems == [f"the ledger is not what was recorded: {problems[0].partition(': ')[2]}"]
    assert problems[0].endswith(": entry 33 was edited")


@pytest.mark.parametrize("change", SAID)
def test_an_auditor_names_the_place(desk: Desk, change: Change, tmp_path: Path) -> None:
    desk.fill(300)
    desk.restart()  # all hashes are in their files
    ledger_write.export(desk.ask, tmp_path / "export", None, 0)
    state = tmp_path / "copy"
    shutil.copytree(desk.folder, state)
    ledger_write.archive(desk.ask, tmp_path / "archive", 1)
    put(PathsOf(state), change)
    found = verify(state, desk.bundle)
    assert found.problem.endswith(SAID[change])
    files = [segment.path for segment in closed_segments(tmp_path / "archive")]
    text = b"".join(change([line for path in files for line in path.read_bytes().splitlines(keepends=True)]))
    for path in files:
        path.write_bytes(b"")
    files[0].write_bytes(text)
    assert verify(tmp_path / "archive", desk.bundle).problem.endswith(SAID[change])
    bundle = tmp_path / "export" / "tile" / "entries" / "000"
    lines = change([body + b"\n" for body in split_bundle(bundle.read_bytes())])
    bundle.write_bytes(b"".join((len(line) - 1).to_bytes(2, "big") + line[:-1] for line in lines))
    said = verify(tmp_path / "export", desk.bundle).problem
    assert said == f"tile/entries/000 entry 33: {SAID[change]}"


class PathsOf:
    """Only the paths of a copy."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.jsonl"


def test_the_end_is_cut_off(desk: Desk) -> None:
    desk.restart()
    size = desk.sign().size
    path = desk.path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    assert verify(desk.folder, desk.bundle).problem.endswith(
        f"entries {size - 2} to {size - 1} are missing at the end"
    )
    said = desk.ask(adm.VerifyLedger())
    assert isinstance(said, adm.LedgerVerified)
    assert said.problem.endswith(f"entries {size - 2} to {size - 1} are missing at the end")


def test_segments_are_exchanged(desk: Desk) -> None:
    desk.restart()
    one, other = (segment.path for segment in desk.ledger.closed[1:3])
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    start = desk.ledger.closed[1].first
    said = desk.ask(adm.VerifyLedger())
    assert isinstance(said, adm.LedgerVerified)
    assert said.problem.startswith(f"{start:012d}.jsonl line 1: ")
    assert verify(desk.folder, desk.bundle).problem.startswith(f"{start:012d}.jsonl line 1: ")
    with pytest.raises(LedgerError, match=f"does not begin with entry {start}"):
        desk.restart()


def test_a_segment_is_gone(desk: Desk) -> None:
    desk.restart()
    start, path = desk.ledger.closed[1]
    path.unlink()
    said = desk.ask(adm.VerifyLedger())
    assert isinstance(said, adm.LedgerVerified)
    assert "No such file" in said.problem
    found = verify(desk.folder, desk.bundle)
    assert f"entries {start} to" in found.problem
    with pytest.raises(LedgerError, match="a segment is missing or was replaced"):
        desk.restart()


def test_hashes_and_entries_are_both_changed(desk: Desk) -> None:
    """Then nobody can tell which entry it was; that it was, and where it is looked for, is told."""
    desk.restart()
    put(desk, edited)
    hashes = folder_of(desk.path) / "hashes-0"
    data = bytearray(hashes.read_bytes())
    lines = b"".join(s.path.read_bytes() for s in closed_segments(folder_of(desk.path))).splitlines()
    data[AT * 32 : AT * 32 + 32] = leaf_hash(lines[AT])
    hashes.write_bytes(data)
    found = verify(desk.folder, desk.bundle)
    assert "do not lead to the signed root; which was edited cannot be told" in found.problem
    said = desk.ask(adm.VerifyLedger())
    assert isinstance(said, adm.LedgerVerified)
    assert "are not those that were recorded, nor are their hashes" in said.problem


def test_the_checkpoint_is_another(desk: Desk, tmp_path: Path) -> None:
    path = desk.folder / "checkpoint"
    note = path.read_bytes()
    for text in (b"", b"x", note[:-5], note.replace(b"\n7", b"\n6", 1), note.replace(b"hostd", b"other")):
        path.write_bytes(text)
        with pytest.raises(HostdError):
            verify(desk.folder, desk.bundle)
    (tmp_path / "other").mkdir()
    other = Desk(tmp_path / "other")
    other.fill(70)
    path.write_bytes((other.folder / "checkpoint").read_bytes())
    with pytest.raises(VerificationError, match="no key of the trust bundle"):
        verify(desk.folder, desk.bundle)
    # Somebody else's checkpoint, trusted too: the entries are not its.
    both = replace(desk.bundle, ledger=(*desk.bundle.ledger, *other.bundle.ledger))
    other.close()
    path.write_bytes(note)
    assert verify(desk.folder, both).problem == ""


def test_an_archives_description_is_another(desk: Desk, tmp_path: Path) -> None:
    place = tmp_path / "archive"
    ledger_write.archive(desk.ask, place, 1)
    path = place / "archive.json"
    said = json.loads(path.read_bytes())
    for change in ({"end": said["end"] - 1}, {"root": "A" * 43 + "="}, {"format": "x"}, {"consistency": []}):
        path.write_text(json.dumps({**said, **change}))
        with pytest.raises(HostdError):
            verify(place, desk.bundle)
    path.write_text("[")
    with pytest.raises(HostdError):
        verify(place, desk.bundle)


def test_it_is_none(tmp_path: Path, desk: Desk) -> None:
    with pytest.raises(NotFoundError, match="no export, archive or state directory"):
        verify(tmp_path, desk.bundle)


@pytest.mark.parametrize("seed", range(60))
def test_any_byte_of_any_file(desk: Desk, tmp_path: Path, seed: int) -> None:
    """One byte flipped, cut off or added: either a finding, or it was in a file that nothing rests on."""
    chance = random.Random(seed)
    ledger_write.export(desk.ask, tmp_path / "export", None, 0)
    ledger_write.archive(desk.ask, tmp_path / "archive", 1)
    folder = tmp_path / chance.choice(("export", "archive"))
    path = chance.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data))
    match chance.randrange(3):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data.insert(at, chance.randrange(256))
    path.write_bytes(data)
    derived = "hashes" in path.name or path.parent.parent.name in ("0", "1") or path.parent.name in ("0", "1")
    try:
        found = verify(folder, desk.bundle)
    except HostdError:
        assert not derived
        return
    # The quote's line in the checkpoint is nobody's that the bundle knows.
    assert bool(found.problem) != (derived or path.name in ("checkpoint", "archive.json"))


# ── Proofs as documents, and the commands ─────────────────────────────────────────────────────────


def proof_of(desk: Desk, index: int) -> dict[str, object]:
    found = desk.ask(adm.ProveLedger(index))
    assert isinstance(found, adm.LedgerProof)
    proof = ledger_read.Proof(found.index, found.line.decode(), found.proof, found.checkpoint.decode())
    document: dict[str, object] = json.loads(msgspec.json.encode(proof))
    return document


@pytest.mark.parametrize("index", [0, 1, 33, 69])
def test_a_proof_holds_anywhere(desk: Desk, index: int) -> None:
    document = proof_of(desk, index)
    assert ledger_read.verify_proof(document, desk.bundle) == (desk.checkpoints.origin,)
    line = str(document["line"])
    path = document["proof"]
    assert isinstance(path, list)
    for change in (
        {"index": index + 1},
        {"line": line.replace("outcome", "Outcome")},
        {"proof": path[1:]},
        {"proof": [path[-1], *path[1:]]},
        {"proof": [*path, path[0]]},
        {"checkpoint": str(document["checkpoint"]).replace("\n7", "\n8", 1)},
        {"format": 3},
        {"more": 1},
    ):
        with pytest.raises(HostdError):
            ledger_read.verify_proof({**document, **change}, desk.bundle)


def test_what_cannot_be_proved(desk: Desk) -> None:
    size = desk.ledger.durable
    desk.fill(size + 5, sign=False)
    with pytest.raises(HostdError, match="not under a signed head yet"):
        desk.ask(adm.ProveLedger(size))
    with pytest.raises(NotFoundError, match="there is no entry"):
        desk.ask(adm.ProveLedger(5000))
    for old, new in ((5000, 0), (9, 8), (3, 5000)):
        with pytest.raises(NotFoundError, match="no two sizes"):
            desk.ask(adm.LedgerConsistency(old, new))
    desk.keyring.lock()
    with pytest.raises(HostdError, match="locked"):
        desk.ask(adm.LedgerCheckpoint())


def test_offline_from_the_command_line(desk: Desk, tmp_path: Path) -> None:
    trust, proof = tmp_path / "trust.json", tmp_path / "proof.json"
    bundle = json.loads(encode_bundle(replace(desk.bundle, channel_cas=(), aks=(b"x",))))
    trust.write_text(json.dumps(bundle))
    proof.write_text(json.dumps(proof_of(desk, 4)))
    run = CliRunner()
    verified = ["ledger", "verify", "--dir", str(desk.folder), "--trust", str(trust)]
    said = run.invoke(cli, verified)
    assert (said.exit_code, "lead to the signed root; signed by" in said.output) == (0, True), said.output
    desk.fill(75, sign=False)
    said = run.invoke(cli, verified)
    assert "root (and 5 after them that no signature here covers); signed by" in said.output
    said = run.invoke(cli, ["ledger", "prove", "--check", str(proof), "--trust", str(trust)])
    assert (said.exit_code, "entry 4 is in the ledger" in said.output) == (0, True), said.output
    put(desk, edited)
    said = run.invoke(cli, verified)
    assert said.exit_code == 4
    assert run.invoke(cli, verified[:4]).exit_code == 2
    assert run.invoke(cli, ["ledger", "prove", "--check", str(proof)]).exit_code == 2
    for text in (b"", b"no", b'"\xff"', b'{"line": "\\ud800"}'):
        proof.write_bytes(text)
        said = run.invoke(cli, ["ledger", "prove", "--check", str(proof), "--trust", str(trust)])
        assert isinstance(said.exception, MalformedError), text
    assert run.invoke(cli, ["ledger", "prove"]).exit_code == 2


def test_a_long_ledger_is_verified_between_other_things(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgerdesk, "SLICE_S", 0.0)
    turns: list[int] = []
    desk.loop.every(0.0001, lambda: turns.append(1))
    said = desk.ask(adm.VerifyLedger())
    assert isinstance(said, adm.LedgerVerified)
    assert said.problem == ""
    assert len(turns) >= len(desk.ledger.closed), "a chunk of a segment a turn"


def test_entries_that_are_appended_meanwhile(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also so many that the open segment is closed."""
    monkeypatch.setattr(ledgerdesk, "SLICE_S", 0.0)

    def append() -> None:
        if desk.ledger.size < 200:
            desk.fill(desk.ledger.size + 7)

    desk.loop.every(0.0001, append)
    said = desk.ask(adm.VerifyLedger())
    assert isinstance(said, adm.LedgerVerified)
    assert said.problem == ""
    assert said.entries > 80


def test_segments_that_are_archived_meanwhile(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing goes on with what is left."""
    monkeypatch.setattr(ledgerdesk, "SLICE_S", 0.0)
    said: list[object] = []
    desk.desk.answer(adm.VerifyLedger(), "", said.append)
    desk.loop.run_once(1.0)
    ledger_write.archive(desk.ask, tmp_path / "archive", 0)
    assert not said, "it had not come to its end"
    while not said:
        desk.loop.run_once(1.0)
    (found,) = said
    assert isinstance(found, adm.LedgerVerified)
    assert (found.problem, found.first) == ("", desk.ledger.first)


def test_a_page_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adm, "MAX_PAGE_BYTES", 500)
    desk.fill(700)
    page = desk.ask(adm.ListLedger(3, 1000))
    assert isinstance(page, adm.LedgerPage)
    assert page.start == 3
    assert len(page.lines) == ledgerdesk.BLOCK
    pages = ledger_write.pages(desk.ask, 0, 700)
    assert [line for some in pages for line in some] == desk.ledger.stretch(0, 700)
    last = desk.ask(adm.ListLedger(0, 5, "last"))
    assert isinstance(last, adm.LedgerPage)
    assert list(last.lines) == desk.ledger.stretch(last.size - 5, 5)


def audit(folder: Path, key: str) -> tuple[int, str]:
    """The program that docs/ledger.md shows, as it stands there: exit code, what it says."""
    page = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    command = [sys.executable, "-c", program, str(folder), key]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_the_program_for_auditors(desk: Desk, tmp_path: Path) -> None:
    desk.fill(900)
    count = ledger_write.export(desk.ask, tmp_path / "out", None, 0)

    def run(key: str = str(desk.checkpoints.key())) -> tuple[int, str]:
        return audit(tmp_path / "out", key)

    assert run() == (0, f"{count} entries lead to the signed root\n")
    assert run("x+" + str(desk.checkpoints.key()).partition("+")[2])[0] == 1
    bundle = tmp_path / "out" / "tile" / "entries" / "001"
    text = bundle.read_bytes()
    bundle.write_bytes(text.replace(b"released", b"withheld", 1))
    status, said = run()
    assert (status, "not the entries that were signed" in said) == (1, True)
    bundle.write_bytes(text)
    note = tmp_path / "out" / "checkpoint"
    note.write_bytes(note.read_bytes().replace(b"\n9", b"\n8", 1))
    status, said = run()
    assert (status, "InvalidSignature" in said) == (1, True)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        # Passes with how many entries follow; `.`: an entry of the latest pass, `x`: of none; `s`: a start.
        ("s 1:2 . . x 2:1 . 4:2 . s 1:1 .", ""),
        ("s 1:2 . . 1:1 .", "pass 1 is out of turn"),
        ("s 2:1 . 1:1 .", "pass 1 is out of turn"),
        ("s 1:2 . 2:1 .", "pass 2 is out of turn"),
        ("s 1:2 . x", "entry 3 is of another batch"),
        ("s 1:1 . .", "entry 3 is of another batch"),
        ("s .", "entry 1 is of another batch"),
    ],
)
def test_the_program_for_auditors_looks_at_passes(tmp_path: Path, said: str, complaint: str) -> None:
    """Of a vault that writes and signs what it should not."""
    desk = Desk(tmp_path, entries=1000)
    batch = 0
    for seq, word in enumerate(said.split()):
        entry = Entry(seq, 1000, "operation", "released")
        if word == "s":
            entry = Entry(seq, 1000, "start", "done")
        elif word == ".":
            entry = msgspec.structs.replace(entry, pass_entry=batch or 7)
        elif word != "x":
            number, requests = map(int, word.split(":"))
            entry, batch = (
                Entry(seq, 1, "pass", "done", passed=number, pass_entry=seq, requests=requests),
                seq,
            )
        desk.ledger.append(entry)
    desk.fill(desk.ledger.size)
    ledger_write.export(desk.ask, tmp_path / "out", None, 0)
    status, told = audit(tmp_path / "out", str(desk.checkpoints.key()))
    desk.close()
    assert (status, (complaint or "lead to the signed root") in told) == (int(bool(complaint)), True), told


def test_the_checkpoint_is_written_with_the_head(desk: Desk) -> None:
    noted = parse_checkpoint((desk.folder / "checkpoint").read_bytes())
    assert (noted.size, noted.root) == (desk.ledger.durable, desk.ledger.tree.root())
    assert noted.origin == f"hostd-ledger/{desk.store.store_id.hex()}"
