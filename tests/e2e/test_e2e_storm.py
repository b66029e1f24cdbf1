"""Promise: under full load a change in a hypervisor is refused by the first reading after it, and nothing
that is answered rests on a reading that must have seen it; what is not an attack is never refused.

Machines run and each keeps asking as itself. At random moments some are tampered with; meanwhile innocent
things happen to others. What must have been seen is decided by the trace of the vault's gate: a reading
that was asked for after the change was complete. Every seed is printed. `HOSTD_STORM` sets how many of
each kind; `make storm` runs 200.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest

from guestlib.client import Client
from guestlib.errors import HostdError
from hostd.core.readings import EXEC, READ
from hostd.ipc import operating as adm
from tests.e2e.harness import machine, until
from tests.e2e.traced import TracedHost, traced
from tests.support import tamper
from tests.support.relay import Relay
from tests.support.trace import Arrived, Asked, Cleared, Executed, Found, Judged, Lost, Told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import qemu
    from tests.support.trace import AnyEvent

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
OF_EACH = int(os.environ.get("HOSTD_STORM", "25"))
LIBRARY = Path(os.path.realpath("/usr/lib/x86_64-linux-gnu/libpixman-1.so.0"))
ATTACKED, CALM = 6, 2
DEPTH = 8
"""Requests that each machine has in flight."""
BOUND_S = 60.0
"""Tells waiting from hanging; a slow machine hashes many files after each clearing."""
SYS_MUNMAP, MADV_DONTNEED, MADV_PAGEOUT = 11, 4, 21
HOOKED = ("writev", "recvmsg", "eventfd", "timerfd_create", "socketpair")


@dataclass
class Guest:
    """A machine with a library of its own, which keeps asking."""

    vm: qemu.Vm
    library: Path
    client: Client
    outcomes: Counter[str]


@dataclass(frozen=True)
class Change:
    """`done`: when it was complete; `component` whose reading must see it; `undo` takes it back."""

    what: str
    component: str
    done: int
    undo: Callable[[], object]

    @property
    def vm(self) -> str:
        """Whose; empty: everybody's."""
        return self.component.partition(":")[2]


# ── What is done to a machine ─────────────────────────────────────────────────────────────────────────


def patch_text(guest: Guest, chance: Random) -> tuple[str, Callable[[], object]]:
    pid = guest.vm.pid
    name = chance.choice(["qemu-under-test", "libglib", "libgnutls"])
    text = tamper.mapping(pid, name, READ | EXEC)
    address = text.start + chance.randrange(text.end - text.start)
    tamper.write(pid, address, bytes([tamper.read(pid, address, 1)[0] ^ 0xFF]))
    page = address & ~0xFFF
    # The copied page goes, and the file's own comes back.
    return "process", lambda: tamper.syscall(pid, tamper.SYS_MADVISE, page, 4096, MADV_DONTNEED)


def hook_got(guest: Guest, chance: Random) -> tuple[str, Callable[[], object]]:
    pid, functions = guest.vm.pid, list(HOOKED)
    chance.shuffle(functions)
    address = next(filter(None, (_hooked(pid, function) for function in functions)))
    was = (int.from_bytes(tamper.read(pid, address, 8), "little") - 1).to_bytes(8, "little")
    return "relro", lambda: tamper.write(pid, address, was)


def _hooked(pid: int, function: str) -> int:
    """The slot's address; 0: this QEMU does not call the function."""
    with contextlib.suppress(AssertionError):
        return tamper.hook(pid, "qemu-under-test", function)
    return 0


def inject_mapping(guest: Guest, _chance: Random) -> tuple[str, Callable[[], object]]:
    pid = guest.vm.pid
    address = tamper.inject_anonymous_code(pid)
    return "process", lambda: tamper.syscall(pid, SYS_MUNMAP, address, 4096)


def flip_page_cache(guest: Guest, chance: Random) -> tuple[str, Callable[[], object]]:
    text = tamper.mapping(guest.vm.pid, "libpixman", READ | EXEC)
    offset = text.offset + chance.randrange(text.end - text.start)
    offset = min(offset, guest.library.stat().st_size - 1)
    tamper.flip_page_cache(guest.library, offset)
    # The file is in the reference values: it is the host's.
    return "files", lambda: tamper.flip_page_cache(guest.library, offset)


