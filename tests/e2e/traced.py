"""A whole hostd whose vault keeps a trace of its gate (`tests.support.trace`).

The roles are the same programs under the same supervisor; only the vault's process attaches a recorder
before it serves: `python -m tests.e2e.traced run CONFIG` in place of `hostd run`.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hostd.config import load_config
from hostd.core.findings import Kind
from hostd.vault import main as entry
from hostd.vault.vault import STANDING_SWEEPS, Vault
from tests.e2e.harness import READY_S, Host, Settings, directory, until
from tests.support import altered
from tests.support.freshness import Freshness, Rules
from tests.support.trace import AnyEvent, Arrived, Lines, Recorder, Told, read_trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostd.config import Config
    from hostd.ipc.loop import Loop
    from tests.e2e.load import Answer

FLUSH_S = 0.05
WRITTEN_S = 20.0
SLOW = "fdatasync-takes"


class TracedHost(Host):
    """A host with a trace of each vault that ran."""

    def start(self, seconds: float = READY_S) -> None:
        altered.start(self, "tests.e2e.traced", seconds)

    def traces(self) -> list[list[AnyEvent]]:
        """One for each process, the oldest first."""
        paths = sorted(self.directory.glob("trace-*"), key=lambda p: p.stat().st_ctime_ns)
        return [read_trace(path) for path in paths]

    @property
    def rules(self) -> Rules:
        config = self.config
        return Rules(
            tolerated=frozenset(str(k) for k in Kind) - set(config.measure.require),
            host_scope=config.drift.scope == "host",
            standing_ns=STANDING_SWEEPS * int(config.measure.sweep_s * 1e9),
        )

    def judged(self, answers: Iterable[Answer]) -> Freshness:
        """The sentence over all traces; and what clients were told fits what they say."""
        answers, deadline = tuple(answers), time.monotonic() + WRITTEN_S
        while True:
            traces = self.traces()
            arrived = _arrived(traces)
            # The vault writes its trace now and then; what is not in it after a while was never there.
            if all(a.ledger in arrived for a in answers) or time.monotonic() > deadline:
                break
            time.sleep(FLUSH_S)
        freshness = Freshness(self.rules)
        for trace in traces:
            one = Freshness(self.rules).over(trace)
            freshness.violations += one.violations
            freshness.counts += one.counts
        for answer in answers:
            at = arrived.get(answer.ledger)
            if at is None:
                freshness.violations.append(f"{answer}: no such answer left the gate")
            elif at < answer.asked * 1e9:
                freshness.violations.append(f"{answer}: arrived before it was asked")
        return freshness


def _arrived(traces: list[list[AnyEvent]]) -> dict[int, int]:
    """Ledger entry of each answer that left the gate, and when its request had arrived."""
    arrived: dict[int, int] = {}
    for trace in traces:
        numbers = {e.number: e.arrived for e in trace if isinstance(e, Arrived)}
        told = (e for e in trace if isinstance(e, Told) and not e.outcome)
        arrived.update({e.ledger: numbers[e.number] for e in told})
    return arrived


@contextlib.contextmanager
def traced(binary: Path, settings: Settings | None = None) -> Iterator[TracedHost]:
    """A host that serves, as `tests.e2e.harness.adopted`, with traces."""
    with directory() as place:
        host = TracedHost(place, binary, settings)
        host.setup()
        try:
            host.start()
            until(lambda: (s := host.status()) and s.keys_unlocked, "the root key is unsealed")
            host.adopt(("acme", 0))
            host.wait_open()
            yield host
        finally:
            host.close_clients()
            if host.supervisor is not None:
                host.kill()
            print(f"── log of the roles ──\n{host.log()}")


class _TracedVault(Vault):
    def __init__(self, config: Config, loop: Loop) -> None:
        super().__init__(config, loop)
        number = len(list(config.state.parent.glob("trace-*")))
        lines = Lines(config.state.parent / f"trace-{number}")
        recorder = Recorder(lines.take)
        recorder.attach(self.gate, self.measuring, self.batches._tpm)
        recorder.watch_ledger(self.ledger)
        loop.every(FLUSH_S, lines.flush)
        slow_disk(config.state.parent / SLOW)


def slow_disk(seconds: Path) -> None:
    """From now on fdatasync(2) takes as long as the file says, if it is there."""
    sync = os.fdatasync

    def slow(fd: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(seconds.read_text()))
        sync(fd)

    os.fdatasync = slow


def _vault(config_path: Path) -> None:
    entry.Vault = _TracedVault  # type: ignore[misc]
    entry.run(load_config(config_path))


if __name__ == "__main__":
    altered.main("tests.e2e.traced", _vault)
