"""Broker ↔ worker: the records of the control socket.

| from   | record   | with                         |
|--------|----------|------------------------------|
| broker | `Start`  | once, first                  |
| broker | `Serve`  | one accepted guest descriptor |
| worker | `Closed` |                              |
| worker | `Retire` | at most once                 |

End of stream from the broker ends the worker. What a worker says here can hurt its own caller only.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hostd.gateway.limits import Limits

Small = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Start(_Record, frozen=True, tag="start"):
    limits: Limits
    seccomp: Annotated[bytes, msgspec.Meta(min_length=8, max_length=64 << 10)]
    """The compiled filter (`hostd.platform.confine.compile_filter`)."""


class Serve(_Record, frozen=True, tag="serve"):
    """A connection to serve; its descriptor travels with this record."""


class Closed(_Record, frozen=True, tag="closed"):
    """So many connections have ended since the last such record."""

    count: Small


class Retire(_Record, frozen=True, tag="retire"):
    """This worker's certificate ends soon: give new connections to a new worker."""


ToWorker = Start | Serve
FromWorker = Closed | Retire
