"""Limits of the gateway: from the configuration, and the fixed ones, each with unit and reason.

All are published in the answer to `hello` and in docs/protocol.md, "Limits".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from guestlib.wire.codec import MAX_FRAME_BYTES
from hostd.ipc import fields

if TYPE_CHECKING:
    from hostd.config import Gateway

WAITING_BYTES_PER_CONNECTION: Final = 4 << 20
"""Requests in flight, the room their answers may take, and answers not yet read by the guest. Over
it no more is read from that connection: some forty of the largest requests."""
WAITING_BYTES_PER_WORKER: Final = 12 << 20
"""The same for all connections of one caller; below the 16 MiB that the vault channel may queue."""
REQUESTS_PER_WORKER: Final = 4096
"""Requests of one caller that wait for the vault, those of connections already closed included."""
UNREAD_BYTES: Final = 2 * WAITING_BYTES_PER_CONNECTION
"""Answers that a guest does not read; over it the connection is closed."""
RECEIVE_BYTES: Final = 64 << 10
"""Taken from one guest connection in one turn, so that connections are served in turn."""
IDENTITY_S: Final = 20.0
"""For the vault to find out who a new worker's caller is and to issue its certificate."""
BIND_S: Final = 20.0
"""For a connection to wait until its worker can take it."""
WORKERS_PER_USER: Final = 64
"""Workers of one host-local user's processes together."""
WAITING_CONNECTIONS: Final = 16
"""Connections of one caller that wait while its worker is made."""
WORKER_IDLE_S: Final = 30.0
"""A worker without a connection is ended after this."""
RETIRE_BEFORE_S: Final = 600.0
"""A worker takes no new connection this long before its certificate ends (at most a quarter of its
life), and closes the old ones when it does."""
CLOSING_S: Final = 2.0
"""For a connection that is being closed to take its last bytes."""
SWEEP_S: Final = 0.25
"""How often deadlines are looked at: they are kept to this precision."""

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Limits(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the broker tells a worker to keep to."""

    connections: int
    in_flight: int
    handshake_s: Seconds
    idle_s: Seconds
    frame_s: Seconds


def limits_of(gateway: Gateway) -> Limits:
    return Limits(
        connections=gateway.connections_per_caller,
        in_flight=gateway.in_flight_per_connection,
        handshake_s=gateway.handshake_s,
        idle_s=gateway.idle_s,
        frame_s=gateway.frame_s,
    )


def published(limits: Limits) -> dict[str, int | float]:
    """The limits as `hello` tells them. Names are append-only."""
    return {
        "frame_bytes": MAX_FRAME_BYTES,
        "data_bytes": fields.MAX_DATA_BYTES,
        "ciphertext_bytes": fields.MAX_CIPHERTEXT_BYTES,
        "batch_items": fields.MAX_BATCH_ITEMS,
        "batch_bytes": fields.MAX_BATCH_BYTES,
        "batch_ciphertext_bytes": fields.MAX_BATCH_CIPHERTEXT_BYTES,
        "batch_rsa_signatures": fields.MAX_BATCH_RSA_SIGNATURES,
        "random_bytes": fields.MAX_RANDOM_BYTES,
        "aad_pairs": fields.MAX_AAD_PAIRS,
        "key_list": fields.MAX_KEY_LIST,
        "evidence_chunk_bytes": fields.IMA_CHUNK_BYTES,
        "audit_entries": fields.MAX_AUDIT_ENTRIES,
        "connections": limits.connections,
        "in_flight": limits.in_flight,
        "waiting_bytes": WAITING_BYTES_PER_CONNECTION,
        "handshake_seconds": limits.handshake_s,
        "idle_seconds": limits.idle_s,
        "frame_seconds": limits.frame_s,
    }
