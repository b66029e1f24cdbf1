"""The real gate, batches and ledger under a load by lot, in simulated time.

What stands in for the outside: a measurer whose readings take their time and see what was so while they ran,
a TPM that answers late or not at all, machines that start and end, attackers, officers, a clock. A second of
this world's time with thousands of requests takes some tenths of a second. Everything is drawn from one
seed. Who judges is not here: every event goes to `take` (`tests.support.trace`).
"""

from __future__ import annotations

import heapq
import itertools
import os
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, cast

import msgspec

from guestlib.errors import DeniedError, HostdError
from hostd.core.callers import Caller
from hostd.core.findings import BOOT, GUESTS, IMA, KERNEL, Component, Finding, Kind, Severity, Status, Verdict
from hostd.core.readings import Hypervisor
from hostd.platform.tpm_errors import TpmError, TpmUnavailableError
from hostd.vault import batches as batches_module
from hostd.vault import recording
from hostd.vault.batches import Batches
from hostd.vault.counters import Counters
from hostd.vault.done import Done
from hostd.vault.gate import HOST_COMPONENTS, Gate
from hostd.vault.ledger import Ledger
from hostd.vault.store import Store
from hostd.vault.tpmlink import PcrsRead
from hostd.vault.waiting import Waiting
from tests.support.trace import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hostd.vault.waiting import Refused
    from tests.support.trace import AnyEvent

MACHINES = 4
US, MS, S = 1_000, 1_000_000, 1_000_000_000
PCRS = {0: b"\0" * 32, 10: b"\x10" * 32}
MACHINE_KINDS = (Kind.PROCESS, Kind.RELRO, Kind.DOMAIN)


@dataclass(frozen=True)
class Odds:
    """How often something happens that is not routine. Means in seconds of simulated time; chances of 1."""

    attack_s: float = 0.25
    restart_s: float = 0.4
    loss_s: float = 2.0
    shut_s: float = 2.0
    wall_jump_s: float = 1.0
    cleared_after_s: float = 0.03
    pending: float = 0.02
    absent: float = 0.002
    tpm_error: float = 0.01
    denied: float = 0.05
    writes: float = 0.002


ROUGH = Odds()


class Clock:
    """Takes the place of the `time` module."""

    def __init__(self) -> None:
        self.now = 1 * S
        self.wall = 1_700_000_000 * S

    def monotonic_ns(self) -> int:
        return self.now

    def monotonic(self) -> float:
        return self.now / S

    def time_ns(self) -> int:
        return self.wall + self.now


@contextmanager
def simulated(clock: Clock) -> Iterator[None]:
    """The pipeline's modules look at this clock, and the disk is quick."""
    modules: tuple[Any, ...] = (batches_module, recording)
    before, sync = [m.time for m in modules], os.fdatasync
    try:
        for module in modules:
            module.time = clock
        os.fdatasync = lambda _fd: None
        yield
    finally:
        os.fdatasync = sync
        for module, was in zip(modules, before, strict=True):
            module.time = was


class Log:
    """The appraiser's view of the IMA log."""

    def __init__(self) -> None:
        self.replays = True

    def matches(self, _pcr: bytes) -> int | None:
        return 77 if self.replays else None

    def settle(self, _position: int) -> None:
        pass


class Judge:
    def __init__(self) -> None:
        self.ima = Log()


