"""One machine floods the gate while another asks one thing at a time; what that one has of it, by trace."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guestlib.client import Client
from guestlib.errors import HostdError
from hostd.ipc import operating as adm
from tests.e2e.harness import Settings, machine, until
from tests.e2e.traced import TracedHost, traced
from tests.support.relay import Relay
from tests.support.trace import Arrived, Told

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import qemu

QUIET = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7c0001"
FLOODING = "6f1c1a52-4f0e-4a0c-9a55-3d2f5b7c0002"
CONNECTIONS, DEPTH = 4, 256
"""Of the flooding machine: as much as it may have waiting."""


@dataclass
class Seen:
    """Of the quiet machine's requests while nobody floods (`alone`), and while the other does."""

    alone_ms: list[float] = field(default_factory=list)
    flooded_ms: list[float] = field(default_factory=list)
    """From arrival to answer, ascending."""
    others: list[int] = field(default_factory=list)
    """Answers to the flooding machine between a request's arrival and its own."""
    flood: int = 0
    """Answers of the flooding machine."""


def observe(binary: Path, *, count: int, batch: int) -> Seen:
    """`count` quiet requests alone, and as many in the flood."""
    settings = Settings(more=f"[gate]\nbatch = {batch}\n")
    with contextlib.ExitStack() as stack:
        machines = [stack.enter_context(machine(binary, vm=vm, name=vm[-4:])) for vm in (QUIET, FLOODING)]
        host = stack.enter_context(traced(binary, settings))
        for vm in machines:
            host.ask(adm.BindVm(vm=vm.uuid, tenant="acme"), adm.Nothing)
        quiet, *noisy = (_client(stack, host, machines[n], n) for n in (0, *([1] * CONNECTIONS)))
        until(lambda: _answered(quiet) and _answered(noisy[0]), "both are answered")
        for _ in range(count):
            quiet.random(8)
        stop, begun = threading.Event(), time.monotonic_ns()
        threads = [threading.Thread(target=_flood, args=(client, stop)) for client in noisy]
        for thread in threads:
            thread.start()
        try:
            time.sleep(1.0)  # until the flood is at its height
            height = time.monotonic_ns()
            for _ in range(count):
                quiet.random(8)
            ended = time.monotonic_ns()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        return _seen(host, begun, height, ended)


def _client(stack: contextlib.ExitStack, host: TracedHost, vm: qemu.Vm, number: int) -> Client:
    path = host.directory / f"relay-{number}.sock"
    if not path.exists():
        stack.callback(Relay(path, vm.pid, host.guest_socket).close)
    client = Client(host.trust(), f"unix:{path}", timeout_s=60.0)
    stack.callback(client.close)
    return client


def _answered(client: Client) -> bool:
    with contextlib.suppress(HostdError):
        client.random(8)
        return True
    return False


def _flood(client: Client, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(HostdError):
            for handle in [client.submit("GenerateRandom", {"length": 8}) for _ in range(DEPTH)]:
                with contextlib.suppress(HostdError):
                    handle.result()


def _seen(host: TracedHost, begun: int, height: int, ended: int) -> Seen:
    seen = Seen()
    waiting: dict[int, tuple[Arrived, int]] = {}
    flood = 0
    time.sleep(0.2)  # the trace is written every 50 ms
    for event in (event for trace in host.traces() for event in trace):
        if isinstance(event, Arrived):
            waiting[event.number] = event, flood
        elif isinstance(event, Told):
            request, before = waiting.pop(event.number)
            if request.vm == FLOODING:
                flood += not event.outcome
            elif request.vm == QUIET and not event.outcome:
                took = (event.at - request.arrived) / 1e6
                if event.at < begun:
                    seen.alone_ms.append(took)
                elif height <= request.arrived and event.at <= ended:
                    seen.flooded_ms.append(took)
                    seen.others.append(flood - before)
    seen.flood = flood
    seen.alone_ms.sort()
    seen.flooded_ms.sort()
    return seen
