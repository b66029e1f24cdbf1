"""What officers are told of the manifest in force: the document itself, and how its changes come along.

A digest counts as seen if a hypervisor process has mapped such a file since the measurer started, or if the
kernel's log of this boot has it. Nothing is decided by it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from guestlib.attest.imalog import MalformedLogError, parse_entries
from guestlib.errors import NotFoundError
from hostd.core.reference import DELETED, encode_reference
from hostd.ipc import operating as adm
from hostd.ipc.manifest_status import ComingDigest, ManifestReport, RetiringDigest

if TYPE_CHECKING:
    from hostd.vault.vault import Vault


def show(vault: Vault) -> adm.Document:
    """The document in force with its signatures.

    Raises:
        NotFoundError: none is.
    """
    custody = vault.custody
    signatures, _names = custody.signed
    if custody.reference is None:
        raise NotFoundError("no reference values are in force")
    return adm.Document(
        encode_reference(custody.reference), custody.reference_digest.hex(), signatures=signatures
    )


def report(vault: Vault, now: int) -> ManifestReport:
    """What is coming and going.

    Raises:
        NotFoundError: no document is in force.
    """
    custody = vault.custody
    _signatures, names = custody.signed
    reference = custody.reference
    if reference is None:
        raise NotFoundError("no reference values are in force")
    seen = _seen(vault)
    known = {**reference.retire, **reference.next, **reference.files}
    return ManifestReport(
        digest=custody.reference_digest.hex(),
        version=reference.version,
        created=reference.created,
        signed_by=names,
        files=len(reference.files),
        next=tuple(
            ComingDigest(path, digest, digest in seen.get(path, ()))
            for path, digests in sorted(reference.next.items())
            for digest in digests
        ),
        retire=tuple(
            RetiringDigest(path, digest, when, digest in seen.get(path, ()))
            for path, times in sorted(reference.retire.items())
            for digest, when in sorted(times.items())
            if when > now
        ),
        remove=tuple(sorted(reference.leaving)),
        unseen=sum(
            digest not in seen.get(path, ())
            for path, digests in reference.files.items()
            for digest in digests
        ),
        seen={path: tuple(sorted(digests)) for path, digests in sorted(seen.items()) if path in known},
    )


def _seen(vault: Vault) -> dict[str, set[str]]:
    """Path → SHA-256 in hex."""
    seen: dict[str, set[str]] = {}
    judge = vault.measuring.appraiser
    for known in () if judge is None else judge.files.known.values():
        seen.setdefault(known.path.removesuffix(DELETED), set()).add(known.sha256)
    with suppress(MalformedLogError):  # the judge of the log says so
        for entry in parse_entries(bytes(vault.measuring.ima_log)):
            if entry.algorithm == "sha256" and not entry.violation:
                seen.setdefault(entry.path, set()).add(entry.digest.hex())
    return seen