class Measurer:
    """The vault's end of it: asks, and readings that end some time later."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.ready = True
        self.appraiser = Judge()
        self.reading: dict[Component, int] = {}
        """Being read → number of the connection it was asked on."""
        self.connection = 0

    @property
    def busy(self) -> frozenset[Component]:
        return frozenset(self.reading)

    @property
    def has_room(self) -> bool:
        return self.ready and len(self.reading) <= 3

    def takes(self, component: Component) -> bool:
        if component in self.reading:
            return False
        return component == KERNEL or len(self.reading.keys() - {KERNEL}) < 2

    def ask(self, component: Component) -> None:
        assert component not in self.reading
        self.reading[component] = self.connection
        self._world.read(component, self.connection)


class SimulatedTpm:
    def __init__(self, world: World) -> None:
        self._world = world
        self.pcrs = dict(PCRS)

    def differing(self, pcrs: dict[int, bytes]) -> list[tuple[int, bytes, bytes]]:
        return [(0, PCRS[0], pcrs[0])] if pcrs[0] != PCRS[0] else []

    def attest(self, _signing: object, told: Callable[[PcrsRead | TpmError], None]) -> None:
        world, chance = self._world, self._world.chance
        if chance.random() < world.odds.tpm_error:
            # At once (its queue is full), or when it should have answered long ago.
            if chance.random() < 0.3:
                told(TpmError("refused"))
            else:
                world.after(chance.randrange(S, 2 * S), lambda: told(TpmUnavailableError("late")))
            return

        def answer() -> None:
            told(PcrsRead(dict(self.pcrs)))

        world.after(chance.randrange(200 * US, 4 * MS), answer)


class World:
    """Everything around one pipeline."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        take: Callable[[AnyEvent], None],
        odds: Odds = ROUGH,
    ) -> None:
        self.chance = Random(seed)
        self.odds = odds
        self.clock = Clock()
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._starts = itertools.count(1)
        self.vms = [f"{n:08x}-0000-4000-8000-000000000000" for n in range(MACHINES)]
        self.running: dict[str, int] = {vm: next(self._starts) for vm in self.vms}
        """VM → start time of its process."""
        self.altered: dict[Component, int] = {}
        """Since when a component is not as it should be; until an officer has cleared it."""
        self.missed: list[str] = []
        """Answers to requests that came after an attack, on what they rest on, was complete."""
        self.arrived = self.answered = self.refused = 0
        self.entries: list[int] = []
        """Of the answers."""
        require = frozenset(Kind) - {Kind.GUESTS, Kind.PROCESS, Kind.BOOT}
        self.gate = Gate(require=require, host_scope=False, waiting_per_caller=256, batch=256, sweep_ns=5 * S)
        self.measurer, self.tpm = Measurer(self), SimulatedTpm(self)
        folder.mkdir(exist_ok=True)
        self.ledger, self.store = Ledger(folder / "ledger.jsonl"), Store(folder / "store.sqlite", create=True)
        self.recorder = Recorder(take, now=self.clock.monotonic_ns)
        self.batches = Batches(
            gate=self.gate,
            measuring=cast("Any", self.measurer),
            tpm=cast("Any", self.tpm),
            ledger=self.ledger,
            heads=cast("Any", None),
            recorder=recording.Recorder(self.ledger, cast("Any", None), cast("Any", None)),
            receipts=cast("Any", None),
            store=self.store,
            counters=Counters(),
            evidence_digest=lambda passed: passed.number.to_bytes(32, "big"),
            found=self.found,
            shut=lambda why: self.shut("ledger", why),
        )
        self._shut_reasons: dict[str, str] = {}
        self.recorder.attach(self.gate, self.measurer, self.tpm)
        self.recorder.watch_ledger(self.ledger)
        self.gate.shut = None

    def close(self) -> None:
        self.store.close()
        self.ledger.close()

    # ── Time ──────────────────────────────────────────────────────────────────────────────────────

    def after(self, ns: int, call: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.clock.now + ns, next(self._order), call))

    def now_and_then(self, mean_s: float, call: Callable[[], None]) -> None:
        def again() -> None:
            call()
            self.after(int(self.chance.expovariate(1 / mean_s) * S), again)

        self.after(int(self.chance.expovariate(1 / mean_s) * S), again)

    def run(self, requests: int) -> None:
        """Until so many have arrived, and all of them were told something."""
        with simulated(self.clock):
            odds = self.odds
            self.now_and_then(odds.attack_s, self.attack)
            self.now_and_then(odds.restart_s, self.restart)
            self.now_and_then(odds.loss_s, self.lose_measurer)
            self.now_and_then(odds.shut_s, self.shut_a_while)
            self.now_and_then(odds.wall_jump_s, self.jump)
            self.now_and_then(0.05, self.kick)
            self._arrivals(requests)
            self.kick()
            end = None
            while end is None or self.clock.now < end:
                when, _, call = heapq.heappop(self._queue)
                self.clock.now = max(self.clock.now, when)
                call()
                if end is None and self.arrived >= requests:
                    end = self.clock.now + 30 * S
                if end is not None and not self.gate.waiting and not self.batches.busy:
                    break

    def _arrivals(self, requests: int) -> None:
        heavy = self.chance.random() < 0.4

        def burst() -> None:
            nonlocal heavy
            if self.chance.random() < 0.004:
                heavy = not heavy
            for _ in range(self.chance.randint(1, 20 if heavy else 3)):
                self.request()
            if self.chance.random() < 0.5:  # else they wait for what else wakes the vault
                self.kick()
            if self.arrived < requests:
                self.after(int(self.chance.expovariate(1 / 400) * US), burst)

        burst()

    # ── The vault's own wiring, as in hostd.vault.vault ───────────────────────────────────────────

    def kick(self) -> None:
        self._refuse(self.gate.expired(self.clock.now))
        self.batches.confirm()
        self.batches.start()
        while self.measurer.has_room:
            component = self.gate.next_reading(self.clock.now, self.measurer.takes)
            if component is None:
                return
            self.measurer.ask(component)

    def on_verdict(self, component: Component, status: Status, started: int, seen: dict[str, int]) -> None:
        if component == GUESTS and status in (Status.VERIFIED, Status.DRIFTED):
            self.gate.guests(_hypervisor(vm, start) for vm, start in seen.items())
        known = component in self.gate.latched
        findings = (_finding(component),) if status is Status.DRIFTED else ()
        refused = self.gate.judged(
            Verdict(component, status, findings), started=started, ended=self.clock.now
        )
        if status is Status.DRIFTED and not known:
            self.react(component)
        self._refuse(refused)
        self.kick()

    def found(self, component: Component, findings: tuple[Finding, ...]) -> None:
        if component not in self.gate.latched:
            refused = self.gate.latch(component, findings)
            self.react(component)
            self._refuse(refused)

    def react(self, component: Component) -> None:
        if self.gate.host_drifted():
            self.shut("keys", "locked")
        delay = int(self.chance.expovariate(1 / self.odds.cleared_after_s) * S)
        self.after(delay, lambda: self.clear(component))
        if self.chance.random() < 0.5:  # the attacker puts back what he changed
            self.after(delay // 2, lambda: self.altered.pop(component, None))

    def clear(self, component: Component) -> None:
        """An officer has seen to it."""
        self.altered.pop(component, None)
        if component == BOOT:
            self.tpm.pcrs = dict(PCRS)
        if component == IMA:
            self.measurer.appraiser.ima.replays = True
        if self.gate.clear(component):
            self.lose_measurer()
            if not self.gate.host_drifted():
                self.shut("keys", None)

    def shut(self, what: str, why: str | None) -> None:
        if why is None:
            self._shut_reasons.pop(what, None)
        else:
            self._shut_reasons[what] = why
        self.gate.shut = next(iter(self._shut_reasons.values()), None)

    def _refuse(self, refused: list[Refused]) -> None:
        for one in refused:
            cast("Any", one.request.item).refuse(one.error)

    # ── Readings ──────────────────────────────────────────────────────────────────────────────────

    def read(self, component: Component, connection: int) -> None:
        started, before = self.clock.now, dict(self.running)
        first = self.running.get(component.vm)

        def ends() -> None:
            if connection != self.measurer.connection:
                return
            del self.measurer.reading[component]
            status = self._seen(component, started)
            if component.vm and (first is None or self.running.get(component.vm) != first):
                status = Status.PENDING  # it ended meanwhile
            seen = before if self.chance.random() < 0.5 else dict(self.running)
            self.on_verdict(component, status, started, seen)

        self.after(self.chance.randrange(50 * US, 2 * MS), ends)

    def _seen(self, component: Component, started: int) -> Status:
        since = self.altered.get(component)
        if since is not None and (since <= started or self.chance.random() < 0.5):
            return Status.DRIFTED
        lot = self.chance.random()
        if lot < self.odds.pending:
            return Status.PENDING
        if lot < self.odds.pending + self.odds.absent or component == BOOT:
            return Status.ABSENT
        return Status.VERIFIED

    # ── What happens ──────────────────────────────────────────────────────────────────────────────

    def attack(self) -> None:
        lot = self.chance.random()
        if lot < 0.1:
            self.measurer.appraiser.ima.replays = False
        elif lot < 0.2:
            self.tpm.pcrs = {**PCRS, 0: b"\xff" * 32}
        elif lot < 0.5:
            self.altered.setdefault(self.chance.choice(sorted(HOST_COMPONENTS - {BOOT})), self.clock.now)
        elif self.running:
            vm = self.chance.choice(sorted(self.running))
            self.altered.setdefault(Component(self.chance.choice(MACHINE_KINDS), vm), self.clock.now)

    def restart(self) -> None:
        """A machine ends, or starts, or both at once: what was altered in it went with it."""
        vm = self.chance.choice(self.vms)
        if self.running.pop(vm, None) is None or self.chance.random() < 0.5:
            self.running[vm] = next(self._starts)
        for component in [c for c in self.altered if c.vm == vm]:
            del self.altered[component]
        self.gate.hint(GUESTS)

    def lose_measurer(self) -> None:
        if not self.measurer.ready:
            return
        self.measurer.ready = False
        self.measurer.connection += 1
        self.measurer.reading.clear()
        self.shut("measurer", "lost")
        self.gate.lose_measurer()
        self.batches.abandon("the measurer was lost")

        def back() -> None:
            self.measurer.ready = True
            self.shut("measurer", None)
            self.kick()

        self.after(self.chance.randrange(MS, 30 * MS), back)

    def shut_a_while(self) -> None:
        self.shut("reference", "none in force")
        self.after(self.chance.randrange(MS, 20 * MS), lambda: self.shut("reference", None))

    def jump(self) -> None:
        """Somebody sets the clock on the wall."""
        self.clock.wall += self.chance.choice([-1, 1]) * self.chance.randrange(3600 * S)

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def request(self) -> None:
        self.arrived += 1
        caller, now = self._caller(), self.clock.now
        number = self.arrived
        fails = self.chance.random() < self.odds.denied
        writes = self.chance.random() < self.odds.writes

        def run(_now: int) -> Done:
            if writes:
                self.store.set_meta("last", number.to_bytes(8, "big"))
            if fails:
                raise DeniedError("no")
            return Done(msgspec.Struct(), "tenant", "key", 1)

        def answer(_result: object, receipt: Any) -> None:
            self.answered += 1
            self.entries.append(receipt.ledger)
            self._must_have_seen(caller, now)

        def refuse(_error: HostdError) -> None:
            self.refused += 1

        job = recording.Job(
            name="Encrypt", mutates=writes, shreds=False, run=run, answer=answer, refuse=refuse
        )
        deadline = now + self.chance.choice([5 * MS, 50 * MS, 10 * S, 10 * S, 10 * S])
        try:
            self.gate.arrive(Waiting(caller, now, deadline, job))
        except HostdError:
            self.refused += 1

    def _caller(self) -> Caller:
        lot = self.chance.random()
        if lot < 0.1:
            return Caller(uid=1000)
        if lot < 0.12:
            return Caller(uid=0, officer=True)
        vm = self.chance.choice(self.vms)
        start = self.running.get(vm, 1)
        if self.chance.random() < 0.01:
            start = max(1, start - 1)  # a channel of the process before
        return Caller(vm=vm, pid=1000 + start, start_time=start)

    def _must_have_seen(self, caller: Caller, arrived: int) -> None:
        for component, since in self.altered.items():
            if since > arrived or component.kind is Kind.DOMAIN or (component.vm and caller.officer):
                continue
            if not component.vm or component.vm == caller.vm or not (caller.vm or caller.officer):
                self.missed.append(f"{caller} arrived {arrived - since} ns after {component} was altered")


def _hypervisor(vm: str, start: int) -> Hypervisor:
    return Hypervisor(1000 + start, start, 1000, vm, vm[:8], 1000 + start, "/usr/bin/qemu", "kvm", "libvirt")


def _finding(component: Component) -> Finding:
    return Finding(str(component), "altered", Severity.CRITICAL, "thing", "this", "that")