HOSTS = "flip_page_cache"
"""Closes the gate to all: alone in its round."""
ATTACKS = {f.__name__: f for f in (patch_text, hook_got, inject_mapping, flip_page_cache)}


def innocent(guest: Guest, chance: Random) -> str:
    """Something that happens on a healthy host."""
    what = chance.choice(["paged out", "dropped", "file touched", "file read", "stopped for a moment"])
    pid = guest.vm.pid
    name = chance.choice(["qemu-under-test", "libglib", "libpixman"])
    text = tamper.mapping(pid, name, READ | EXEC)
    if what == "paged out":
        tamper.syscall(pid, tamper.SYS_MADVISE, text.start, text.end - text.start, MADV_PAGEOUT)
    elif what == "dropped":
        tamper.syscall(pid, tamper.SYS_MADVISE, text.start, text.end - text.start, MADV_DONTNEED)
    elif what == "file touched":
        os.utime(guest.library)
    elif what == "file read":
        Path(f"/proc/{pid}/map_files/{text.start:x}-{text.end:x}").read_bytes()
    else:
        with tamper.attached(pid):
            time.sleep(0.005)
    return what


# ── The storm ─────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def guests(binary: Path, stack: contextlib.ExitStack, number: int) -> Iterator[list[tuple[qemu.Vm, Path]]]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
    folder.chmod(0o755)
    made = []
    for index in range(number):
        own = folder / str(index)
        own.mkdir(mode=0o755)
        library = Path(shutil.copy(LIBRARY, own / "libpixman-1.so.0"))
        vm = f"6f1c1a52-4f0e-4a0c-9a55-3d2f5b7b{index:04x}"
        env = {"LD_LIBRARY_PATH": str(own)}
        made.append((stack.enter_context(machine(binary, vm=vm, env=env, name=f"vm{index}")), library))
    yield made


def keep_asking(guest: Guest, stop: threading.Event) -> None:
    """`DEPTH` requests in flight, again and again."""
    while not stop.is_set():
        try:
            handles = [guest.client.submit("GenerateRandom", {"length": 16}) for _ in range(DEPTH)]
            for handle in handles:
                try:
                    handle.result()
                    guest.outcomes["answered"] += 1
                except HostdError as error:
                    guest.outcomes[error.code] += 1
        except HostdError as error:
            guest.outcomes[error.code] += 1
        if guest.outcomes["refused_drift"]:
            stop.wait(0.01)


