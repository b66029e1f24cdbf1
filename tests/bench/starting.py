"""How long a host takes from `hostd run` to its first answer, and on what.

The host was set up before and has one VM; its sockets of the run before are gone, as after a boot. The
supervisor starts swtpm and then all roles at once: until the keys are unsealed that is interpreters and
imports, beside each other on the cores there are. What follows is the measurer's: it identifies the files
that the VM maps and works out their relocations, which a host that runs has done long ago.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING, Final

from guestlib.errors import HostdError
from hostd.platform import program
from tests.bench.gate import cpu_seconds
from tests.bench.report import median

if TYPE_CHECKING:
    from tests.bench.report import Report
    from tests.e2e.harness import Host

ROUNDS: Final = 3
POLL_S: Final = 0.005
LIMIT_S: Final = 30.0
SOCKETS: Final = {
    "tpm": "swtpm.sock",
    "gateway": "guest.sock",
    "measurer": "measurer.sock",
    "vault": "admin.sock",
}
"""What has begun → the socket that shows it."""


def measure(report: Report, host: Host, rounds: int = ROUNDS) -> None:
    """Stops and starts `hostd run` again and again; the host runs in the end."""
    rows = [_once(host) for _ in range(rounds)]
    found = {name: median([row[name] for row in rows]) for name in rows[0]}
    steps = {name: round(value) for name, value in found.items() if name not in ("ready_ms", "unsealed_ms")}
    note = f"from `hostd run`, swtpm included, one QEMU, polled every {POLL_S * 1e3:.0f} ms, median"
    report.add(
        "start.to_unsealed_ms", found["unsealed_ms"], "ms", samples=rounds,
        note=f"{note}: root key unsealed, reference values in force, the measurer and the gateway there; "
        "*_ms: each role's socket",
        **{name: value for name, value in steps.items() if name.endswith("_ms")},
    )  # fmt: skip
    report.add(
        "start.to_ready_ms", found["ready_ms"], "ms", samples=rounds,
        note=f"{note}: first gated answer; cpu.*: ms of processor time until then, so that what waited for a "
        "core can be told from work",
        **{name: value for name, value in steps.items() if name.startswith("cpu.")},
    )  # fmt: skip


def _once(host: Host) -> dict[str, float]:
    """Milliseconds since the start, and of processor time by role."""
    host.stop()
    for socket in SOCKETS.values():
        (host.run / socket).unlink(missing_ok=True)
    seen: dict[str, float] = {}
    client = host.client()
    began = time.perf_counter()
    with host.log_path.open("ab") as log:
        host.supervisor = subprocess.Popen(
            program.command("--config", str(host.config_path), "run"),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    while "ready_ms" not in seen:
        now = (time.perf_counter() - began) * 1e3
        if now > LIMIT_S * 1e3:
            raise SystemExit(f"start: no answer within {LIMIT_S:g} s; seen: {seen}")
        for name, socket in SOCKETS.items():
            if f"{name}_ms" not in seen and (host.run / socket).exists():
                seen[f"{name}_ms"] = now
        if "unsealed_ms" in seen:
            with contextlib.suppress(HostdError):
                client.random(8)
                seen["ready_ms"] = (time.perf_counter() - began) * 1e3
                break
        elif len(seen) == len(SOCKETS):
            status = host.status()
            if status is not None and status.keys_unlocked and status.gate == "open":
                seen["unsealed_ms"] = (time.perf_counter() - began) * 1e3
                continue
        time.sleep(POLL_S)
    return seen | {f"cpu.{role}": seconds * 1e3 for role, seconds in cpu_seconds(host).items()}
