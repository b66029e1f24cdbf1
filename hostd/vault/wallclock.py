"""Unix time that does not go back: what has happened by it stays so when the host's clock is set back."""

from __future__ import annotations

import time


class WallClock:
    """Goes back neither while the vault lives nor behind `last`, Unix seconds."""

    def __init__(self, last: int) -> None:
        self.last = last
        """What `now` gave last."""

    def now(self) -> int:
        self.last = max(self.last, int(time.time()))
        return self.last
