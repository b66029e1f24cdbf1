"""Operators ↔ vault: hostctl's commands on the operators' socket.

Answered by `serving.Reply` (a MessagePack map) or `serving.Fault`, in any order by `seq`. Commands
that change who may do what go through the gate like a guest's request; those that say what is wrong,
and those that mend it, work while the gate is closed.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from hostd.core.reading_types import Count, Struct
from hostd.core.reference import MAX_REFERENCE_BYTES
from hostd.ipc.channel_ca import ChannelCommand
from hostd.ipc.enrolling import EnrolmentCommand
from hostd.ipc.manifest_status import ManifestStatus
from hostd.ipc.serving import Seq

TenantName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")]
Uuid = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
MAX_DOCUMENT_BYTES = MAX_REFERENCE_BYTES
MAX_SIGNATURES_BYTES = 64 << 10
MAX_RECORD_BYTES = MAX_DOCUMENT_BYTES + MAX_SIGNATURES_BYTES + (64 << 10)
"""The largest command or answer: a manifest with its signatures."""
MAX_QUEUED_BYTES = 2 * MAX_RECORD_BYTES
"""Bytes waiting on one operators' connection: an answer, and what asks for the next."""


class CreateTenant(Struct, frozen=True, tag="create-tenant"):
    name: TenantName


class BindVm(Struct, frozen=True, tag="bind-vm"):
    vm: Uuid
    tenant: TenantName


class UnbindVm(Struct, frozen=True, tag="unbind-vm"):
    vm: Uuid


class BindUser(Struct, frozen=True, tag="bind-user"):
    uid: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 2)]
    tenant: TenantName


class UnbindUser(Struct, frozen=True, tag="unbind-user"):
    uid: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 2)]


class SetOnDrift(Struct, frozen=True, tag="set-on-drift"):
    """What becomes of a tenant's keys when its own VM, or the host, drifts. Destroyed keys do not come
    back."""

    tenant: TenantName
    what: Literal["keep", "shred"]


GatedCommand = CreateTenant | SetOnDrift | BindVm | UnbindVm | BindUser | UnbindUser


class ListTenants(Struct, frozen=True, tag="list-tenants"):
    pass


class ListVms(Struct, frozen=True, tag="list-vms"):
    pass


class ListKeys(Struct, frozen=True, tag="list-keys"):
    tenant: TenantName


class Status(Struct, frozen=True, tag="status"):
    pass


class Measure(Struct, frozen=True, tag="measure"):
    """Reads everything that a host-local caller rests on anew (with `vm`, what that VM rests on), and tells
    how each component was judged: `Measured`."""

    vm: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?\Z")] = ""


class CaptureManifest(Struct, frozen=True, tag="capture-manifest"):
    """Reads the host as it is and proposes reference values; installs nothing."""


class InstallManifest(Struct, frozen=True, tag="install-manifest"):
    """Signed reference values come into force. Recorded with their digest and who signed."""

    document: Annotated[bytes, msgspec.Meta(max_length=MAX_DOCUMENT_BYTES)]
    signatures: Annotated[bytes, msgspec.Meta(max_length=MAX_SIGNATURES_BYTES)]
    """One SSHSIG block after the other, over the document's very bytes."""


class ShowManifest(Struct, frozen=True, tag="show-manifest"):
    pass


class ListDrift(Struct, frozen=True, tag="list-drift"):
    pass


class ClearDrift(Struct, frozen=True, tag="clear-drift"):
    component: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    reason: Reason


class ListLedger(Struct, frozen=True, tag="list-ledger"):
    """Entries as lines: `LedgerPage`, which may hold fewer than asked for."""

    start: Count
    count: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    order: Literal["from", "last"] = "from"


class VerifyLedger(Struct, frozen=True, tag="verify-ledger"):
    """Compares every line on the disk with what was recorded."""


class ProveLedger(Struct, frozen=True, tag="prove-ledger"):
    """One entry and the proof that it is under the head that was signed last."""

    index: Count


class LedgerConsistency(Struct, frozen=True, tag="ledger-consistency"):
    """The proof that the ledger of `new` entries (0: all) begins with the one of `old` entries."""

    old: Annotated[int, msgspec.Meta(ge=1)]
    new: Count = 0


class LedgerCheckpoint(Struct, frozen=True, tag="ledger-checkpoint"):
    """The signed note of the head that was signed last."""


class ListSegments(Struct, frozen=True, tag="list-segments"):
    """The closed segments that are here."""


class DropSegments(Struct, frozen=True, tag="drop-segments"):
    """Removes the closed segments before entry `end`: they were archived, as their root shows."""

    end: Annotated[int, msgspec.Meta(ge=1)]
    root: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


LedgerCommand = (
    ListLedger
    | VerifyLedger
    | ProveLedger
    | LedgerConsistency
    | LedgerCheckpoint
    | ListSegments
    | DropSegments
)


class TrustBundle(Struct, frozen=True, tag="trust-bundle"):
    """What a guest needs to trust this host: pinned AK, PCRs, channel CA, reference digest."""


