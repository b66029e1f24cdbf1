"""Readings: what the measurer saw, as plain facts, before anyone judges them.

These structs cross from the measurer to the vault as MessagePack arrays (`hostd.ipc.measuring`),
so each is bounded here. A reading carries no verdict and no secret: the per-boot key of the
segment tags stays in the measurer, so a tag can be compared and cannot be forged.

Addresses and offsets are bytes. `file` numbers are the measurer's own: a number is given to an
open file (device, inode) when it is first seen, is never reused while the measurer lives, and the
measurer holds the file open, so an inode cannot be recycled under its number.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.core.reading_boot import BootReading
from hostd.core.reading_domain import DomainReading
from hostd.core.reading_hypervisor import Hypervisor as Hypervisor
from hostd.core.reading_kernel import KernelReading
from hostd.core.reading_posture import PostureReading as PostureReading
from hostd.core.reading_process import EXEC as EXEC
from hostd.core.reading_process import MAX_ALTERED as MAX_ALTERED
from hostd.core.reading_process import MAX_MAPPINGS as MAX_MAPPINGS
from hostd.core.reading_process import READ as READ
from hostd.core.reading_process import WRITE as WRITE
from hostd.core.reading_process import AlteredPage as AlteredPage
from hostd.core.reading_process import Mapping as Mapping
from hostd.core.reading_process import ProcessReading as ProcessReading
from hostd.core.reading_relro import RelroReading
from hostd.core.reading_self import SelfReading
from hostd.core.reading_types import Count, Name, Sha256, Struct, Tag

MAX_SEGMENTS = 16384
MAX_HYPERVISORS = 4096


class GuestsReading(Struct, frozen=True, tag="guests"):
    """All hypervisor processes; `unknown` are holders of vhost-vsock that are none of them."""

    hypervisors: Annotated[tuple[Hypervisor, ...], msgspec.Meta(max_length=MAX_HYPERVISORS)]
    unknown: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]


class ImaReading(Struct, frozen=True, tag="ima"):
    """New bytes of the binary runtime measurement log.

    `data` starts at byte `offset` of the log and ends at an entry's end; `more` says that the log
    goes on. A vault that asks from byte 0 gets the whole log, reading by reading.
    """

    boot_id: Annotated[str, msgspec.Meta(max_length=36)]
    offset: Count
    data: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    more: bool


class Segment(Struct, frozen=True):
    """A range of a file as a hypervisor maps it, and the keyed tag (AES-GMAC) of its page cache."""

    file: Count
    offset: Count
    length: Count
    tag: Tag


class FilesReading(Struct, frozen=True, tag="files"):
    """Every segment that any hypervisor process maps as code or constants."""

    segments: Annotated[tuple[Segment, ...], msgspec.Meta(max_length=MAX_SEGMENTS)]
    altered: Annotated[tuple[AlteredPage, ...], msgspec.Meta(max_length=MAX_ALTERED)] = ()
    """Pages that are not what they were when the measurer identified their file; to name the byte. The
    judgement rests on the tags."""
    standing: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEGMENTS)] = 0
    """The last so many of `segments` were not read for this, and have the tags of an earlier reading: nobody
    but hostd's own processes mapped them when it began."""


class FileIdentity(Struct, frozen=True, tag="file"):
    """What file a number stands for. The tags and the digest were taken from the same bytes:
    tags before and after the digest were equal."""

    file: Count
    path: Name
    """As the mapping names it; ` (deleted)` is kept."""
    device: Count
    inode: Count
    size: Count
    sha256: Sha256
    segments: Annotated[tuple[Segment, ...], msgspec.Meta(max_length=1024)]


class Missing(Struct, frozen=True, tag="missing"):
    """The thing asked about is not there.

    `absent` true: this host cannot provide it at all (no IMA). False: it went away or never was
    (a process that ended).
    """

    reason: Annotated[str, msgspec.Meta(max_length=512)]
    absent: bool


Reading = (
    GuestsReading
    | PostureReading
    | ImaReading
    | FilesReading
    | FileIdentity
    | ProcessReading
    | BootReading
    | KernelReading
    | RelroReading
    | DomainReading
    | SelfReading
    | Missing
)
