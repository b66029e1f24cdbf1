"""Entry of the vault's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.ipc.loop import Loop
from hostd.platform import collector, confine, notify
from hostd.vault.counting import CountersEndpoint
from hostd.vault.operators import Operators
from hostd.vault.vault import Vault

if TYPE_CHECKING:
    from hostd.config import Config


def run(config: Config) -> None:
    """Serves until SIGTERM.

    Raises:
        StoreError, LedgerError, TpmError, ConfigError: it cannot start; nothing was served.
    """
    confine.undumpable()
    loop = Loop()
    loop.stop_on_signals()
    vault = Vault(config, loop)
    Operators(vault, loop, config.run / "admin.sock", uids=config.admin_uids())
    CountersEndpoint(vault, loop, config.run / "metrics.sock", uid=config.uid_of("metrics"))
    collector.settle()
    notify.notify(notify.READY)
    interval = notify.watchdog_interval()
    if interval is not None:
        loop.every(interval, lambda: notify.notify(notify.WATCHDOG))
    loop.run()
    notify.notify(notify.STOPPING)
    vault.close()