UngatedCommand = (
    ListTenants
    | ListVms
    | ListKeys
    | Status
    | Measure
    | CaptureManifest
    | InstallManifest
    | ShowManifest
    | ManifestStatus
    | ListDrift
    | ClearDrift
    | LedgerCommand
    | EnrolmentCommand
    | ChannelCommand
    | TrustBundle
)


class Command(Struct, frozen=True, tag="command"):
    seq: Seq
    command: GatedCommand | UngatedCommand


# ── Results ───────────────────────────────────────────────────────────────────────────────────────


class Nothing(msgspec.Struct, frozen=True):
    pass


class Tenants(msgspec.Struct, frozen=True):
    tenants: tuple[tuple[str, int], ...]
    """(name, number of keys)."""
    bindings: tuple[tuple[str, str], ...]
    """(principal, tenant)."""
    shred_on_drift: tuple[str, ...] = ()


class VmInfo(msgspec.Struct, frozen=True):
    vm: str
    name: str
    pid: int
    cid: int
    accel: str
    tenant: str
    status: str
    drifted: bool


class Vms(msgspec.Struct, frozen=True):
    vms: tuple[VmInfo, ...]


class KeyLine(msgspec.Struct, frozen=True):
    id: str
    alias: str
    algorithm: str
    state: str
    versions: int


class Keys(msgspec.Struct, frozen=True):
    keys: tuple[KeyLine, ...]


class ComponentLine(msgspec.Struct, frozen=True):
    component: str
    status: str
    age_ms: float
    cost_ms: float
    drifted: bool


class StatusReport(msgspec.Struct, frozen=True):
    gate: str
    """`open` or `closed` for callers of this host; a drifted VM is refused either way."""
    reason: str
    drifted: tuple[str, ...]
    """Components that no officer has cleared."""
    passes: int
    reference: str
    components: tuple[ComponentLine, ...]
    keys_unlocked: bool
    tpm: str
    ledger_size: int
    ledger_root: str
    keys: dict[str, int]
    waiting: int
    channels: int


class FindingLine(msgspec.Struct, frozen=True):
    code: str
    severity: str
    subject: str
    where: str
    expected: str
    seen: str


class MeasuredLine(msgspec.Struct, frozen=True):
    component: str
    status: str
    """`unread` if it was not read yet."""
    required: bool
    """Whether `absent` closes the gate."""
    latched: bool
    """It drifted and no officer has cleared it; the findings are those of that drift."""
    age_ms: float
    """Since its latest reading was asked for."""
    cost_ms: float
    """The measurer's own time for it."""
    claims: tuple[tuple[str, str], ...]
    """What the reading showed: (name, value)."""
    findings: tuple[FindingLine, ...]


class Measured(msgspec.Struct, frozen=True):
    reference: str
    """Digest of the reference values in force, hexadecimal; empty if there are none."""
    version: int
    components: tuple[MeasuredLine, ...]


class Document(msgspec.Struct, frozen=True):
    document: bytes
    digest: str
    signatures: bytes = b""


class Installed(msgspec.Struct, frozen=True):
    digest: str
    version: int
    signed_by: tuple[str, ...]


class ReactionLine(msgspec.Struct, frozen=True):
    """One step that follows a drift (`hostd.core.reacting.Step`)."""

    step: str
    outcome: str
    """`done`, `failed` (it is tried again) or `waiting`."""
    detail: str


class DriftLine(msgspec.Struct, frozen=True):
    component: str
    since: int
    ledger: int
    findings: tuple[FindingLine, ...]
    reactions: tuple[ReactionLine, ...] = ()


class Drift(msgspec.Struct, frozen=True):
    drift: tuple[DriftLine, ...]


MAX_PAGE_BYTES = 1 << 20
"""Of lines in one `LedgerPage`; one block more at most."""


class LedgerPage(msgspec.Struct, frozen=True):
    start: int
    lines: tuple[bytes, ...]
    first: int
    """First entry that is not archived."""
    size: int
    """Durable entries."""
    root: str
    """Of all of them."""


class LedgerProof(msgspec.Struct, frozen=True):
    index: int
    line: bytes
    size: int
    root: bytes
    proof: tuple[bytes, ...]
    checkpoint: bytes
    """Of `size` and `root`."""


class ConsistencyProof(msgspec.Struct, frozen=True):
    old: int
    old_root: bytes
    new: int
    new_root: bytes
    proof: tuple[bytes, ...]


class Checkpoint(msgspec.Struct, frozen=True):
    note: bytes
    key: str
    """What verifies it, as signed notes write keys."""


class SegmentList(msgspec.Struct, frozen=True):
    starts: tuple[int, ...]
    """First entry of each."""
    end: int
    """First entry of the open segment."""


class LedgerVerified(msgspec.Struct, frozen=True):
    first: int
    """First entry that is not archived."""
    entries: int
    root: str
    problem: str
    """Empty: every line is as it was recorded."""
