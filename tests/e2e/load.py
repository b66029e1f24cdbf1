"""Clients that keep asking while something happens, and what they were told."""

from __future__ import annotations

import collections
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from guestlib.errors import HostdError
from tests.e2e.harness import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from guestlib.client import Client
    from tests.e2e.harness import Host

HONEST = frozenset({"unavailable", "transport", "deadline", "overloaded"})
"""What a caller may be told while parts of the host are missing."""


@dataclass(frozen=True)
class Answer:
    op: str
    asked: float
    told: float
    ledger: int
    passed: int
    key: str = ""


class Load:
    """Threads with a connection each: every fourth request makes a key, the others use one."""

    def __init__(
        self,
        host: Host,
        *,
        threads: int = 3,
        timeout_s: float = 5.0,
        creating: bool = True,
        client: Callable[[], Client] | None = None,
    ) -> None:
        """`client` makes each thread's client; without it they are this process's user."""
        self.host = host
        self.answers: list[Answer] = []
        self.errors: collections.Counter[str] = collections.Counter()
        self._creating = creating
        self.last: HostdError | None = None
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._work, args=(client() if client else host.client(timeout_s=timeout_s),)
            )
            for _ in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, client: Client) -> None:
        key = ""
        count = 0
        while not self._stop.is_set():
            count += 1
            asked = time.monotonic()
            try:
                if self._creating and (not key or count % 4 == 0):
                    made = client.create_key(alias="alias/" + secrets.token_hex(8))
                    key, op, receipt = made.key.id, "CreateKey", made.receipt
                elif key:
                    op, receipt = "Encrypt", client.encrypt(key, b"x").receipt
                else:
                    op, receipt = "GenerateRandom", client.random(8).receipt
            except HostdError as error:
                self.errors[error.code] += 1
                self.last = error
                # Nobody is there: no need to hammer.
                self._stop.wait(0.02)
                continue
            assert receipt is not None
            answer = Answer(op, asked, time.monotonic(), receipt.ledger, receipt.passed, key)
            self.answers.append(answer)

    @property
    def created(self) -> list[str]:
        return [a.key for a in self.answers if a.op == "CreateKey"]

    def answered_after(self, moment: float, seconds: float, *, count: int = 5) -> float:
        """Waits for answers to requests of after `moment`; seconds until the first came."""

        def found() -> list[Answer]:
            # A copy: the threads go on.
            assert set(self.errors) <= HONEST, f"{self.errors}: {self.last}"
            late = [a for a in list(self.answers) if a.asked > moment]
            return late if len(late) >= count else []

        return until(found, "service is back", seconds)[0].told - moment

    def check(self) -> None:
        """Only honest errors; every answer is in the ledger, released, under a pass, and not withheld."""
        assert set(self.errors) <= HONEST, self.errors
        entries = {entry["seq"]: entry for entry in self.host.ledger()}
        withheld = {
            number
            for entry in entries.values()
            for first, last in entry.get("withheld", ())
            for number in range(first, last + 1)
        }
        for answer in self.answers:
            entry = entries[answer.ledger]
            assert (entry["op"], entry["outcome"]) == (answer.op, "released"), (answer, entry)
            assert entry["passed"] == answer.passed > 0, (answer, entry)
            assert answer.ledger not in withheld, (answer, entry)
        assert len({a.ledger for a in self.answers}) == len(self.answers)


def keys_work(client: Client, keys: list[str]) -> None:
    """Every key that was acknowledged is there and is the one it was."""
    there = {info.id for info in client.list_keys()}
    assert set(keys) <= there, f"lost: {set(keys) - there}"
    for key in keys[:: max(1, len(keys) // 25)]:
        sealed = client.encrypt(key, b"still here")
        assert client.decrypt(sealed.ciphertext).plaintext == b"still here"
