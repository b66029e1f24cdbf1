"""A whole hostd whose readings cost nothing: what measuring adds to an answer is the difference.

The roles are the same programs under the same supervisor. Only the vault's process differs: once a component
has been read and found good, the same reading is judged to have been made again at once, and the measurer is
not asked. Everything else is done as ever: gate, second look, quote, ledger. For the benchmark alone, in a
process of its own: `python -m tests.bench.costless run CONFIG` in place of `hostd run`.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostd.config import load_config
from hostd.core.findings import Kind, Status
from hostd.vault import main as entry
from hostd.vault import vault as vaults
from hostd.vault.measuring import Measuring
from tests.support import altered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.core.findings import Component, Verdict
    from hostd.core.readings import Reading
    from tests.e2e.harness import Host


class _Costless(Measuring):
    """Answers by itself what was good once."""

    def __init__(self, loop: Any, path: Path, **settings: Any) -> None:
        self._known: dict[Component, tuple[Verdict, Reading]] = {}
        self._again: set[Component] = set()
        super().__init__(loop, path, **settings)

    def learn(self, verdict: Verdict, reading: Reading) -> None:
        if verdict.good or verdict.status is Status.ABSENT:
            self._known[verdict.component] = verdict, reading

    @property
    def busy(self) -> frozenset[Component]:
        return super().busy | self._again

    def ask(self, component: Component) -> None:
        known = self._known.get(component)
        # A machine is found good by what was read of everything else before: nothing is free until then.
        if known is None or not {Kind.PROCESS, Kind.RELRO} <= {c.kind for c in self._known}:
            super().ask(component)
            return
        started = time.monotonic_ns()
        self._again.add(component)

        def answered() -> None:
            self._again.discard(component)
            self._listener.on_verdict(*known, started, time.monotonic_ns(), 0)

        self._loop.call_after(0.0, answered)


class _Vault(vaults.Vault):
    measuring: _Costless

    def on_verdict(self, verdict: Verdict, reading: Reading, started: int, ended: int, cost_ns: int) -> None:
        self.measuring.learn(verdict, reading)
        super().on_verdict(verdict, reading, started, ended, cost_ns)


@contextlib.contextmanager
def serving(host: Host) -> Iterator[None]:
    """The host so, on its own state; started again as it was afterwards."""
    host.stop()
    altered.start(host, "tests.bench.costless")
    host.wait_open()
    host.serves(host.client())
    yield
    host.stop()
    host.start()
    host.wait_open()
    host.serves(host.client())


def _vault(config_path: Path) -> None:
    vaults.Measuring = _Costless  # type: ignore[misc]
    entry.Vault = _Vault  # type: ignore[misc]
    entry.run(load_config(config_path))


if __name__ == "__main__":
    altered.main("tests.bench.costless", _vault)