def test_tampering_under_load(binary: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    chance = Random(seed)
    with contextlib.ExitStack() as stack:
        pairs = stack.enter_context(guests(binary, stack, ATTACKED + CALM))
        host = stack.enter_context(traced(binary))
        everybody = []
        for vm, library in pairs:
            host.ask(adm.BindVm(vm=vm.uuid, tenant="acme"), adm.Nothing)
            path = host.directory / f"relay-{vm.pid}.sock"
            stack.callback(Relay(path, vm.pid, host.guest_socket).close)
            client = Client(host.trust(), f"unix:{path}", timeout_s=BOUND_S)
            stack.callback(client.close)
            everybody.append(Guest(vm, library, client, Counter()))
        stop = threading.Event()
        threads = [threading.Thread(target=keep_asking, args=(g, stop)) for g in everybody]
        for thread in threads:
            thread.start()
        try:
            changes, clean, began = storm(host, everybody, chance)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        took = time.monotonic() - began
        until(lambda: not host.judged(()).violations, "all is written down", 30)
        trace = [event for one in host.traces() for event in one]
        judge_changes(trace, changes)
        answered = sum(g.outcomes["answered"] for g in everybody)
        print(
            f"seed {seed}: {dict(Counter(c.what for c in changes))} under {answered / took:.0f} answers/s, "
            f"{dict(clean)} innocent, in {took:.1f} s; {dict(host.judged(()).counts)}"
        )
        refusals_are_due(trace, [g.vm.uuid for g in everybody[ATTACKED:]], changes)
        assert host.judged(()).violations == []
        assert clean.total() >= len(changes) == OF_EACH * len(ATTACKS)


def storm(
    host: TracedHost, everybody: list[Guest], chance: Random
) -> tuple[list[Change], Counter[str], float]:
    """All changes in rounds: a machine each, found, taken back, cleared."""
    attacked, calm = everybody[:ATTACKED], everybody[ATTACKED:]
    todo = [name for name in ATTACKS if name != HOSTS for _ in range(OF_EACH)]
    chance.shuffle(todo)
    rounds = [todo[at : at + ATTACKED] for at in range(0, len(todo), ATTACKED)] + [[HOSTS]] * OF_EACH
    chance.shuffle(rounds)
    changes: list[Change] = []
    clean: Counter[str] = Counter()
    all_answered(everybody)
    began = time.monotonic()
    for names in rounds:
        now = []
        chance.shuffle(attacked)
        time.sleep(chance.uniform(0.0, 0.2))  # everybody is at it again
        for guest, name in zip(attacked, names, strict=False):
            time.sleep(chance.uniform(0.0, 0.03))  # at a random moment
            clean[innocent(chance.choice(calm), chance)] += 1
            kind, undo = ATTACKS[name](guest, chance)
            component = kind if name == HOSTS else f"{kind}:{guest.vm.uuid}"
            now.append(Change(name, component, time.monotonic_ns(), undo))
        wanted = {change.vm for change in now}
        try:
            until(lambda wanted=wanted: wanted <= drifted(host).keys(), "all are found", BOUND_S)
        except AssertionError as error:
            missed = [c for c in now if c.vm not in drifted(host)]
            states = [(g.vm.process.poll(), g.outcomes) for g in attacked]
            raise AssertionError(f"{error}: {missed}; {states}; {host.status()}") from error
        assert names == [HOSTS] or drifted(host).keys() == wanted, "nobody else is"
        for change in now:
            change.undo()
        for components in drifted(host).values():
            for component in components:
                host.ask(adm.ClearDrift(component=component, reason="storm"), adm.Nothing)
        changes += now
        if len(rounds) > 100:  # somebody is waiting
            print(f"{time.monotonic() - began:.0f} s: {len(changes)} changes found", flush=True)
        all_answered(everybody)
    return changes, clean, began


def drifted(host: TracedHost) -> dict[str, list[str]]:
    """Machine → its components that have drifted."""
    found: dict[str, list[str]] = {}
    for component in host.ask(adm.Status(), adm.StatusReport).drifted:
        found.setdefault(component.partition(":")[2], []).append(component)
    return found


def all_answered(everybody: list[Guest]) -> None:
    before = [guest.outcomes["answered"] for guest in everybody]
    until(
        lambda: all(g.outcomes["answered"] > b for g, b in zip(everybody, before, strict=True)),
        "all machines are answered",
        BOUND_S,
    )


def refusals_are_due(trace: list[AnyEvent], calm: list[str], changes: list[Change]) -> None:
    """A machine to which only innocent things happened is refused for the host's drift and nothing else."""
    arrived = {e.number: e for e in trace if isinstance(e, Arrived)}
    of_the_host = False
    for event in trace:
        if isinstance(event, Found | Cleared) and ":" not in event.component:
            of_the_host = isinstance(event, Found)
        elif isinstance(event, Told) and event.outcome == "refused_drift":
            assert of_the_host or arrived[event.number].vm not in calm, arrived[event.number]
    found = {e.component for e in trace if isinstance(e, Found)}
    assert not [c for c in found if c.partition(":")[2] in calm]
    assert {c for c in found if ":" not in c} <= {c.component for c in changes}


def judge_changes(trace: list[AnyEvent], changes: list[Change]) -> None:
    """Of each change: the first reading that must have seen it did, and no request that came after it was
    answered before that."""
    arrived = {e.number: e for e in trace if isinstance(e, Arrived)}
    times = [event.at for event in trace]
    for change in changes:
        component = change.component
        asked, seen = 0, None
        for event in trace[bisect_left(times, change.done) :]:
            if isinstance(event, Asked) and event.component == component and not asked:
                asked = event.at
            elif isinstance(event, Lost):
                asked = 0
            elif isinstance(event, Judged) and event.component == component:
                # One that was under way when it happened may have seen it already.
                if event.status == "drifted" or (asked and event.status != "pending"):
                    seen = event
                    break
                asked = 0
            elif isinstance(event, Told) and not event.outcome:
                request = arrived[event.number]
                assert not (change.vm in ("", request.vm) and request.arrived >= change.done), (
                    f"{change}: {request} was answered"
                )
        assert seen is not None, change
        around = [e for e in trace if change.done <= e.at <= seen.at and change.vm in str(e)]
        told = "\n".join(str(e) for e in around if not isinstance(e, Arrived | Told | Executed))
        assert seen.status == "drifted", f"{change}: the first reading after it was {seen.status}\n{told}"
